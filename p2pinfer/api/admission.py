"""Turns of requests: how many of one key generate at once, and how many wait for that."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from .config import ApiConfig
from .errors import ApiError


@dataclass(slots=True)
class _Turns:
    limiter: trio.CapacityLimiter
    waiting: int = 0


class Admission:
    """Gives requests their turn, first come, first served, each key by itself."""

    def __init__(self, config: ApiConfig) -> None:
        self._config = config
        self._turns: dict[str, _Turns] = {}

    @property
    def active(self) -> int:
        """Number of requests that are having their turn."""
        return sum(int(turns.limiter.borrowed_tokens) for turns in self._turns.values())

    @asynccontextmanager
    async def turn(self, key: str) -> AsyncGenerator[None]:
        """Wait for a turn, and have it until the block ends.

        Raises:
            ApiError: Too many wait already, or the turn did not come in time.
        """
        config = self._config
        turns = self._turns.setdefault(key, _Turns(trio.CapacityLimiter(config.requests_per_key)))
        if turns.limiter.available_tokens < 1 and turns.waiting >= config.queue_per_key:
            raise _busy(f"{config.requests_per_key} requests are being answered and {turns.waiting} wait")
        borrower = object()
        turns.waiting += 1
        try:
            with trio.fail_after(config.queue_timeout_s):
                await turns.limiter.acquire_on_behalf_of(borrower)
        except trio.TooSlowError:
            raise _busy(f"no turn came within {config.queue_timeout_s:g} s") from None
        finally:
            turns.waiting -= 1
        try:
            yield
        finally:
            turns.limiter.release_on_behalf_of(borrower)


def _busy(reason: str) -> ApiError:
    return ApiError(f"{reason}; try again in a few seconds", "busy", retry_after_s=5)
