"""Audits over a swarm in memory: who cheats is found out and banned, here and elsewhere; others are not."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import pytest
import trio
from torch import Tensor

from p2pinfer.audit import backlog
from p2pinfer.audit.auditor import Auditor, AuditTally
from p2pinfer.audit.local_verifier import BYTES_PER_WEIGHT, LocalVerifier
from p2pinfer.audit.verifier import Verifier
from p2pinfer.client_config import AuditConfig
from p2pinfer.node.evidence.hop_record import HopRecord
from p2pinfer.node.evidence.store import EVIDENCE_PROTOCOL
from p2pinfer.node.protocol.messages import Step
from p2pinfer.node.serve.receipt_signer import ReceiptSigner, SignedReceipt
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.reputation.ledger import Ledger, LedgerConfig
from p2pinfer.reputation.proof import Proof
from p2pinfer.reputation.receipt import decode_receipt, digest_of, sign_receipt
from p2pinfer.reputation.verdict import Finding, Verdict

from ..node.memory import sign
from ..node.memory_swarm import MemorySwarm, route_over
from .audited_swarm import ALWAYS, PROMPT, OpenClient, cheat, noisy, open_client, swarm, text_of

__all__ = ["open_client", "swarm"]  # fixtures


async def test_honest_hops_pass_wherever_they_are_in_the_route(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    for name, start, stop in (("a", 0, 3), ("b", 3, 5), ("c", 5, 8)):
        await swarm.serve(name, start, stop)
    async with open_client() as client:
        await text_of(client.generate(PROMPT, max_new_tokens=24))
        await client.audits_settled()
        assert client.audits == AuditTally(done=3, passed=3)
        assert {client.ledger.account(name).passed for name in "abc"} == {1}


@pytest.mark.parametrize("cheater", ["a", "b", "c"])
async def test_who_cheats_is_banned_by_its_victim_and_by_strangers(
    swarm: MemorySwarm, open_client: OpenClient, cheater: str
) -> None:
    for name, start, stop in (("a", 0, 3), ("b", 3, 5), ("c", 5, 8)):
        served = await swarm.serve(name, start, stop)
        if name == cheater:
            cheat(served, noisy)
    async with open_client() as stranger, open_client() as client:
        await text_of(client.generate(PROMPT, max_new_tokens=24))
        await client.audits_settled()
        assert (client.audits.done, client.audits.failed) == (3, 1)
        assert client.ledger.is_banned(cheater)
        assert not any(client.ledger.is_banned(name) for name in "abc" if name != cheater)
        with trio.fail_after(30):
            while not stranger.ledger.is_banned(cheater):
                await trio.sleep(0.01)
        assert stranger.audits.done == 0
        assert not any(stranger.ledger.is_banned(name) for name in "abc" if name != cheater)
        [note] = stranger.ledger.proofs().values()
        assert (note.accused, note.state) == (cheater, "verified")


async def test_a_second_opinion_is_asked_of_who_serves_the_same_blocks(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    cheat(await swarm.serve("a", 0, 8, tokens_per_s=1e5), noisy)
    await swarm.serve("b", 0, 8, tokens_per_s=1)
    async with open_client() as client:
        await text_of(client.generate(PROMPT, max_new_tokens=16))
        before = {(source, target) for source, target, _ in swarm.network.streams}
        await client.audits_settled()
        assert client.ledger.is_banned("a")
        askers = {source for source, target, _ in swarm.network.streams if target == "b"}
        assert askers and client.member.peer_id not in {*askers} - {source for source, _ in before}


async def test_a_fail_that_others_do_not_confirm_bans_nobody(
    swarm: MemorySwarm, open_client: OpenClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Say our own memory is broken: then everybody seems to cheat."""

    async def fail(self: LocalVerifier, record: HopRecord) -> Finding:
        return Finding(Verdict.FAIL, "it seems so")

    monkeypatch.setattr(LocalVerifier, "verify", fail)
    await swarm.serve("a", 0, 8)
    for others in (False, True):
        if others:
            await swarm.serve("b", 0, 8)
        async with open_client() as client:
            await text_of(client.generate(PROMPT, max_new_tokens=10))
            await client.audits_settled()
            done = client.audits.done  # more than one if a slow hop was replaced
            assert client.audits == AuditTally(done=done, suspect=done)
            assert done
            assert not client.ledger.is_banned("a")


