"""Predecessors of a session: the peers that its client has named, until one of them takes over.

A client that replaces a hop names the new one to the hop behind it while the former still feeds it. Whoever
was named last is the one that stays: with its first step that is no replay, the others are cut off. What they
had sent before may still come in, and is not taken any more.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

import trio

_MAX_EXPECTED: Final = 3  # at once: one that feeds us, one that is to, one given up meanwhile


class Predecessors:
    """The peers that may feed one session, and the streams that they do it on."""

    def __init__(self, first: str) -> None:
        self._expected = [first]  # the last one named takes over
        self._feeder = first  # who sent the last step that was no replay
        self._feeds: dict[str, trio.CancelScope] = {}  # of the chain streams that they have attached

    def expects(self, peer_id: str) -> bool:
        """True if this peer may attach and feed the session."""
        return peer_id in self._expected

    def expect(self, peer_id: str) -> None:
        """Let this peer feed the session too, and alone as soon as it sends a step that is no replay."""
        if peer_id in self._expected:
            self._expected.remove(peer_id)
        self._expected.append(peer_id)
        given_up = [each for each in self._expected[:-1] if each != self._feeder]
        self._cut_off(given_up[: max(0, len(self._expected) - _MAX_EXPECTED)])

    def fed_by(self, peer_id: str) -> None:
        """One of them has sent a step that is no replay."""
        self._feeder = peer_id
        if peer_id == self._expected[-1] and len(self._expected) > 1:
            self._cut_off(self._expected[:-1])

    @contextmanager
    def feeding(self, peer_id: str) -> Generator[None]:
        """Whatever runs inside is cancelled when the peer is cut off, or attaches anew."""
        with trio.CancelScope() as scope:
            if (former := self._feeds.get(peer_id)) is not None:
                former.cancel()
            self._feeds[peer_id] = scope
            try:
                yield
            finally:
                if self._feeds.get(peer_id) is scope:
                    del self._feeds[peer_id]

    def _cut_off(self, peer_ids: list[str]) -> None:
        for peer_id in peer_ids:
            self._expected.remove(peer_id)
            if (feed := self._feeds.get(peer_id)) is not None:
                feed.cancel()
