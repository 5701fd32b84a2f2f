"""State of the swarm as a page shows it: who serves what, how peers are reached and trusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import msgspec

from p2pinfer.json_documents import SwarmDocument, swarm_document
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.reputation.explain import standing
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.swarm_view import PeerView, SwarmView

MOST_BANS: Final = 100  # that a page is told of


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
    standing: str  # in a word or two
    why: tuple[str, ...]  # a sentence each


class ProofDocument(msgspec.Struct, frozen=True):
    """A fraud proof that accuses a peer."""

    address: str  # of its content
    sender: str  # empty: made here
    state: str  # verified, false or seen
    at: float  # seconds since 1970


class BanDocument(msgspec.Struct, frozen=True):
    """A peer that is never used, whether or not it serves anything."""

    peer_id: str
    by: str  # user, audits or proof
    why: str
    at: float  # seconds since 1970
    proofs: tuple[ProofDocument, ...]


class StateDocument(msgspec.Struct, frozen=True):
    """Swarm of a served model, and the trust in each of its peers, by peer id.

    `missing` in it goes by announcements, since nobody is called for a page.
    """

    models: tuple[str, ...]  # that this server answers with
    swarm: SwarmDocument
    trust: dict[str, TrustDocument]
    bans: tuple[BanDocument, ...]  # the latest first


def state_document(
    view: SwarmView, ledger: Ledger, kept: Ledger | None = None, models: Sequence[str] = ()
) -> StateDocument:
    """State as the view and the ledger have it. It may be called in a thread.

    Args:
        ledger: By which the peers are trusted.
        kept: Ledger on disk, where `ledger` is another one; its bans are told too.
        models: All that the server answers with.
    """
    swarm = swarm_document(view)
    announced = tuple((span.start, span.stop) for span in view.unannounced)
    return StateDocument(
        tuple(models),
        msgspec.structs.replace(swarm, missing=announced, unknown=()),
        {peer.peer_id: _trust(ledger, peer.peer_id) for peer in swarm.peers},
        _bans([ledger] if kept is None else [ledger, kept]),
    )


def _trust(ledger: Ledger, peer_id: str) -> TrustDocument:
    score = ledger.score(peer_id)
    return TrustDocument(
        score.integrity,
        score.reliability,
        ledger.is_banned(peer_id),
        standing(ledger.account(peer_id), ledger.config),
        tuple(ledger.explain(peer_id)),
    )


def _bans(ledgers: Sequence[Ledger]) -> tuple[BanDocument, ...]:
    told = {ban.peer_id: ban for ledger in ledgers for ban in _bans_of(ledger)}
    return tuple(sorted(told.values(), key=lambda ban: ban.at, reverse=True)[:MOST_BANS])


def _bans_of(ledger: Ledger) -> list[BanDocument]:
    banned = [(peer_id, account.ban) for peer_id, account in ledger.peers().items() if account.ban]
    latest = sorted(banned, key=lambda each: each[1].at, reverse=True)[:MOST_BANS]
    proofs: dict[str, list[ProofDocument]] = {peer_id: [] for peer_id, _ in latest}
    for address, note in ledger.proofs().items():
        if note.accused in proofs:
            proofs[note.accused].append(ProofDocument(address, note.sender, note.state, note.at))
    return [BanDocument(peer_id, ban.by, ban.why, ban.at, tuple(proofs[peer_id])) for peer_id, ban in latest]
