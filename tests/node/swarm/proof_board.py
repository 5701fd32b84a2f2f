"""Hosts in memory that carry fraud proofs, and a board on which they publish notices of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import trio

from p2pinfer.node.evidence.store import EvidenceStore, serve_evidence
from p2pinfer.node.swarm.proof_gossip import Heard, Notice, ProofCarrier
from p2pinfer.reputation.proof import Accusation, Proof
from p2pinfer.reputation.receipt import NO_RECEIPT, RECEIPT_VERSION, Payload, Receipt, digest_of, sign_receipt

from ..memory import MemoryNetwork, sign

INPUT, OUTPUT = b"in" * 50_000, b"out" * 50_000


def proof_against(peer_id: str, output: bytes = OUTPUT) -> tuple[Proof, dict[bytes, Payload]]:
    """A chain of one receipt, and the tensors that it names."""
    digests = digest_of(INPUT), digest_of(output)
    receipt = Receipt(
        RECEIPT_VERSION,
        b"s" * 16,
        0,
        NO_RECEIPT,
        "r",
        0,
        1,
        0,
        1,
        1,
        0,
        "bfloat16",
        "bfloat16",
        *digests,
        b"n" * 16,
    )
    signed = sign_receipt(receipt, partial(sign, peer_id))
    return Proof(1, peer_id, "output", (signed,)), dict(zip(digests, (INPUT, output), strict=True))


class Board:
    """Passes notices on to whoever is there when they are published."""

    def __init__(self) -> None:
        self.carriers: dict[str, ProofCarrier] = {}

    async def publish_notice(self, author: str, notice: Notice) -> bytes:
        await trio.lowlevel.checkpoint()
        for peer_id, carrier in self.carriers.items():
            if peer_id != author:
                carrier.hear(Heard(notice, author, b"sealed"))
        return b"sealed"


class BoardOf:
    """One author's end of the board."""

    def __init__(self, board: Board, author: str) -> None:
        self._board, self._author = board, author

    async def publish_notice(self, notice: Notice) -> bytes:
        return await self._board.publish_notice(self._author, notice)


class Place:
    """Hosts with carriers on one board."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.network = MemoryNetwork(nursery)
        self.board = Board()

    def join(self, peer_id: str) -> ProofCarrier:
        host = self.network.host(peer_id)
        carrier = ProofCarrier(host, EvidenceStore(1 << 26, 900), BoardOf(self.board, peer_id))
        serve_evidence(host, carrier.store)
        self.board.carriers[peer_id] = carrier
        self.network.nursery.start_soon(carrier.serve)
        return carrier


class Judge:
    """Notes what it is shown, and says what it is told to."""

    def __init__(self, carrier: ProofCarrier, says: bool | None = True) -> None:
        self.seen: list[str] = []
        self._says = says
        self._changed = trio.Event()
        carrier.attach(self.look, lambda heard: True)

    async def look(
        self, heard: Heard, accusation: Accusation, contents: Mapping[bytes, Payload]
    ) -> bool | None:
        await trio.lowlevel.checkpoint()
        assert set(contents) == set(accusation.contents)
        self.seen.append(accusation.peer_id)
        self._changed.set()
        self._changed = trio.Event()
        return self._says

    async def wait_for(self, count: int) -> None:
        while len(self.seen) < count:
            await self._changed.wait()


async def until_told(carrier: ProofCarrier) -> None:
    while not carrier.records():
        await trio.lowlevel.checkpoint()
