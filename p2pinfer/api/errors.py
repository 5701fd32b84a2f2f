"""Errors of the API: one meaning each, which every dialect writes in its own shape."""

from __future__ import annotations

from typing import Literal, TypeAlias

from p2pinfer.errors import LocalError, NoRoute, P2PInferError, PeerError, PromptTooLong

Kind: TypeAlias = Literal[
    "invalid_request", "too_long", "authentication", "forbidden", "not_found", "busy", "unavailable", "bug"
]
_STATUS: dict[Kind, int] = {
    "invalid_request": 400,
    "too_long": 400,
    "authentication": 401,
    "forbidden": 403,
    "not_found": 404,
    "busy": 429,
    "unavailable": 503,
    "bug": 500,
}


class ApiError(Exception):
    """A request is not answered.

    Attributes:
        kind: Says why.
        status: Of HTTP.
        param: Field of the request that is at fault; None if none is.
        retry_after_s: How long to wait before trying again; None if that is of no use.
    """

    def __init__(
        self,
        message: str,
        kind: Kind = "invalid_request",
        *,
        param: str | None = None,
        status: int | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.param = param
        self.status = status or _STATUS[kind]
        self.retry_after_s = retry_after_s


def as_api_error(error: P2PInferError) -> ApiError:
    """An error as a client is told: its own fault, or that the swarm cannot serve this."""
    match error:
        case PromptTooLong():
            return ApiError(str(error), "too_long")
        case LocalError():
            return ApiError(str(error))
        case NoRoute() | PeerError():
            return ApiError(str(error), "unavailable", retry_after_s=5)
        case _:
            return ApiError(str(error), "unavailable")
