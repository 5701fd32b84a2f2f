"""What routing may ask of reputation; it can read, never write."""

from typing import Protocol

from .score import Score


class ReputationView(Protocol):
    """Read-only reputation. `Ledger` is one; tests and users bring others."""

    def score(self, peer_id: str) -> Score:
        """The peer's score; a newcomer's is the prior."""
        ...

    def is_banned(self, peer_id: str) -> bool:
        """Whether the peer must not be used at all."""
        ...
