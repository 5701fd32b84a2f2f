"""Hops that get around audits: what they do not hand out, or break, costs them, and nobody else."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from p2pinfer.audit import collect, evidence_source
from p2pinfer.audit.backlog import ClosedSession
from p2pinfer.audit.local_verifier import LocalVerifier
from p2pinfer.client import Client
from p2pinfer.client_config import AuditConfig
from p2pinfer.errors import P2PInferError
from p2pinfer.node.evidence.hop_record import HopRecord
from p2pinfer.node.evidence.store import EVIDENCE_PROTOCOL
from p2pinfer.node.protocol.messages import Step
from p2pinfer.node.serve.receipt_signer import ReceiptSigner, SignedReceipt
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.reputation.receipt import NO_RECEIPT, RECEIPT_VERSION, Receipt, digest_of, sign_receipt
from p2pinfer.reputation.verdict import Finding
from p2pinfer.session.receipt_checks import PassedStep, ReceiptBook
from p2pinfer.session.session import Session

from ..node.memory import sign, verify
from ..node.memory_swarm import MemorySwarm, route_over
from ..session.receipt_chain import BREAKS_B, REVISION, SESSION, Chain
from .audited_swarm import ALWAYS, PROMPT, OpenClient, auditor_of, cheat, noisy, open_client, swarm, text_of

__all__ = ["open_client", "swarm"]  # fixtures

Attest = Callable[..., Any]
LATE_S = 0.4
HASTY = AuditConfig(rate=1.0, linger_s=0.001)  # whose clients leave their audits to the next one


async def serve_three(swarm: MemorySwarm) -> None:
    for name, start, stop in (("a", 0, 3), ("b", 3, 5), ("c", 5, 8)):
        await swarm.serve(name, start, stop)


def break_receipts(monkeypatch: pytest.MonkeyPatch, start: int, lie: Callable[[Step, bytes], bytes]) -> None:
    """Let the hop whose blocks begin at `start` hand on something else than its receipts."""

    async def attest(self: ReceiptSigner, step: Step, *rest: Any) -> SignedReceipt:
        said = await honest(self, step, *rest)
        if self._opening.start != start:  # pyright: ignore[reportPrivateUsage]
            return said
        return SignedReceipt(
            lie(step, said.receipt), said.receipt_digest, said.input_digest, said.output_digest
        )

    honest = ReceiptSigner.attest
    monkeypatch.setattr(ReceiptSigner, "attest", attest)


def closed_session(client: Client, *receipts: tuple[bytes, ...]) -> Session:
    """A session over a, b, c that a hop ended before these were checked."""
    route = route_over(a=(0, 3), b=(3, 5), c=(5, 8))
    book = ReceiptBook(secrets.token_bytes(16), client.spec.revision, "float32", verify, keep=True)
    for number, each in enumerate(receipts):
        book.unchecked.append(PassedStep(Step(number, 0, number, 1, 1), route.hops, b"", b"", each))
    said = SimpleNamespace(book=book, broken_receipt=None, route=route)
    return cast(Session, said)


async def until_kept(data_dir: Path, count: int, kind: str = "*.job") -> None:
    """Until so many audits are where the next client finds them."""
    while len(list((data_dir / "audits").glob(kind))) < count:
        await trio.sleep(0.01)


@pytest.mark.parametrize(
    ("receipts", "blamed"),
    [((), "c"), ((b"garbage",), "c"), ((b"garbage", b"", b"x" * 200), "c"), ((b"",) * 256, "c")],
)
async def test_unchecked_receipts_end_no_client_and_are_held_against_their_hop(
    swarm: MemorySwarm, open_client: OpenClient, receipts: tuple[bytes, ...], blamed: str
) -> None:
    await serve_three(swarm)
    async with open_client() as client:
        auditor_of(client).session_closed(closed_session(client, receipts, ()), frozenset("abc"))
        await client.audits_settled()
        assert [name for name in "abc" if client.ledger.account(name).failures] == [blamed]
        await text_of(client.generate(PROMPT, max_new_tokens=12))
        await client.audits_settled()
        assert client.audits.passed == 3  # it goes on auditing


async def test_a_receipt_that_is_between_two_neighbours_is_held_against_neither_of_them_alone(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    """Nor in the audits of what came before: b would evade them for what c did to its receipt."""
    async with open_client() as client:
        said = cast(Any, closed_session(client))
        said.book = ReceiptBook(SESSION, REVISION, "float32", verify, keep=True)
        chain = Chain()
        said.book.unchecked += [await chain.passed(), await chain.passed(BREAKS_B, at=1)]
        auditor = auditor_of(client)
        closed = ClosedSession(said.book, frozenset("abc"), was_told=False)
        jobs = await auditor._jobs_of(closed)  # pyright: ignore[reportPrivateUsage]
        assert {job.peer_id: job.fault for job in jobs} == dict.fromkeys("abc", "")
        charged = {name: client.ledger.account(name).bad for name in "abc"}
        assert charged == {"a": 0.0, "b": 0.5, "c": 0.5}


async def test_an_error_of_ours_ends_one_audit(
    swarm: MemorySwarm,
    open_client: OpenClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(self: LocalVerifier, record: HopRecord) -> Finding:
        if record.peer_id == "b":
            raise IndexError("tuple index out of range")
        return await honest(self, record)

    honest = LocalVerifier.verify
    monkeypatch.setattr(LocalVerifier, "verify", fail)
    await serve_three(swarm)
    async with open_client() as client:
        for _ in range(2):
            await text_of(client.generate(PROMPT, max_new_tokens=12))
            await client.audits_settled()
        assert client.audits.passed == 4
        assert client.ledger.account("b").withheld == 0
    assert "the audit of b could not be checked, for an error of our own" in caplog.text


@pytest.mark.parametrize("last", [False, True])
async def test_a_broken_receipt_shields_nothing_before_it(
    swarm: MemorySwarm, open_client: OpenClient, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    """Nor what the others did. The last one, or one in the middle, after which the hop refuses to go on."""
    await serve_three(swarm)
    cheat(swarm.served["b"], noisy)
    at = 4 + 24 - 2 if last else 18
    break_receipts(monkeypatch, 3, lambda step, said: said if step.position < at else said[:-1] + b"?")
    async with open_client() as client:
        try:
            await text_of(client.generate(PROMPT, max_new_tokens=24))
        except P2PInferError:
            assert not last
        await client.audits_settled()
        assert client.ledger.is_banned("b")
        assert all(client.ledger.account(name).passed for name in "ac")
        ban = client.ledger.account("b").ban
        assert ban is not None
        assert "deviates" in ban.why


async def test_receipts_that_begin_at_1_end_the_session_and_are_the_hops_failure(
    swarm: MemorySwarm, open_client: OpenClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a made-up receipt 0 of four billion tokens, every audit came to nothing, at no price."""

    def begin(self: ReceiptSigner, opening: Any, numerics: Any, signing: Any) -> None:
        honest(self, opening, numerics, signing)
        if opening.start == 3 and len(made_up) < 3:
            receipt = Receipt(
                RECEIPT_VERSION, opening.session, 0, NO_RECEIPT, opening.revision, 3, 5, 0, 2**32 - 1, 0, 0,
                "float32", opening.codec, bytes(32), bytes(32), self._nonce,  # pyright: ignore[reportPrivateUsage]
            )  # fmt: skip
            made_up.append(sign_receipt(receipt, partial(sign, "b")))
            self._sequence, self._previous = 1, digest_of(made_up[-1])  # pyright: ignore[reportPrivateUsage]

    made_up: list[bytes] = []
    honest = ReceiptSigner.__init__
    monkeypatch.setattr(ReceiptSigner, "__init__", begin)
    await serve_three(swarm)
    cheat(swarm.served["b"], noisy)
    async with open_client() as client:
        await text_of(client.generate(PROMPT, max_new_tokens=24))
        await client.audits_settled()
        notes = [note.text for note in client.ledger.account("b").notes]
        assert sum("begins at 1" in text for text in notes) >= len(made_up) > 0
        assert not client.ledger.account("a").failures


