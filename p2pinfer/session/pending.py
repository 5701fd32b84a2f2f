"""Pending results of submitted steps, and the timing of single steps."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import NamedTuple

from torch import Tensor

from p2pinfer.node.protocol.messages import Bill


class StepTiming(NamedTuple):
    """Time that one decode step took for the client, and what each hop says it spent."""

    seconds: float
    bills: tuple[Bill, ...]
    tokens: int  # positions that the step had


class Superseded(Exception):
    """A step was rolled back before its result came."""


class Pending:
    """A step that was submitted. `await` it for its hidden states, as often as they are wanted."""

    __slots__ = ("_output",)

    def __init__(self, output: Callable[[], Awaitable[Tensor]]) -> None:
        self._output = output

    def __await__(self) -> Generator[object, object, Tensor]:
        """(returned tokens, hidden_size), in the session's codec.

        Raises:
            PeerError: A hop refused, vanished, broke protocol or took too long, and could not be replaced.
            Superseded: The step was rolled back before its result came.
        """
        return self._output().__await__()
