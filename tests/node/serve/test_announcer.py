"""What a node announces and when, on trio's clock over a swarm in memory."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
import trio.testing

from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.runner import SpanRunner, open_runner
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.serve.announcer import TOPIC_PER_S, Announcer, announce_interval_s, announce_ttl_s
from p2pinfer.node.serve.decode_speed import DecodeSpeed
from p2pinfer.routing.announcement import MAX_TTL_S, decode_announcement, encode_announcement

from ..memory_swarm import FLOAT32, MemorySwarm, open_memory_swarm

GAP_S, INTERVAL_S = 5.0, 60.0


@pytest.fixture
def runner(checkpoint: Checkpoint) -> SpanRunner:
    return open_runner(checkpoint, BlockSpan(2, 4), FLOAT32)


@asynccontextmanager
async def open_announcer(
    checkpoint: Checkpoint, runner: SpanRunner
) -> AsyncGenerator[tuple[Announcer, MemorySwarm]]:
    async with open_memory_swarm(checkpoint, limit_s=3600) as swarm:
        config = ServeConfig(announce_interval_s=INTERVAL_S, announce_min_gap_s=GAP_S, announce_ttl_s=99.0)
        yield Announcer(swarm.member("a"), checkpoint.spec, runner, DecodeSpeed(12.5), config), swarm


async def test_an_announcement_says_what_is_so_at_the_moment(
    checkpoint: Checkpoint, runner: SpanRunner
) -> None:
    async with open_announcer(checkpoint, runner) as (announcer, swarm):
        runner.cache.reserve(64)
        said = announcer.announcement()
        assert (said.peer_id, said.addrs) == ("a", ("/memory/a",))
        assert (said.model, said.revision) == ("tiny-stories", swarm.spec.revision)
        assert (said.span, said.dtype, said.tokens_per_s) == (BlockSpan(2, 4), "float32", 12.5)
        assert said.free_cache_tokens == runner.cache.capacity_tokens - 64
        assert said.ttl_s == 99.0
        assert said.coordinate is not None
        assert not said.leaving


@pytest.mark.parametrize(("name", "told"), [("two\nlines", "two lines"), ("x" * 300, "x" * 256), ("", "?")])
async def test_whatever_a_model_and_a_network_are_called_peers_accept_it(
    name: str, told: str, checkpoint: Checkpoint, runner: SpanRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        member = swarm.member("a")
        monkeypatch.setattr(member.host, "addrs", tuple(f"/ip4/10.0.0.{n}/tcp/1" for n in range(40)))
        announcer = Announcer(
            member, replace(checkpoint.spec, model=name), runner, DecodeSpeed(1.0), ServeConfig()
        )
        announcement = decode_announcement(encode_announcement(announcer.announcement()))
    assert announcement.model == told
    assert announcement.addrs == member.addrs[:16]


async def test_each_announcement_outdoes_the_one_before_whatever_the_wall_clock_does(
    checkpoint: Checkpoint, runner: SpanRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences: list[int] = []
    monkeypatch.setattr("time.time", lambda: 1000.0)
    async with open_announcer(checkpoint, runner) as (announcer, _):
        for wall_clock in (1000.0, 1000.0, 2.0, 2000.0):
            monkeypatch.setattr("time.time", lambda now=wall_clock: now)
            sequences.append(announcer.announcement().sequence)
    assert sequences == list(range(sequences[0], sequences[0] + 4))


async def test_what_others_hold_in_a_node_s_name_has_it_announce_above_that_at_once(
    checkpoint: Checkpoint, runner: SpanRunner, mock_clock: trio.testing.MockClock
) -> None:
    async with open_memory_swarm(checkpoint, limit_s=3600) as swarm, trio.open_nursery() as nursery:
        member = swarm.member("a")
        announcer = Announcer(
            member, checkpoint.spec, runner, DecodeSpeed(12.5), ServeConfig(announce_interval_s=INTERVAL_S)
        )
        await announcer.announce()
        nursery.start_soon(announcer.keep_fresh)
        await trio.testing.wait_all_tasks_blocked()
        held = member.sequence.last + 10**9
        member.sequence.overtaken(held)
        while len(swarm.gossip.announced) < 2:  # the count is kept on disk by a thread first
            await trio.lowlevel.checkpoint()
        assert [said.sequence for said in swarm.gossip.announced][1:] == [held + 1]
        nursery.cancel_scope.cancel()


async def test_an_announcement_says_what_process_makes_it_and_whom_it_suspects(
    checkpoint: Checkpoint, runner: SpanRunner, mock_clock: trio.testing.MockClock
) -> None:
    async with open_memory_swarm(checkpoint, limit_s=3600) as swarm:
        member = swarm.member("a")
        announcer = Announcer(member, checkpoint.spec, runner, DecodeSpeed(12.5), ServeConfig())
        mock_clock.jump(30.0)
        said = announcer.announcement()
        assert (said.instance, said.uptime_s, said.twin) == (member.duplicates.instance, 30.0, b"")
        assert (said.num_blocks, len(said.instance)) == (checkpoint.spec.num_blocks, 8)
        member.duplicates.name(b"somebody")
        assert announcer.announcement().twin == b"somebody"
        member.duplicates.taken.set()
        await announcer.withdraw()
        assert swarm.gossip.announced == [], "the other one goes on under this identity"


async def test_it_is_repeated_once_an_interval_when_nothing_changes(
    checkpoint: Checkpoint, runner: SpanRunner, mock_clock: trio.testing.MockClock
) -> None:
    async with open_announcer(checkpoint, runner) as (announcer, swarm), trio.open_nursery() as nursery:
        await announcer.announce()
        nursery.start_soon(announcer.keep_fresh)
        announcer.touch()  # nothing has changed
        for announced in (1, 2, 3):
            await trio.testing.wait_all_tasks_blocked()
            assert len(swarm.gossip.announced) == announced
            mock_clock.jump(GAP_S)
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(INTERVAL_S - GAP_S)
        nursery.cancel_scope.cancel()


async def test_a_change_is_told_soon_but_never_too_soon_and_a_small_one_waits(
    checkpoint: Checkpoint, runner: SpanRunner, mock_clock: trio.testing.MockClock
) -> None:
    async with open_announcer(checkpoint, runner) as (announcer, swarm), trio.open_nursery() as nursery:
        await announcer.announce()
        nursery.start_soon(announcer.keep_fresh)
        small, much = runner.cache.capacity_tokens // 64, runner.cache.capacity_tokens // 4
        lease = runner.cache.reserve(much)
        free = runner.cache.free_tokens
        announcer.touch()
        await trio.testing.wait_all_tasks_blocked()
        assert len(swarm.gossip.announced) == 1
        mock_clock.jump(GAP_S)
        await trio.testing.wait_all_tasks_blocked()
        assert len(swarm.gossip.announced) == 2
        assert swarm.gossip.announced[-1].free_cache_tokens == free
        mock_clock.jump(GAP_S)
        runner.cache.reserve(small)
        announcer.touch()
        await trio.testing.wait_all_tasks_blocked()
        assert len(swarm.gossip.announced) == 2
        lease.release()
        announcer.touch()
        await trio.testing.wait_all_tasks_blocked()
        assert len(swarm.gossip.announced) == 3
        nursery.cancel_scope.cancel()


async def test_a_goodbye_takes_the_offer_back(checkpoint: Checkpoint, runner: SpanRunner) -> None:
    async with open_announcer(checkpoint, runner) as (announcer, swarm):
        await announcer.announce()
        assert len(swarm.view.live(swarm.spec.revision)) == 1
        await announcer.withdraw()
        assert swarm.view.live(swarm.spec.revision) == []
        assert swarm.gossip.announced[-1].leaving


def test_the_more_announce_the_rarer_each_does_and_the_longer_it_counts() -> None:
    config = ServeConfig()
    assert announce_interval_s(1, config) == announce_interval_s(500, config) == config.announce_interval_s
    assert announce_ttl_s(500, config) == config.announce_ttl_s
    for peers in (700, 1000, 1400):
        assert peers / announce_interval_s(peers, config) <= TOPIC_PER_S
        assert announce_ttl_s(peers, config) == pytest.approx(2 * announce_interval_s(peers, config))
    assert announce_ttl_s(100_000, config) == MAX_TTL_S