async def test_two_who_lie_alike_do_not_cover_for_each_other(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    """Each is the other's second opinion; that somebody passed shows that it is not us who are wrong."""
    cheat(await swarm.serve("a", 0, 4, tokens_per_s=1e5), noisy)
    cheat(await swarm.serve("b", 0, 4, tokens_per_s=1), noisy)
    await swarm.serve("c", 4, 8)
    async with open_client() as client:
        for _ in range(2):
            if client.ledger.is_banned("a") and client.ledger.is_banned("b"):
                break
            await text_of(client.generate(PROMPT, max_new_tokens=16))
            await client.audits_settled()
        assert client.ledger.is_banned("a")
        assert client.ledger.is_banned("b")
        assert not client.ledger.is_banned("c")


async def test_an_honest_second_opinion_confirms_where_nobody_has_passed_before(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    cheat(await swarm.serve("a", 0, 8, tokens_per_s=1e5), noisy)
    cheat(await swarm.serve("b", 0, 8, tokens_per_s=1), noisy)
    await swarm.serve("c", 0, 8, tokens_per_s=1)
    async with open_client() as client:
        await text_of(client.generate(PROMPT, max_new_tokens=16))
        await client.audits_settled()
        assert client.ledger.is_banned("a")
        assert not client.ledger.is_banned("c")


async def test_of_a_long_session_the_beginning_is_checked(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    """By tokens, and by bytes; what comes after them may be anything."""
    late = 0

    def lie_later(output: Tensor) -> Tensor:
        nonlocal late
        late += len(output)
        return output if late <= 30 else noisy(output)

    cheat(await swarm.serve("a", 0, 8), lie_later)
    rows = 320 * 4
    limits = (
        AuditConfig(rate=1.0, linger_s=60, max_tokens=20, evidence_bytes=1 << 20),
        AuditConfig(rate=1.0, linger_s=60, evidence_bytes=20 * rows),
        AuditConfig(rate=1.0, linger_s=60, evidence_bytes=2 * rows),
        AuditConfig(rate=1.0, linger_s=60),
    )
    seen: list[AuditTally] = []
    for audit in limits:
        late = 0
        async with open_client(audit=audit) as client:
            await text_of(client.generate(PROMPT, max_new_tokens=60))
            await client.audits_settled()
            seen.append(client.audits)
    passed, inconclusive = AuditTally(done=1, passed=1), AuditTally(done=1, inconclusive=1)
    assert seen == [passed, passed, inconclusive, AuditTally(done=1, failed=1)]


@pytest.mark.parametrize(
    "audit", [replace(ALWAYS, max_tokens=20), replace(ALWAYS, evidence_bytes=20 * 320 * 4)]
)
async def test_a_session_that_is_longer_than_what_may_wait_is_audited_all_the_same(
    swarm: MemorySwarm, open_client: OpenClient, monkeypatch: pytest.MonkeyPatch, audit: AuditConfig
) -> None:
    """Or who lies in the longest sessions alone is never found."""
    monkeypatch.setattr(backlog, "MAX_WAITING_BYTES", 60 * 320 * 4)
    cheat(await swarm.serve("a", 0, 8), noisy)
    async with open_client(audit=audit) as client:
        await text_of(client.generate(PROMPT, max_new_tokens=60))
        await client.audits_settled()
        assert client.ledger.is_banned("a")


async def test_what_waits_to_be_audited_is_bounded(
    swarm: MemorySwarm, open_client: OpenClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog, "MAX_WAITING_BYTES", 1000)
    await swarm.serve("a", 0, 8)
    async with open_client() as client:
        await text_of(client.generate(PROMPT, max_new_tokens=8))
        await client.audits_settled()
        assert client.audits == AuditTally()


async def test_what_can_be_looked_at_by_norms_alone_clears_nobody_of_a_proof(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    """The accuser may have seen in the logits what a verifier without room for the model does not."""
    await swarm.serve("a", 0, 4)
    await swarm.serve("b", 4, 8)
    seen: list[HopRecord] = []

    class Note(Verifier):
        async def verify(self, record: HopRecord) -> Finding:
            seen.append(record)
            return Finding(Verdict.PASS, "")

    small = AuditConfig(rate=0.0, memory_bytes=4 * swarm.spec.block_parameters * BYTES_PER_WEIGHT)
    async with open_client(verifier=Note()) as accuser, open_client(audit=small) as client:
        await text_of(accuser.generate(PROMPT, max_new_tokens=16))
        await accuser.audits_settled()
        record = next(each for each in seen if each.peer_id == "a")
        address = await accuser.member.proofs.publish(Proof(1, "a", "output", record.signed), record.contents)
        await accuser.member.proofs.handed_out(address)
        while not client.member.proofs.records():
            await trio.sleep(0.01)
        with trio.move_on_after(1):
            while client.ledger.proofs()[address.hex()].state == "seen":
                await trio.sleep(0.01)
        assert client.ledger.proofs()[address.hex()].state == "seen"
        assert client.ledger.account(accuser.member.peer_id).proofs_false == 0


async def test_evidence_that_is_withheld_costs_reliability_and_hides_nothing(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    await swarm.serve("a", 0, 3)
    cheat(await swarm.serve("b", 3, 5), noisy)
    await swarm.serve("c", 5, 8)

    async def refuse(stream: PeerStream) -> None:
        await stream.aclose()

    swarm.network.hosts["b"].serve(EVIDENCE_PROTOCOL, refuse)
    async with open_client() as client:
        await text_of(client.generate(PROMPT, max_new_tokens=24))
        await client.audits_settled()
        assert client.ledger.is_banned("b")  # its neighbours have what it took in and gave out


async def test_who_withholds_what_only_it_has_is_relied_on_less(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    for name, start, stop in (("a", 0, 3), ("b", 3, 5), ("c", 5, 8)):
        await swarm.serve(name, start, stop)
    for name in "abc":
        swarm.network.hosts[name].handlers.pop(EVIDENCE_PROTOCOL)
    async with open_client() as client:
        await text_of(client.generate(PROMPT, max_new_tokens=12))
        await client.audits_settled()
        assert client.audits == AuditTally(done=3, inconclusive=3)
        assert all(client.ledger.account(name).withheld == 1 for name in "abc")
        newcomer = client.ledger.score("nobody").reliability
        assert all(client.ledger.score(name).reliability < newcomer for name in "abc")


async def test_a_rate_of_zero_keeps_and_checks_nothing(swarm: MemorySwarm, open_client: OpenClient) -> None:
    await swarm.serve("a", 0, 8)
    async with open_client(audit=AuditConfig(rate=0.0)) as client:
        await text_of(client.generate(PROMPT, max_new_tokens=4))
        await client.audits_settled()
        assert client.audits == AuditTally()


async def test_the_ledger_says_how_often_where_no_rate_is_set(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    await swarm.serve("a", 0, 8)
    async with open_client(audit=AuditConfig()) as client:
        auditor = Auditor(
            client.member,
            client.spec,
            client.ledger,
            LocalVerifier(client._source),  # pyright: ignore[reportPrivateUsage]
            AuditConfig(),
            rng=random.Random(1),
            blame=lambda _: None,
        )
        await text_of(client.generate(PROMPT, max_new_tokens=1))
        for _ in range(60):
            client.ledger.record_audit("known", Verdict.PASS, 0.0)
        tossed = [auditor.toss(route_over(known=(0, 3), new=(3, 8))) for _ in range(400)]
        known, new = (sum(name in each for each in tossed) / 400 for name in ("known", "new"))
        assert known < 0.1 < 0.5 < new


@pytest.mark.parametrize("cheater", ["b", "c", ""])
async def test_what_a_glance_does_not_pass_is_measured_and_convicted(
    swarm: MemorySwarm, open_client: OpenClient, monkeypatch: pytest.MonkeyPatch, cheater: str
) -> None:
    measured: list[str] = []
    verify = LocalVerifier.verify

    async def note(self: LocalVerifier, record: HopRecord) -> Finding:
        measured.append(record.peer_id)
        return await verify(self, record)

    monkeypatch.setattr(LocalVerifier, "verify", note)
    for name, start, stop in (("a", 0, 3), ("b", 3, 5), ("c", 5, 8)):
        served = await swarm.serve(name, start, stop)
        if name == cheater:
            cheat(served, noisy)
    glances = Ledger(LedgerConfig(first_full_audits=0, full_audit_share=0.0))
    async with open_client(audit=AuditConfig(linger_s=60.0), reputation=glances) as client:
        await text_of(client.generate(PROMPT, max_new_tokens=24))
        await client.audits_settled()
        assert client.audits.done == 3
        assert client.audits.failed == bool(cheater)
        assert measured == [cheater] * bool(cheater)
        assert [name for name in "abc" if client.ledger.is_banned(name)] == [cheater] * bool(cheater)


async def test_a_proof_that_proves_nothing_costs_its_sender(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    """An honest chain, published as if it were a lie."""
    await swarm.serve("a", 0, 8)
    seen: list[HopRecord] = []

    class Note(Verifier):
        async def verify(self, record: HopRecord) -> Finding:
            seen.append(record)
            return Finding(Verdict.PASS, "")

    async with open_client(verifier=Note()) as liar, open_client() as client:
        await text_of(liar.generate(PROMPT, max_new_tokens=16))
        await liar.audits_settled()
        [record] = seen
        address = await liar.member.proofs.publish(Proof(1, "a", "output", record.signed), record.contents)
        with trio.fail_after(30):
            while client.ledger.account(liar.member.peer_id).proofs_false == 0:
                await trio.sleep(0.01)
        assert not client.ledger.is_banned("a")
        assert client.ledger.proofs()[address.hex()].state == "false"
        again = await liar.member.proofs.publish(Proof(1, "a", "output", record.signed[:-1]), record.contents)
        assert again.hex() not in client.ledger.proofs()


async def test_equivocation_is_proved_without_running_anything(
    swarm: MemorySwarm, open_client: OpenClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def repeat(
        self: ReceiptSigner, step: Step, received: Any, sent: Any, returned: int
    ) -> SignedReceipt:
        said = await honest(self, step, received, sent, returned)
        receipt = msgspec.structs.replace(decode_receipt(said.receipt), sequence=min(step.number, 2))
        signed = sign_receipt(receipt, partial(sign, "a"))
        return SignedReceipt(signed, digest_of(signed), said.input_digest, said.output_digest)

    honest = ReceiptSigner.attest
    monkeypatch.setattr(ReceiptSigner, "attest", repeat)
    await swarm.serve("a", 0, 8)
    async with open_client(verifier=None) as stranger, open_client() as client:
        await text_of(client.generate(PROMPT, max_new_tokens=8))
        await client.audits_settled()
        assert client.ledger.is_banned("a")
        with trio.fail_after(30):
            while not stranger.ledger.is_banned("a"):
                await trio.sleep(0.01)
