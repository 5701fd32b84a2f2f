"""Objects of Anthropic's dialect: errors, models, events of a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from p2pinfer.api.errors import ApiError, Kind
from p2pinfer.api.exchange import encode
from p2pinfer.api.served_model import ServedModel

_TYPES: Final[Mapping[Kind, str]] = {
    "invalid_request": "invalid_request_error",
    "too_long": "invalid_request_error",
    "authentication": "authentication_error",
    "forbidden": "permission_error",
    "not_found": "not_found_error",
    "busy": "rate_limit_error",
    "unavailable": "overloaded_error",
    "bug": "api_error",
}


def error_body(error: ApiError) -> dict[str, Any]:
    """An error in Anthropic's shape."""
    kind = "request_too_large" if error.status == 413 else _TYPES[error.kind]
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


def model_object(model: ServedModel) -> dict[str, Any]:
    """The model as lists show it."""
    return {
        "type": "model",
        "id": model.id,
        "display_name": model.id,
        "created_at": datetime.fromtimestamp(model.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "max_input_tokens": model.spec.max_positions,
        "max_tokens": model.config.max_new_tokens,
    }


def model_list(models: Sequence[ServedModel]) -> dict[str, Any]:
    """Body of /v1/models."""
    listed = [model_object(model) for model in models]
    return {"data": listed, "has_more": False, "first_id": models[0].id, "last_id": models[-1].id}


def event(document: Mapping[str, Any]) -> bytes:
    """One event of a stream; its name is its type."""
    return f"event: {document['type']}\ndata: ".encode() + encode(document) + b"\n\n"
