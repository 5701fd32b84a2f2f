"""Evidence that is missing, late or unfit: whose fault that is, and that it raises nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import trio
from trio.testing import MockClock

from p2pinfer.audit import evidence_source
from p2pinfer.audit.collect import HEAD_START_S, Collected, collect_record
from p2pinfer.audit.evidence_source import Line
from p2pinfer.errors import PeerUnreachable, PeerVanished, ProtocolViolation
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.evidence.store import ANSWER_S, LEAST_BYTES_PER_S
from p2pinfer.node.protocol.messages import Step
from p2pinfer.reputation.receipt import NO_RECEIPT, RECEIPT_VERSION, Receipt, digest_of, sign_receipt
from p2pinfer.routing.route import Hop
from p2pinfer.session.receipt_checks import PassedStep

from ..node.memory import MemoryNetwork, sign

SPANS = {"a": BlockSpan(0, 3), "b": BlockSpan(3, 5), "c": BlockSpan(5, 8)}
HOPS = tuple(Hop(name, span) for name, span in SPANS.items())
HIDDEN = 4


class Evidence:
    """A session of three hops, and what each of them holds of it."""

    def __init__(self, steps: int = 10) -> None:
        self.held: dict[str, dict[bytes, bytes]] = {name: {} for name in SPANS}
        self.delay_s: dict[str, float] = {}
        self.trickles = True  # hands out one piece an answer, if it delays them
        self.busy: dict[str, int] = {}  # how often it hangs up
        self.asks: list[str] = []
        self.errors: dict[str, Exception] = {}
        self._previous = dict.fromkeys(SPANS, NO_RECEIPT)
        self.steps = [self._passed(number) for number in range(steps)]

    def _passed(self, number: int) -> PassedStep:
        payloads = [torch.full((HIDDEN,), number + at / 8).numpy().tobytes() for at in range(4)]
        receipts = tuple(
            self.sign(name, number, payloads[at], payloads[at + 1]) for at, name in enumerate(SPANS)
        )
        return PassedStep(Step(number, 0, number, 1, 1), HOPS, payloads[0], payloads[-1], receipts)

    def sign(self, name: str, number: int, given: bytes, got: bytes, **lies: Any) -> bytes:
        """The hop's receipt for a step; what it names is held."""
        span = SPANS[name]
        said: dict[str, Any] = {
            "version": RECEIPT_VERSION, "session": b"s" * 16, "sequence": number,
            "previous": self._previous[name],
            "revision": "r" * 32, "start": span.start, "stop": span.stop, "position": number, "tokens": 1,
            "returned": 1, "epoch": 0, "dtype": "float32", "codec": "float32",
            "input": digest_of(given), "output": digest_of(got), "nonce": b"n" * 16,
        }  # fmt: skip
        signed = sign_receipt(Receipt(**{**said, **lies}), partial(sign, name))
        self._previous[name] = digest_of(signed)
        self.held[name] |= {digest_of(each): each for each in (given, got, signed)}
        return signed

    async def fetch(
        self, host: object, peer_id: str, digests: Sequence[bytes], *_: object, within_s: float, **__: Any
    ) -> dict[bytes, bytes]:
        """What `fetch_evidence` does, with a peer's delay for every piece."""
        self.asks.append(peer_id)
        if self.busy.get(peer_id, 0):
            self.busy[peer_id] -= 1
            raise PeerVanished("hung up", peer_id)
        if error := self.errors.get(peer_id):
            raise error
        delay_s = self.delay_s.get(peer_id, 0.0)
        with trio.move_on_after(within_s):
            await trio.sleep(delay_s)
            held = [each for each in digests if each in self.held[peer_id]]
            return {
                each: self.held[peer_id][each] for each in (held[:1] if delay_s and self.trickles else held)
            }
        raise PeerVanished("late", peer_id)

    async def gather(
        self, name: str = "b", steps: Sequence[PassedStep] | None = None, **options: Any
    ) -> Collected:
        async with trio.open_nursery() as nursery:
            network = MemoryNetwork(nursery)
            for each in options.pop("connected", SPANS):
                network.host(each)
            options = {"max_bytes": 1 << 20, "max_tokens": 64, **options}
            host = network.host("client")
            return await collect_record(host, self.steps if steps is None else steps, name, HIDDEN, **options)


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> Evidence:
    ours = Evidence()
    monkeypatch.setattr(evidence_source, "fetch_evidence", ours.fetch)
    return ours


