"""A FAIL is confirmed before it counts, and does not get lost where those that are asked are slow."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from p2pinfer.audit import judge as judge_module
from p2pinfer.audit.draw import AuditDraw
from p2pinfer.audit.judge import Judge
from p2pinfer.audit.verifier import Verifier
from p2pinfer.client_config import AuditConfig
from p2pinfer.errors import PeerError
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.evidence.hop_record import HopRecord
from p2pinfer.node.host_config import HostConfig
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.verdict import Finding, Verdict
from p2pinfer.routing.route import Hop

from ..node.memory_swarm import MemorySwarm
from ..threads import do_without_threads
from .audited_swarm import PROMPT, OpenClient, auditor_of, open_client, swarm, text_of
from .test_examiner import accusation_of

__all__ = ["open_client", "swarm"]  # fixtures

CONFIG = AuditConfig()


class Says(Verifier):
    """Gives the verdict that a peer's name is."""

    async def verify(self, record: HopRecord) -> Finding:
        return Finding(Verdict(record.peer_id.rpartition(" ")[0]), "as its name says")


class Asked:
    """Peers that are asked for a second opinion, each of which takes so long."""

    def __init__(self, *peers: tuple[str, float]) -> None:
        self.peers = dict(peers)

    def choose(self, *_: object) -> list[Hop]:
        return [Hop(name, BlockSpan(0, 3)) for name in self.peers]

    async def run(self, hop: Hop, *_: object, timeout_s: float, **__: object) -> HopRecord:
        with trio.move_on_after(timeout_s):
            await trio.sleep(self.peers[hop.peer_id])
            return record_of(hop.peer_id)
        raise PeerError("no second opinion", hop.peer_id)


def nothing(*_: object) -> tuple[()]:
    return ()


def record_of(peer_id: str) -> HopRecord:
    accusation = accusation_of(peer_id)
    return HopRecord(peer_id, accusation.signed, accusation.receipts, {})


async def judged(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, peers: Sequence[tuple[str, float]]
) -> Verdict:
    asked = Asked(*peers)
    monkeypatch.setattr(judge_module, "choose_auditors", asked.choose)
    monkeypatch.setattr(judge_module, "run_elsewhere", asked.run)
    for name in ("history_of", "draw_successors"):
        monkeypatch.setattr(judge_module, name, nothing)
    do_without_threads(monkeypatch)
    member: Any = SimpleNamespace(announcements=nothing, peer_id="us")
    ledger, rng = Ledger(), random.Random(1)
    draw = AuditDraw(ledger, CONFIG, lambda: 0.0, rng)
    judge = Judge(member, checkpoint.spec, ledger, Says(), CONFIG, draw, host_config=HostConfig(), rng=rng)
    failing: list[None] = []
    finding, _ = await judge.judge(record_of("fail 0"), (), lambda: failing.append(None))
    assert failing
    return finding.verdict


@pytest.mark.parametrize("friends", [1, 4])
async def test_friends_that_do_not_answer_save_nobody(
    friends: int, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, autojump_clock: MockClock
) -> None:
    """Four of them took as long as an audit had, and a FAIL that had been found was none."""
    peers = [(f"suspect {number}", 1e9) for number in range(friends)]
    assert await judged(monkeypatch, checkpoint, peers) is Verdict.FAIL
    assert trio.current_time() <= CONFIG.timeout_s / 2


async def test_who_is_slow_keeps_no_honest_opinion_from_counting(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, autojump_clock: MockClock
) -> None:
    """As long as nobody has passed, those that fail as well speak against this side."""
    peers = [("fail 1", 1.0), ("suspect 2", 1e9), ("pass 3", 1.0)]
    assert await judged(monkeypatch, checkpoint, peers) is Verdict.FAIL
    assert await judged(monkeypatch, checkpoint, peers[:2]) is Verdict.SUSPECT


async def test_a_client_does_not_leave_while_a_fail_is_being_confirmed(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    """Whoever is asked to confirm it would only have to take longer than a command line."""

    class Slow(Verifier):
        def __init__(self) -> None:
            self.begun, self.go_on = trio.Event(), trio.Event()

        async def verify(self, record: HopRecord) -> Finding:
            return Finding(Verdict.FAIL, "it seems so")

        async def confirm(self, record: HopRecord) -> Finding:
            self.begun.set()
            await self.go_on.wait()
            return Finding(Verdict.FAIL, "it is so")

    slow = Slow()
    await swarm.serve("a", 0, 8)
    async with open_client(verifier=slow) as client, trio.open_nursery() as nursery:
        await text_of(client.generate(PROMPT, max_new_tokens=8))
        await slow.begun.wait()
        left = trio.Event()

        async def leave() -> None:
            await auditor_of(client).linger(0.0)
            left.set()

        nursery.start_soon(leave)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not left.is_set()
        slow.go_on.set()
        await left.wait()
        assert client.ledger.is_banned("a")
