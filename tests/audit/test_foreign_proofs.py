"""Fraud proofs about other models, or that our verifier breaks on: nobody is banned or charged for them."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
import pytest

from p2pinfer.audit.verifier import Verifier
from p2pinfer.errors import ProtocolViolation
from p2pinfer.node.evidence.hop_record import HopRecord
from p2pinfer.node.swarm.proof_gossip import Heard, Notice
from p2pinfer.reputation.proof import Accusation, Proof, open_proof
from p2pinfer.reputation.receipt import NO_RECEIPT, RECEIPT_VERSION, Receipt, digest_of, sign_receipt
from p2pinfer.reputation.verdict import Finding, Verdict

from ..node.memory import sign, verify
from ..node.memory_swarm import MemorySwarm
from .audited_swarm import OpenClient, auditor_of, open_client, swarm

__all__ = ["open_client", "swarm"]  # fixtures


@pytest.mark.parametrize("kind", ["output", "equivocation"])
async def test_a_proof_about_another_revision_is_neither_fetched_nor_believed(
    swarm: MemorySwarm, open_client: OpenClient, kind: Any
) -> None:
    """A neighbour's table tells of the proofs of all models; our weights say nothing about theirs."""

    class Gullible(Verifier):
        async def verify(self, record: HopRecord) -> Finding:
            return Finding(Verdict.FAIL, "not what our weights give")

    theirs = "f" * 32
    receipts = tuple(
        Receipt(
            RECEIPT_VERSION,
            bytes(16),
            0,
            NO_RECEIPT,
            theirs,
            3,
            5,
            0,
            9,
            9,
            0,
            "float32",
            "float32",
            output,
            output,
            bytes(16),
        )
        for output in (bytes(32), b"1" * 32)
    )
    accusation = Accusation("honest", kind, receipts, ())
    async with open_client(verifier=Gullible()) as client:
        auditor = auditor_of(client)
        for revision in (theirs, client.spec.revision):
            heard = Heard(Notice("proof", revision, bytes(32), "honest"), "anybody")
            assert await auditor.examiner.examine(heard, accusation, {}) is None
        assert not client.member.proofs.hear(Heard(Notice("proof", theirs, bytes(32), "honest"), "anybody"))
        assert not client.ledger.is_banned("honest")
        assert client.ledger.account("anybody").proofs_false == 0


@pytest.mark.parametrize("kind", ["output", "equivocation"])
def test_receipts_of_two_revisions_make_no_proof_about_one_of_them(kind: Any) -> None:
    """Nor does a chain become one of ours because its first receipt is."""
    base = Receipt(
        RECEIPT_VERSION, bytes(16), 0, NO_RECEIPT, "o" * 32, 3, 5, 0, 9, 9, 0,
        "float32", "float32", bytes(32), bytes(32), bytes(16),
    )  # fmt: skip
    first = sign_receipt(base, partial(sign, "b"))
    other = msgspec.structs.replace(base, revision="t" * 32)
    if kind == "output":
        other = msgspec.structs.replace(other, sequence=1, previous=digest_of(first), position=9)
    proof = Proof(1, "b", kind, (first, sign_receipt(other, partial(sign, "b"))))
    if kind == "output":
        with pytest.raises(ProtocolViolation, match="another session, model or span"):
            open_proof(proof, verify)
    else:  # it is one, of having signed twice; whoever holds either model leaves it alone
        assert {each.revision for each in open_proof(proof, verify).receipts} == {"o" * 32, "t" * 32}


async def test_receipts_with_an_adapter_are_no_proof_about_the_model_alone(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    """A client could open a session with an adapter of its own and show what came of it."""

    class Gullible(Verifier):
        async def verify(self, record: HopRecord) -> Finding:
            return Finding(Verdict.FAIL, "not what our weights give")

    async with open_client(verifier=Gullible()) as client:
        ours = client.spec.revision
        receipt = Receipt(
            RECEIPT_VERSION, bytes(16), 0, NO_RECEIPT, f"{ours}+{'a' * 16}", 3, 5, 0, 9, 9, 0,
            "float32", "float32", bytes(32), bytes(32), bytes(16),
        )  # fmt: skip
        accusation = Accusation("honest", "output", (receipt,), ())
        for revision in (ours, receipt.revision):
            heard = Heard(Notice("proof", revision, bytes(32), "honest"), "anybody")
            assert await auditor_of(client).examiner.examine(heard, accusation, {}) is None
        assert not client.ledger.is_banned("honest")


async def test_a_proof_that_our_verifier_breaks_on_is_nobodys_fault(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    class Broken(Verifier):
        async def verify(self, record: HopRecord) -> Finding:
            raise ZeroDivisionError

    async with open_client(verifier=Broken()) as client:
        receipt = Receipt(
            RECEIPT_VERSION, bytes(16), 0, NO_RECEIPT, client.spec.revision, 3, 5, 0, 9, 9, 0,
            "float32", "float32", bytes(32), bytes(32), bytes(16),
        )  # fmt: skip
        heard = Heard(Notice("proof", client.spec.revision, bytes(32), "peer"), "teller")
        accusation = Accusation("peer", "output", (receipt,), ())
        assert await auditor_of(client).examiner.examine(heard, accusation, {}) is None
        assert not client.ledger.is_banned("peer")
        assert client.ledger.account("teller").proofs_false == 0