@pytest.mark.parametrize("name", ["a", "b", "c"])
async def test_what_fits_is_a_record_and_nobodys_fault(evidence: Evidence, name: str) -> None:
    collected = await evidence.gather(name)
    assert collected.record is not None
    assert len(collected.record.receipts) == 10
    assert collected.fault == ""


@pytest.mark.parametrize("receipts", [(), (b"garbage",), (b"", b"", b""), (b"garbage", b"more", b"of it")])
async def test_unchecked_receipts_raise_nothing(evidence: Evidence, receipts: tuple[bytes, ...]) -> None:
    broken = PassedStep(evidence.steps[0].step, HOPS, b"", b"", receipts)
    for name in (*SPANS, "somebody else"):
        collected = await evidence.gather(name, [broken])
        assert collected.record is None
        assert bool(collected.fault) == (len(receipts) == 3 and name in SPANS)


async def test_tensors_of_another_size_than_the_receipts_say_are_the_hops_fault(evidence: Evidence) -> None:
    wrong = b"\0" * 12
    receipt = evidence.sign("b", 10, wrong, wrong)
    evidence.steps.append(PassedStep(Step(10, 0, 10, 1, 1), HOPS, b"", b"", (b"", receipt, b"")))
    collected = await evidence.gather()
    assert collected.record is None
    assert "fit" in collected.fault


async def test_a_hop_that_hands_out_nothing_is_at_fault_and_its_neighbours_are_asked(
    evidence: Evidence,
) -> None:
    evidence.held["b"].clear()
    collected = await evidence.gather()
    assert collected.record is not None  # a's outputs are b's inputs, and b's outputs are c's inputs
    evidence.held["c"].clear()
    collected = await evidence.gather()
    assert collected.record is None
    assert "withholds" in collected.fault
    later = await evidence.gather(is_fresh=False)
    assert later == Collected(None)  # it may have had to make room since


async def test_a_hop_that_trickles_pieces_is_late(evidence: Evidence, autojump_clock: MockClock) -> None:
    """Each piece came just in time, and all together never."""
    for name in "ac":
        evidence.held[name].clear()
    evidence.delay_s["b"] = ANSWER_S - 1
    began = trio.current_time()
    collected = await evidence.gather()
    assert collected.record is None
    assert "withholds" in collected.fault
    assert trio.current_time() - began < 2 * ANSWER_S
    assert evidence.asks.count("b") <= 3


async def test_a_hop_that_takes_its_time_is_not_waited_for_where_others_have_it_all(
    evidence: Evidence, autojump_clock: MockClock
) -> None:
    evidence.delay_s["b"] = 60.0
    began = trio.current_time()
    collected = await evidence.gather()
    assert collected.record is not None
    assert trio.current_time() - began <= HEAD_START_S


async def test_a_hop_on_a_slow_line_is_in_time(evidence: Evidence, autojump_clock: MockClock) -> None:
    """It hands out all that it is asked for in one answer, a second before that is due."""
    for name in "ac":
        evidence.held[name].clear()
    evidence.delay_s["b"] = ANSWER_S - 1
    evidence.trickles = False
    assert (await evidence.gather()).record is not None


async def test_what_may_be_our_own_line_is_nobodys_fault(
    evidence: Evidence, autojump_clock: MockClock
) -> None:
    """Nobody at all is connected any more."""
    for name in SPANS:
        evidence.errors[name] = PeerVanished("gone", name)
    assert await evidence.gather(connected=()) == Collected(None)
    gone = await evidence.gather(connected=("a", "c"))  # others are there, and it is not
    assert "withholds" in gone.fault


