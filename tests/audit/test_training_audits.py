"""Audits of trainings: which passes are run again, how often, and what becomes of who lies in gradients."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

import pytest
import trio
import trio.testing
from torch import Tensor

from p2pinfer.audit.running_means import LEARNT_FROM, RunningMeans
from p2pinfer.audit.training_audits import TrainingAudits
from p2pinfer.audit.verifier import Verifier
from p2pinfer.client_config import AuditConfig, TuneConfig
from p2pinfer.learning import second_pass
from p2pinfer.models.learning.span_passes import Gradients, SpanPasses
from p2pinfer.node.evidence.hop_record import HopRecord
from p2pinfer.node.evidence.pass_record import PassRecord
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.proof import Proof
from p2pinfer.reputation.receipt import NO_RECEIPT
from p2pinfer.reputation.train_receipt import NOTHING, TrainReceipt
from p2pinfer.reputation.verdict import Finding, Verdict

from ..node.memory_swarm import MemorySwarm, Served
from .audited_swarm import OpenClient
from .audited_swarm import open_client as open_client  # fixtures
from .audited_swarm import swarm as swarm

FIGURES: Mapping[str, float] = {}


def record_of(peer_id: str, number: int = 0, kind: Any = "backward") -> PassRecord:
    digest = number.to_bytes(32, "big")
    receipt = TrainReceipt(
        version=1,
        session=bytes(16),
        sequence=number,
        previous=NO_RECEIPT,
        revision="r",
        start=0,
        stop=2,
        kind=kind,
        tokens=8,
        dtype="float32",
        codec="float32",
        call=digest,
        adapter=NOTHING,
        input=digest,
        gradient=digest if kind == "backward" else NOTHING,
        output=digest,
        nonce=bytes(16),
    )
    return PassRecord(peer_id, b"signed", receipt, {})


class Judge(Verifier):
    """Says what it is told to, and takes as long as it is told to."""

    def __init__(self, says: Callable[[PassRecord], Verdict], each_s: float = 0.0) -> None:
        self.seen: list[tuple[str, int]] = []
        self._says = says
        self._each_s = each_s

    async def verify(self, record: HopRecord) -> Finding:
        raise AssertionError("a session")

    async def verify_pass(self, record: PassRecord) -> Finding:
        self.seen.append((record.peer_id, record.receipt.sequence))
        await trio.sleep(self._each_s)
        return Finding(self._says(record), "as it was told")


class Bench:
    """Audits whose ends are at hand."""

    def __init__(self, judge: Judge, opinions: Sequence[PassRecord] = (), **config: Any) -> None:
        self.ledger = Ledger()
        self.judge = judge
        self.noted: list[tuple[str, Verdict]] = []
        self.accused: list[str] = []
        self.audits = TrainingAudits(
            self.ledger,
            judge,
            AuditConfig(**config),
            lambda peer_id, finding: self.noted.append((peer_id, finding.verdict)),
            self.accuse,
            self.ask,
            clock=lambda: 1e9,
            stopwatch=trio.current_time,
            rng=random.Random(0),
        )
        self._opinions = opinions

    async def accuse(self, proof: Proof, contents: Mapping[bytes, bytes], why: str) -> None:
        await trio.lowlevel.checkpoint()
        self.accused.append(proof.peer_id)
        self.ledger.ban(proof.peer_id)

    async def ask(self, record: PassRecord, others: Sequence[str]) -> AsyncGenerator[PassRecord]:
        for each in self._opinions:
            yield each


def passing(_: PassRecord) -> Verdict:
    return Verdict.PASS


async def test_the_first_pass_of_each_hop_and_direction_is_audited_at_once(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    bench = Bench(Judge(passing, each_s=5.0), rate=1.0)
    nursery.start_soon(bench.audits.serve)
    began = trio.current_time()
    for peer_id in "abc":
        for kind in ("forward", "backward"):
            bench.audits.passed(record_of(peer_id, kind=kind), FIGURES)
    await bench.audits.settled()
    assert sorted(each for each, _ in bench.judge.seen) == [*"aabbcc"]
    assert trio.current_time() - began == pytest.approx(30.0)
    assert bench.noted == [(each, Verdict.PASS) for each, _ in bench.judge.seen]


async def test_later_audits_take_a_share_of_the_time(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    bench = Bench(Judge(passing, each_s=1.0), rate=1.0, training_share=0.1)
    nursery.start_soon(bench.audits.serve)
    for number in range(2000):  # ten a second
        bench.audits.passed(record_of("a", number), FIGURES)
        await trio.sleep(0.1)
    assert 19 <= len(bench.judge.seen) <= 22


async def test_every_pass_since_the_last_audit_is_as_likely_as_the_others(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """A hop that knew that the latest one is taken would be honest in the latest one alone."""
    bench = Bench(Judge(passing, each_s=1.0), rate=1.0, training_share=0.1)
    nursery.start_soon(bench.audits.serve)
    places: list[float] = []
    for number in range(10_000):
        bench.audits.passed(record_of("a", number), FIGURES)
        await trio.sleep(0.1)
    seen = [number for _, number in bench.judge.seen][1:]
    places = [(number - index * 100 - 10) / 100 for index, number in enumerate(seen)]
    assert 0.4 < sum(places) / len(places) < 0.6


async def test_the_coin_falls_as_the_ledger_says(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    bench = Bench(Judge(passing), rate=0.0)
    nursery.start_soon(bench.audits.serve)
    for number in range(50):
        bench.audits.passed(record_of("a", number), FIGURES)
    await trio.sleep(100)
    assert not bench.judge.seen


async def test_a_pass_that_strays_is_audited_whatever_the_coin_says(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    bench, rng = Bench(Judge(passing), rate=0.0), random.Random(1)
    nursery.start_soon(bench.audits.serve)
    for number in range(40):
        bench.audits.passed(record_of("a", number), {"length": 1 + 0.02 * rng.gauss(0, 1)})
    assert not bench.judge.seen
    for number in range(40, 50):
        bench.audits.passed(record_of("a", number), {"length": 0.9 + 0.02 * rng.gauss(0, 1)})
    await bench.audits.settled()
    assert bench.judge.seen


async def test_a_fail_bans_once_it_is_confirmed_and_convicts_those_that_failed_beside_it(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    liars = ("liar", "accomplice")
    opinions = [record_of("accomplice"), record_of("honest")]
    judge = Judge(lambda record: Verdict.FAIL if record.peer_id in liars else Verdict.PASS)
    bench = Bench(judge, opinions, rate=1.0)
    nursery.start_soon(bench.audits.serve)
    bench.audits.passed(record_of("liar"), FIGURES)
    await bench.audits.settled()
    assert bench.accused == ["liar", "accomplice"]
    assert bench.audits.is_banned("liar")
    assert not bench.audits.is_banned("honest")


async def test_where_everybody_fails_it_may_be_us(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    bench = Bench(Judge(lambda _: Verdict.FAIL), [record_of("other")], rate=1.0)
    nursery.start_soon(bench.audits.serve)
    bench.audits.passed(record_of("a"), FIGURES)
    await bench.audits.settled()
    assert bench.noted == [("a", Verdict.SUSPECT)]
    assert not bench.accused


async def test_what_a_second_look_does_not_repeat_bans_nobody(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    class Forgetful(Judge):
        async def confirm_pass(self, record: PassRecord) -> Finding:
            return Finding(Verdict.PASS, "it is in order")

    bench = Bench(Forgetful(lambda _: Verdict.FAIL), rate=1.0)
    nursery.start_soon(bench.audits.serve)
    bench.audits.passed(record_of("a"), FIGURES)
    await bench.audits.settled()
    assert bench.noted == [("a", Verdict.SUSPECT)]
    assert not bench.accused


# ---------------------------------------------------------------------- running means


def stray_after(change: Callable[[float], float], spread: float = 0.03, passes: int = 200) -> int | None:
    """How many passes after the hop has begun to lie one strays; None if none does."""
    means, rng = RunningMeans(), random.Random(0)
    for number in range(passes):
        value = 0.4 + spread * rng.gauss(0, 1)
        if number >= 3 * LEARNT_FROM:
            value = change(value)
        told = {"length": value}
        if means.strays("backward", told, asked=bytes([number]), output=bytes([number])):
            return number - 3 * LEARNT_FROM
    return None


def test_honest_passes_stray_seldom() -> None:
    assert sum(stray_after(lambda each: each, spread) is not None for spread in (0.001, 0.01, 0.1, 1.0)) == 0


def test_gradients_that_begin_to_be_scaled_stray_within_a_few_passes() -> None:
    after = stray_after(lambda each: each - 0.105)  # the logarithm of 0.9
    assert after is not None
    assert 0 <= after <= 5


def test_a_result_that_came_before_strays_at_once() -> None:
    means = RunningMeans()
    for number in range(3):
        assert not means.strays("backward", {}, asked=bytes([number]), output=bytes([number]))
    assert not means.strays("backward", {}, asked=bytes([1]), output=bytes([1]))  # the same pass again
    assert means.strays("backward", {}, asked=bytes([9]), output=bytes([1]))


# ---------------------------------------------------------------------- in a swarm


def lie_in_gradients(served: Served, change: Callable[[Tensor], Tensor]) -> None:
    """Let a peer return other gradients than those of its blocks, with true receipts."""
    passes: SpanPasses = vars(served.training)["_passes"]
    honest = passes.backward

    def backward(*args: Any, **options: Any) -> Any:
        found: Gradients = yield from honest(*args, **options)
        hidden = None if found.hidden is None else change(found.hidden)
        return Gradients(hidden, None if found.adapter is None else change(found.adapter))

    passes.backward = backward  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize("liar", ["a", "c"])
async def test_who_lies_in_gradients_is_banned_by_its_victim_and_by_strangers(
    swarm: MemorySwarm, open_client: OpenClient, monkeypatch: pytest.MonkeyPatch, liar: str
) -> None:
    """And training goes on over somebody else."""
    monkeypatch.setattr(second_pass, "open_host", second_host(swarm))
    spans = {"a": (0, 3), "b": (3, 5), "c": (5, 8), "d": (0, 8)}
    for name, span in spans.items():
        await swarm.serve(name, *span, tokens_per_s=1.0 if name == "d" else 100.0)
    lie_in_gradients(swarm.served[liar], lambda each: each * 0.9)
    tune = TuneConfig(rank=2, learning_rate=1e-3)
    async with open_client() as stranger, open_client() as client, client.tuner(tune) as tuner:
        batch = [
            tuner.example("", "Once upon a time there was a fox who had a red ball and a big dog."),
            tuner.example("", "Tom and Lily went to the park to play with a kite and a small boat."),
        ]
        await tuner.forward_backward(batch)
        await tuner.optim_step()
        assert liar in tuner.hops
        await client.audits_settled()
        assert client.ledger.is_banned(liar)
        assert not any(client.ledger.is_banned(name) for name in spans if name != liar)
        await tuner.forward_backward(batch)
        assert liar not in tuner.hops
        with trio.fail_after(30):
            while not stranger.ledger.is_banned(liar):
                await trio.sleep(0.01)
        [note] = stranger.ledger.proofs().values()
        assert note.state == "verified"
        assert not any(stranger.ledger.is_banned(name) for name in spans if name != liar)


def second_host(swarm: MemorySwarm) -> Any:
    from contextlib import asynccontextmanager

    @asynccontextmanager
    async def opened(identity: Any, *_: object) -> AsyncGenerator[Any]:
        yield swarm.network.host(identity.peer_id)

    return opened


async def test_a_proof_of_training_that_is_false_costs_its_author(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    """An honest hop's receipt, told of as a proof, bans nobody."""
    for name, span in {"a": (0, 3), "b": (3, 5), "c": (5, 8)}.items():
        await swarm.serve(name, *span)
    taken: list[PassRecord] = []
    async with open_client() as stranger, open_client(audit=AuditConfig(rate=0.0)) as client:
        assert client.training_watch is not None
        client.training_watch = replace_passed(client.training_watch, taken)
        async with client.tuner(TuneConfig(rank=2)) as tuner:
            await tuner.forward_backward(
                [tuner.example("", "Once upon a time there was a fox who had a red ball and a big dog.")]
            )
        record = next(each for each in taken if each.receipt.kind == "backward" and each.peer_id == "c")
        proof = Proof(1, "c", "training", (record.signed,), record.others)
        await client.member.proofs.publish(proof, record.contents)
        with trio.fail_after(30):
            while not stranger.ledger.proofs() or "seen" in {
                each.state for each in stranger.ledger.proofs().values()
            }:
                await trio.sleep(0.01)
        [note] = stranger.ledger.proofs().values()
        assert note.state == "false"
        assert not stranger.ledger.is_banned("c")


def replace_passed(watch: Any, taken: list[PassRecord]) -> Any:
    class Taking:
        def passed(self, record: PassRecord, figures: Mapping[str, float]) -> None:
            taken.append(record)

        def is_banned(self, peer_id: str) -> bool:
            return False

    return Taking()
