"""What others' proofs may cost is bounded before it is paid, and audits of our own come first."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
import trio

from p2pinfer.audit.examination_budget import BURST_S, TELLERS_PART, ExaminationBudget
from p2pinfer.audit.examiner import OWN_FIRST_S, Examiner
from p2pinfer.audit.verifier import Verifier
from p2pinfer.client_config import AuditConfig
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.node.evidence.hop_record import HopRecord
from p2pinfer.node.swarm.proof_gossip import Heard, Notice
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.proof import Accusation
from p2pinfer.reputation.receipt import NO_RECEIPT, RECEIPT_VERSION, Receipt
from p2pinfer.reputation.verdict import Finding, Verdict

NOW = 1e9


def test_a_share_of_the_time_is_spent_and_no_more_however_many_proofs_come() -> None:
    budget, now, spent = ExaminationBudget(0.05, 1_000_000, 0.0), 0.0, 0.0
    for number in range(36_000):  # ten a second for an hour, each by another teller
        now = number / 10
        if budget.affords(f"teller{number}", 100, now):
            budget.pay(f"teller{number}", 100, 0.5, now)
            spent += 0.5
    assert spent <= BURST_S + 0.05 * 3600 + 0.5


def test_one_teller_takes_a_part_of_it_and_leaves_the_rest() -> None:
    budget, spent = ExaminationBudget(0.05, 1_000_000, 0.0), 0.0
    while budget.affords("busy", 100, 0.0):
        budget.pay("busy", 100, 0.5, 0.0)
        spent += 0.5
    assert spent == pytest.approx(TELLERS_PART * BURST_S, abs=1.0)
    assert budget.affords("another", 100, 0.0)


def test_what_a_proof_took_tells_what_the_next_one_will() -> None:
    budget = ExaminationBudget(0.05, 1_000_000, 0.0)
    first = budget.price_s(1000)
    for _ in range(20):
        budget.pay("teller", 1000, 100 * first, 0.0)
    assert budget.price_s(1000) == pytest.approx(100 * first, rel=0.01)


def test_a_proof_that_is_dearer_than_the_bucket_holds_waits_until_it_is_full() -> None:
    budget = ExaminationBudget(0.05, 1_000_000, 0.0)
    huge = round(1000 * BURST_S / budget.price_s(1))
    assert budget.affords("teller", huge, 0.0)
    budget.pay("teller", huge, 3 * BURST_S, 0.0)
    assert not budget.affords("another", 1, 60.0)  # what was too much is owed
    assert budget.affords("another", 1, 3600.0)


class Judge(Verifier):
    """Says what it is told to, and takes as long as it is told to."""

    def __init__(self, says: Verdict = Verdict.FAIL, *, each_s: float = 0.0) -> None:
        self.seen: list[str] = []
        self._says = says
        self._each_s = each_s

    async def verify(self, record: HopRecord) -> Finding:
        self.seen.append(record.peer_id)
        await trio.sleep(self._each_s)
        return Finding(self._says, "as it was told")

    def is_thorough(self, finding: Finding) -> bool:
        return True


def accusation_of(peer_id: str, tokens: int = 32) -> Accusation:
    digests = bytes(32), bytes(32)
    receipt = Receipt(
        RECEIPT_VERSION,
        b"s" * 16,
        0,
        NO_RECEIPT,
        "r",
        0,
        3,
        0,
        tokens,
        tokens,
        0,
        "float32",
        "float32",
        *digests,
        b"n" * 16,
    )
    return Accusation(peer_id, "output", (receipt,), (b"signed",))


Examine = Callable[[str, str], Awaitable[bool | None]]


class Place:
    """An examiner with a ledger, on trio's clock."""

    def __init__(self, checkpoint: Checkpoint, judge: Judge) -> None:
        self.ledger = Ledger()
        self.own_done = trio.Event()
        self.own_done.set()
        self.judge = judge
        self.examiner = Examiner(
            replace(checkpoint.spec, revision="r"),
            self.ledger,
            judge,
            AuditConfig(),
            self.own_done.wait,
            clock=lambda: NOW + trio.current_time(),
            stopwatch=trio.current_time,
        )

    async def examine(self, accused: str, sender: str, tokens: int = 32) -> bool | None:
        """Look at a proof, if its notice is wanted."""
        heard = Heard(Notice("proof", "r", accused.encode().ljust(32, b"."), accused), sender)
        if not self.examiner.is_wanted(heard):
            return None
        return await self.examiner.examine(heard, accusation_of(accused, tokens), {})


async def test_heavy_self_accusations_take_a_share_of_the_time_and_a_true_proof_gets_through(
    checkpoint: Checkpoint, autojump_clock: trio.testing.MockClock
) -> None:
    """Of 17 to 55 KB each, they cost an examiner 1 to 7 s."""
    place = Place(checkpoint, Judge(each_s=3.0))
    place.ledger.record_success("liar", NOW)
    for number in range(400):
        await place.examine(f"own{number}", f"sender{number}", tokens=2048)
        await trio.sleep(0.5)
    spent = 3.0 * len(place.judge.seen)
    assert spent <= BURST_S + 3.0 + 0.05 * trio.current_time()
    assert await place.examine("liar", "a stranger") is True
    assert place.ledger.is_banned("liar")


async def test_no_proof_is_run_while_an_audit_of_our_own_waits(
    checkpoint: Checkpoint, autojump_clock: trio.testing.MockClock
) -> None:
    place = Place(checkpoint, Judge())
    place.own_done = trio.Event()
    spec = replace(checkpoint.spec, revision="r")
    place.examiner = Examiner(
        spec, place.ledger, place.judge, AuditConfig(), place.own_done.wait, clock=lambda: NOW
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(place.examine, "liar", "sender")
        await trio.sleep(OWN_FIRST_S / 2)
        assert place.judge.seen == []
        place.own_done.set()
    assert place.judge.seen == ["liar"]


@pytest.mark.parametrize(
    ("says", "state"), [(Verdict.FAIL, "verified"), (Verdict.PASS, "false"), (Verdict.SUSPECT, "seen")]
)
async def test_the_ledger_hears_what_a_proof_was_worth(
    says: Verdict, state: str, checkpoint: Checkpoint
) -> None:
    place = Place(checkpoint, Judge(says))
    await place.examine("accused", "sender")
    [note] = place.ledger.proofs().values()
    assert note.state == state
    assert place.ledger.is_banned("accused") == (state == "verified")


async def test_what_others_used_up_meanwhile_is_not_spent_again(checkpoint: Checkpoint) -> None:
    """Sixty notices may be taken in before the first of them is checked."""
    place = Place(checkpoint, Judge())
    heard = [
        Heard(Notice("proof", "r", b"%032d" % number, f"own{number}"), f"sender{number}")
        for number in range(100)
    ]
    assert all(map(place.examiner.is_wanted, heard))
    for each in heard:
        await place.examiner.examine(each, accusation_of(each.notice.accused), {})
    assert len(place.judge.seen) == 60
