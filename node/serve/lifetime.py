"""Lifetime of a session on this hop: what ends it, and whom that stops.

Several tasks run for a session, each on a stream of its own. Whichever of them meets a reason ends all of
them, and no other session.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import TypeVar

import trio

from p2pinfer.errors import PeerVanished, ProtocolViolation, WrongOutput
from p2pinfer.node.protocol.messages import RefusalCode

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class SessionRefusal(Exception):
    """Reason why a session is not let in, or cannot go on; travels to the client as `Refused`."""

    def __init__(self, code: RefusalCode, message: str, about_peer: str = "", *, fits: int = 0) -> None:
        super().__init__(message)
        self.code: RefusalCode = code
        self.about_peer = about_peer
        self.fits = fits  # tokens of a session that would be let in


class Lifetime:
    """End of one session: the tasks that it stops, and its reason.

    Attributes:
        is_over: Whether nothing is to be computed or sent for the session any more. Read in any thread.
        ended_by: The first reason that was given; None if there was none, or as long as the session runs.
        last_active: When the last step came or was sent on, on trio's clock. Whatever else a client says
            costs it nothing, and keeps no session alive.
    """

    def __init__(self) -> None:
        self.is_over = False
        self.ended_by: SessionRefusal | None = None
        self.last_active = trio.current_time()
        self._scopes: list[trio.CancelScope] = []

    @contextmanager
    def scope(self) -> Generator[None]:
        """Cancel whatever runs inside when the session ends."""
        with trio.CancelScope() as scope:
            if self.is_over:
                scope.cancel()
            self._scopes.append(scope)
            try:
                yield
            finally:
                self._scopes.remove(scope)

    def end(self, refusal: SessionRefusal | None) -> None:
        """Stop everything that runs for this session; the first reason given counts, None is a quiet end."""
        if self.is_over:
            return
        self.is_over = True
        self.ended_by = refusal
        for scope in [*self._scopes]:
            scope.cancel()

    @contextmanager
    def guard(self, client_gone: str | None = None) -> Generator[None]:
        """End the session, and nothing else, for what a peer does wrong inside.

        A stream that breaks ends it only if it is the client's, and `client_gone` says so; a predecessor that
        vanishes may be replaced.
        """
        try:
            yield
        except SessionRefusal as refusal:
            self.end(refusal)
        except ProtocolViolation as exc:
            self.end(SessionRefusal("protocol", str(exc), exc.peer_id))
        except WrongOutput as exc:
            self.end(SessionRefusal("wrong_input", str(exc), exc.peer_id))
        except PeerVanished as exc:
            logger.debug("session.stream_lost peer=%s why=%s", exc.peer_id, exc)
            if client_gone:
                self.end(SessionRefusal("no_session", client_gone))

    def idle_s(self) -> float:
        """Seconds since the last step."""
        return trio.current_time() - self.last_active

    async def end_when_idle(self, lease_s: float) -> None:
        """End the session when nobody has used it for so long; never returns before that."""
        while (deadline := self.last_active + lease_s) > trio.current_time():
            await trio.sleep_until(deadline)
        self.end(SessionRefusal("lease_expired", f"no step for {lease_s:g} s"))


def unlisted_client(peer_id: str, why: str) -> SessionRefusal:
    """Answer to a client that the lists shut out. It may be of any version: how to ask stands in here."""
    problem = (
        f"this node does not serve client {peer_id}: {why}; ask its operator to add that id, "
        "which a client keeps by --identity FILE and otherwise changes at every start"
    )
    return SessionRefusal("no_session", problem)


def first_enough(gains: Iterable[tuple[_T, int]], missing: int) -> list[_T]:
    """The first ones that together gain what is `missing`; none if all of them are not enough."""
    chosen: list[_T] = []
    for each, gained in gains:
        if missing <= 0:
            break
        missing -= gained
        chosen.append(each)
    return [] if missing > 0 else chosen
