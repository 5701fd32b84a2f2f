"""Events of a client's generations, for a page, a notebook or a log to follow. Each is one JSON object.

`Client(on_event=...)` is called with each, in the event loop, so it should return at once. What it raises is
logged and harms no generation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal, TypeAlias

import msgspec

logger = logging.getLogger(__name__)


class _Event(msgspec.Struct, frozen=True, tag_field="event"):
    """An object whose `event` key names it. `session` is the session's name, in hex."""


class HopTaken(msgspec.Struct, frozen=True):
    """A hop of a route."""

    peer_id: str
    blocks: tuple[int, int]
    connection: Literal["direct", "relayed"]


class SessionStarted(_Event, frozen=True, tag="session_started"):
    """A route was chosen, and every hop of it has opened the session."""

    session: str
    route: tuple[HopTaken, ...]
    max_tokens: int


class StepDone(_Event, frozen=True, tag="step_done"):
    """A decode step came back."""

    session: str
    position: int
    tokens: int
    ms: float  # as the client saw it
    per_hop_ms: tuple[float, ...]  # as each hop says, its queue included


class HopFailed(_Event, frozen=True, tag="hop_failed"):
    """A hop failed, or could not be reached by the one before it."""

    session: str
    peer_id: str
    reason: str


class HopReplaced(_Event, frozen=True, tag="hop_replaced"):
    """Others took the place of hops that failed, left or were slow."""

    session: str
    replaced: tuple[str, ...]
    route: tuple[HopTaken, ...]  # from now on
    cause: Literal["failure", "handover"]


class RelayLeft(_Event, frozen=True, tag="relay_left"):
    """The stream to a hop moved from a relayed connection to a direct one."""

    session: str
    peer_id: str
    pause_ms: float


class SessionEnded(_Event, frozen=True, tag="session_ended"):
    """A session is over."""

    session: str
    reason: str  # "closed", or what it broke on
    failovers: int


class AuditDone(_Event, frozen=True, tag="audit_done"):
    """A hop's work was checked."""

    peer_id: str
    verdict: str  # pass, fail, suspect or inconclusive
    reason: str


Event: TypeAlias = SessionStarted | StepDone | HopFailed | HopReplaced | RelayLeft | SessionEnded | AuditDone
Report: TypeAlias = Callable[[Event], None]


def guarded(report: Report) -> Report:
    """`report`, whose errors are logged instead of raised: a listener must not break what it listens to."""

    def call(event: Event) -> None:
        try:
            report(event)
        except Exception:
            logger.exception("a listener failed on %s", type(event).__name__)

    return call