@pytest.mark.parametrize("whose", ["its own", "others'"])
async def test_a_line_that_is_busy_with_a_hops_own_bytes_is_no_excuse_for_it(
    evidence: Evidence, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    """It would only have to send fast enough, and hang up before the last byte."""
    line = Line()

    async def stream(
        host: object, peer_id: str, *_: object, within_s: float, on_bytes: Callable[[int], None], **__: object
    ) -> None:
        for _second in range(math.floor(within_s) if peer_id == "b" else 0):
            await trio.sleep(1.0)
            (on_bytes if whose == "its own" else line.note)(2 * LEAST_BYTES_PER_S)
        raise PeerVanished("the stream ended in the middle of evidence", "b")

    monkeypatch.setattr(evidence_source, "fetch_evidence", stream)
    assert bool((await evidence.gather(line=line)).fault) == (whose == "its own")


async def test_of_a_slow_hop_that_is_in_time_the_beginning_is_audited(
    evidence: Evidence, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Much evidence over a line that is just fast enough took longer than an audit has, and had no result."""
    monkeypatch.setattr(evidence_source, "PIECE_BYTES", 64)
    monkeypatch.setattr(evidence_source, "LEAST_BYTES_PER_S", 8)
    slow = Evidence(steps=40)
    monkeypatch.setattr(evidence_source, "fetch_evidence", slow.fetch)
    slow.trickles, slow.delay_s["b"] = False, 8.0
    for name in "ac":
        slow.held[name].clear()
    collected = await slow.gather()
    assert collected.record is not None and collected.fault == ""
    assert 8 <= len(collected.record.receipts) < 40
    assert trio.current_time() < 60
    slow.held["b"].clear()
    assert "withholds" in (await slow.gather()).fault


async def test_what_a_slow_hop_has_lost_meanwhile_is_its_fault_unless_it_is_out_of_reach(
    evidence: Evidence, autojump_clock: MockClock
) -> None:
    told: list[None] = []

    async def note() -> None:
        told.append(None)

    evidence.delay_s["b"] = 7.0
    for name in "ac":
        evidence.held[name].clear()
    await evidence.gather(on_slow=note)
    assert told == []
    evidence.delay_s["b"] = 60.0
    await evidence.gather(on_slow=note)
    assert told == [None]
    evidence.delay_s["b"] = 0.0
    evidence.held["b"].clear()
    assert "withholds" in (await evidence.gather(is_fresh=False, was_slow=True)).fault
    evidence.errors["b"] = PeerUnreachable("no address answered", "b")
    assert await evidence.gather(is_fresh=False, was_slow=True) == Collected(None)
    assert "withholds" in (await evidence.gather()).fault


async def test_a_hop_that_hangs_up_is_asked_again(evidence: Evidence, autojump_clock: MockClock) -> None:
    """It answers only so many at once, and others may keep it busy."""
    for name in "ac":
        evidence.held[name].clear()
    evidence.busy["b"] = 2
    assert (await evidence.gather()).record is not None
    evidence.busy["b"] = 9
    assert "withholds" in (await evidence.gather()).fault


async def test_a_wrong_answer_is_the_hops_fault_at_any_time(evidence: Evidence) -> None:
    evidence.held["a"].clear()
    evidence.held["c"].clear()
    evidence.errors["b"] = ProtocolViolation("not what was asked for", "b")
    assert (await evidence.gather()).fault


async def test_what_came_before_a_replay_that_nobody_sent_is_looked_at_by_a_coin(evidence: Evidence) -> None:
    """Or a hop could sign for the truth when an epoch begins, and its lies before that would not stand."""
    again = [torch.full((10, HIDDEN), float(value)).numpy().tobytes() for value in (7, 8)]
    evidence.sign("b", 10, *again, position=0, tokens=10, returned=10, epoch=1)
    payloads = [torch.full((HIDDEN,), float(value)).numpy().tobytes() for value in range(4)]
    signed = tuple(
        evidence.sign(name, 10 + (name == "b"), payloads[at], payloads[at + 1], position=10, epoch=1)
        for at, name in enumerate(SPANS)
    )
    evidence.steps.append(PassedStep(Step(10, 1, 10, 1, 1), HOPS, payloads[0], payloads[-1], signed))
    found: set[int] = set()
    for seed in range(12):
        collected = await evidence.gather("b", rng=random.Random(seed))
        assert collected.record is not None
        assert collected.fault == ""
        found.add(len(collected.record.receipts))
        assert collected.record.is_whole == (len(collected.record.receipts) == 10)
    assert found == {10, 11}


async def test_a_receipt_that_is_withheld_shields_nothing_before_it(evidence: Evidence) -> None:
    """What came before is audited, and that it is in order clears nobody of having withheld the rest."""
    payloads = [torch.full((HIDDEN,), float(value)).numpy().tobytes() for value in range(4)]
    evidence.held["b"].pop(digest_of(evidence.sign("b", 10, *payloads[:2], position=10)))
    signed = tuple(
        evidence.sign(name, 10 + (name == "b"), payloads[at], payloads[at + 1], position=10, epoch=1)
        for at, name in enumerate(SPANS)
    )
    evidence.steps.append(PassedStep(Step(10, 1, 10, 1, 1), HOPS, payloads[0], payloads[-1], signed))
    collected = await evidence.gather("b")
    assert collected.record is not None
    assert len(collected.record.receipts) == 11  # all that were seen
    assert collected.is_cut
    assert "not handed out" in collected.fault
    later = await evidence.gather("b", is_fresh=False)
    assert (later.is_cut, later.fault) == (True, "")
