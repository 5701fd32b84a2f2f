"""Pending results of submitted steps, and the timing of single steps."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import Any, NamedTuple, TypeAlias

from p2pinfer.node.protocol.messages import Bill

# What is done while a step is under way.
Meanwhile: TypeAlias = Callable[[], Awaitable[None]]


class StepTiming(NamedTuple):
    """Time that one decode step took for the client, and what each hop says it spent."""

    seconds: float
    bills: tuple[Bill, ...]
    tokens: int  # positions that the step had


class Superseded(Exception):
    """A step was rolled back before its result came."""


class Pending:
    """A step that was submitted. `await` it for what came of it, as often as that is wanted."""

    __slots__ = ("_output",)

    def __init__(self, output: Callable[[], Awaitable[Any]]) -> None:
        self._output = output

    def __await__(self) -> Generator[object, object, Any]:
        """As `Format.decode` of the session gives it: hidden states, or draws.

        Raises:
            PeerError: A hop refused, vanished, broke protocol or took too long, and could not be replaced.
            Superseded: The step was rolled back before its result came.
        """
        return self._output().__await__()