async def test_late_evidence_costs_its_hop_and_holds_up_no_other_audit(
    swarm: MemorySwarm, open_client: OpenClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence_source, "ANSWER_S", LATE_S)
    monkeypatch.setattr(evidence_source, "ASK_S", 0.0)
    await serve_three(swarm)
    answered = trio.Event()

    async def late(stream: PeerStream) -> None:
        answered.set()
        await trio.sleep_forever()

    for name in "ab":  # or a's outputs would be b's inputs
        swarm.network.hosts[name].serve(EVIDENCE_PROTOCOL, late)
    swarm.network.hosts["c"].handlers.pop(EVIDENCE_PROTOCOL)
    async with open_client() as client:
        await text_of(client.generate(PROMPT, max_new_tokens=12))
        with trio.fail_after(30):
            await client.audits_settled()
        assert answered.is_set()
        assert [client.ledger.account(name).withheld for name in "abc"] == [1, 1, 1]
        assert client.ledger.account("b").notes[-1].text.startswith("it withholds evidence: no evidence in")


async def test_what_a_client_could_not_finish_the_next_one_does(
    swarm: MemorySwarm, open_client: OpenClient, tmp_path: Path
) -> None:
    """A cheat whose evidence comes when the first client has left, is found by the second."""
    await serve_three(swarm)
    cheat(swarm.served["b"], noisy)
    held = {name: swarm.network.hosts[name].handlers[EVIDENCE_PROTOCOL] for name in "abc"}

    async def stall(stream: PeerStream) -> None:
        await trio.sleep_forever()

    for name in "abc":
        swarm.network.hosts[name].serve(EVIDENCE_PROTOCOL, stall)
    async with open_client(audit=HASTY, reputation=None) as client:
        await text_of(client.generate(PROMPT, max_new_tokens=24))
        await until_kept(tmp_path, 3)
    assert client.audits.done == 0
    assert len(list((tmp_path / "audits").glob("*.job"))) == 3
    for name in "abc":
        swarm.network.hosts[name].serve(EVIDENCE_PROTOCOL, held[name])
    async with open_client(audit=ALWAYS, reputation=None) as client:
        await text_of(client.generate(PROMPT, max_new_tokens=1))
        await client.audits_settled()
        assert client.ledger.is_banned("b")
        assert not any(client.ledger.is_banned(name) for name in "ac")
    assert list((tmp_path / "audits").iterdir()) == []


