"""View of reputation for routing, which can read and never write."""

from typing import Protocol

from .score import Score


class ReputationView(Protocol):
    """Read-only reputation. `Ledger` is one; tests and users bring others."""

    def score(self, peer_id: str) -> Score:
        """The peer's score; a newcomer's is the prior."""
        ...

    def is_banned(self, peer_id: str) -> bool:
        """True if the peer must not be used at all."""
        ...


class ReadOnlyView:
    """View with another one's answers only, for code that should not reach a ledger's other methods."""

    def __init__(self, view: ReputationView) -> None:
        self._score, self._is_banned = view.score, view.is_banned

    def score(self, peer_id: str) -> Score:
        """See `ReputationView.score`."""
        return self._score(peer_id)

    def is_banned(self, peer_id: str) -> bool:
        """See `ReputationView.is_banned`."""
        return self._is_banned(peer_id)
