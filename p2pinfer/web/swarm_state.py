"""State of the swarm as a page shows it: who serves what, how peers are reached and trusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from p2pinfer.json_documents import SwarmDocument, swarm_document
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.swarm_view import PeerView, SwarmView


class Observer(Protocol):
    """Client as a page sees it."""

    ledger: Ledger

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        ...

    def peers(self) -> Sequence[PeerView]:
        """Peers that serve it."""
        ...


class TrustDocument(msgspec.Struct, frozen=True):
    """Opinion of a peer in this computer's ledger; scores are 0 to 1."""

    integrity: float
    reliability: float
    banned: bool
    why: tuple[str, ...]  # a sentence each


class StateDocument(msgspec.Struct, frozen=True):
    """Swarm of the served model, and the trust in each of its peers, by peer id.

    `missing` in it goes by announcements, since nobody is called for a page.
    """

    swarm: SwarmDocument
    trust: dict[str, TrustDocument]


def state_document(view: SwarmView, ledger: Ledger) -> StateDocument:
    """State as the view and the ledger have it. It may be called in a thread."""
    swarm = swarm_document(view)
    announced = tuple((span.start, span.stop) for span in view.unannounced)
    return StateDocument(
        msgspec.structs.replace(swarm, missing=announced, unknown=()),
        {peer.peer_id: _trust(ledger, peer.peer_id) for peer in swarm.peers},
    )


def _trust(ledger: Ledger, peer_id: str) -> TrustDocument:
    score = ledger.score(peer_id)
    return TrustDocument(
        score.integrity, score.reliability, ledger.is_banned(peer_id), tuple(ledger.explain(peer_id))
    )