async def test_who_was_slow_with_one_client_and_is_silent_with_the_next_is_held_to_it(
    swarm: MemorySwarm, open_client: OpenClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a hop would outlast every command line by being slow, and refuse what comes later, at no price."""
    monkeypatch.setattr(collect, "ANSWER_S", 0.01)
    await serve_three(swarm)
    folder = tmp_path / "audits"

    async def stall(stream: PeerStream) -> None:
        await trio.sleep_forever()

    async def refuse(stream: PeerStream) -> None:
        await stream.aclose()

    for name in "abc":
        swarm.network.hosts[name].serve(EVIDENCE_PROTOCOL, stall)
    async with open_client(audit=HASTY, reputation=None) as client:
        await text_of(client.generate(PROMPT, max_new_tokens=24))
        await until_kept(tmp_path, 3, "*-slow.job")
    assert client.audits.done == 0
    for name in "abc":
        swarm.network.hosts[name].serve(EVIDENCE_PROTOCOL, refuse)
    async with open_client(audit=ALWAYS, reputation=None) as client:
        while client.audits.done < 3:
            await trio.sleep(0.01)
        assert [client.ledger.account(name).withheld for name in "abc"] == [1, 1, 1]
    assert not list(folder.glob("*.job"))


async def test_audits_of_our_own_nodes_are_left_to_nobody(
    swarm: MemorySwarm, open_client: OpenClient, tmp_path: Path
) -> None:
    await serve_three(swarm)
    for name in "abc":
        swarm.network.hosts[name].handlers.pop(EVIDENCE_PROTOCOL)
    async with open_client(audit=AuditConfig(rate=1.0, linger_s=0.1), reputation=None) as client:
        await client.keep_no_record()
        await text_of(client.generate(PROMPT, max_new_tokens=12))
    assert not list((tmp_path / "audits").glob("*"))


@pytest.mark.parametrize("are_our_own", [True, False])
async def test_left_over_audits_out_of_reach_wait_for_the_next_client_and_are_not_told_of(
    swarm: MemorySwarm, open_client: OpenClient, tmp_path: Path, are_our_own: bool
) -> None:
    """As when a swarm was in reach once, and nodes of our own stand in for it now."""
    await serve_three(swarm)
    held = {name: swarm.network.hosts[name].handlers[EVIDENCE_PROTOCOL] for name in "abc"}

    async def stall(stream: PeerStream) -> None:
        await trio.sleep_forever()

    for name in "abc":
        swarm.network.hosts[name].serve(EVIDENCE_PROTOCOL, stall)
    async with open_client(audit=HASTY, reputation=None) as client:
        await text_of(client.generate(PROMPT, max_new_tokens=24))
        await until_kept(tmp_path, 3)
    for name in "abc":
        swarm.network.hosts[name].handlers.pop(EVIDENCE_PROTOCOL)
    async with open_client(audit=HASTY, reputation=None) as client:
        if are_our_own:
            await client.keep_no_record()
        await client.audits_settled()
        assert client.audits.done == 0
    assert len(list((tmp_path / "audits").glob("*.job"))) == 3
    for name in "abc":
        swarm.network.hosts[name].serve(EVIDENCE_PROTOCOL, held[name])
    async with open_client(audit=ALWAYS, reputation=None) as client:
        with trio.fail_after(60):  # they are taken up beside whatever the client does
            while client.audits.passed < 3:
                await trio.sleep(0.02)
        await client.audits_settled()
        assert client.audits.passed == 3
    assert not list((tmp_path / "audits").glob("*.job"))
