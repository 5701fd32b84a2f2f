"""Reporter of one session's events, which costs nothing while nobody follows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from p2pinfer.events import (
    HopFailed,
    HopReplaced,
    HopTaken,
    RelayLeft,
    Report,
    SessionEnded,
    SessionStarted,
    StepDone,
)
from p2pinfer.node.protocol.messages import Bill

from .hop_stream import HopStream


class Reporter:
    """Turns what happens in a session into events.

    Attributes:
        is_followed: True if somebody is told of them.
    """

    def __init__(self, session: bytes, report: Report | None) -> None:
        self._session = session.hex()
        self._report = report
        self.is_followed = report is not None

    def started(self, hops: Sequence[HopStream], max_tokens: int) -> None:
        """Every hop has opened the session."""
        if self._report is not None:
            self._report(SessionStarted(self._session, _taken(hops), max_tokens))

    def step_done(self, position: int, tokens: int, seconds: float, bills: Sequence[Bill]) -> None:
        """A decode step came back."""
        if self._report is not None:
            per_hop_ms = tuple(bill.serve_us / 1e3 for bill in bills)
            self._report(StepDone(self._session, position, tokens, seconds * 1e3, per_hop_ms))

    def failed(self, hop: HopStream, error: Exception) -> None:
        """A hop has to be replaced, or linked to anew."""
        if self._report is not None:
            self._report(HopFailed(self._session, hop.peer_id, str(error)))

    def replaced(
        self, former: Sequence[str], hops: Sequence[HopStream], cause: Literal["failure", "handover"]
    ) -> None:
        """`hops` are the route now, without the peers `former`."""
        if self._report is not None:
            self._report(HopReplaced(self._session, tuple(former), _taken(hops), cause))

    def left_relay(self, hop: HopStream, pause_s: float) -> None:
        """The stream to a hop goes over a direct connection now."""
        if self._report is not None:
            self._report(RelayLeft(self._session, hop.peer_id, pause_s * 1e3))

    def ended(self, reason: str, failovers: int) -> None:
        """The session is over."""
        if self._report is not None:
            self._report(SessionEnded(self._session, reason, failovers))


def _taken(hops: Sequence[HopStream]) -> tuple[HopTaken, ...]:
    return tuple(
        HopTaken(
            each.peer_id,
            (each.hop.span.start, each.hop.span.stop),
            "relayed" if each.is_relayed else "direct",
        )
        for each in hops
    )
