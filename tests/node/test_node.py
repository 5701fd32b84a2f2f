"""A node's life over a swarm in memory, from its configuration to its goodbye."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import trio
import trio.testing

from p2pinfer.errors import PeerRefused
from p2pinfer.models.compute.runner import Chunk, open_runner
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.events import Joined, Loading, NodeLeaving, Ready, SessionOpened, Starting
from p2pinfer.node.evidence.store import EVIDENCE_PROTOCOL

from .memory_swarm import FLOAT32
from .nodes import QUICK, OpenNode


async def test_a_node_serves_what_it_was_told_to_and_says_goodbye(open_node: OpenNode) -> None:
    async with open_node(blocks="2:5") as node:
        ready = await node.wait_for(Ready)
        spec = node.swarm.spec
        told = [event for event in node.events if not isinstance(event, Joined)]
        assert told[:2] == [
            Starting(ready.peer_id, ready.addrs, "tiny-stories", spec.revision),
            Loading((2, 5), "asked for"),
        ]
        assert (ready.blocks, ready.dtype, ready.device) == ((2, 5), "float32", "cpu")
        assert (ready.model, ready.revision) == ("tiny-stories", spec.revision)
        assert ready.tokens_per_s > 0
        assert node.swarm.gossip.joined == {spec.revision}
        (announced,) = node.swarm.view.live(spec.revision)
        assert (announced.span, announced.addrs) == (BlockSpan(2, 5), ready.addrs)
        assert announced.free_cache_tokens == ready.cache_tokens
        session = await node.session()
        assert (await node.wait_for(SessionOpened)).blocks == (2, 5)
        await session.aclose()
        node.scope.cancel()
        await node.wait_for(NodeLeaving)
        assert node.swarm.gossip.announced[-1].leaving
        assert node.swarm.view.live(spec.revision) == []
        # What it signed for it goes on to answer for.
        handlers = node.swarm.network.hosts[ready.peer_id].handlers
        while set(handlers) != {EVIDENCE_PROTOCOL}:  # once the last session has ended
            await trio.lowlevel.checkpoint()


async def test_a_node_serves_a_span_on_several_devices(open_node: OpenNode) -> None:
    async with open_node(blocks="2:7", compute=replace(FLOAT32, device="cpu,cpu")) as node:
        ready = await node.wait_for(Ready)
        assert (ready.blocks, ready.device) == ((2, 7), "cpu (2:5), cpu (5:7)")
        session = await node.session()
        hidden = torch.randn(5, node.swarm.spec.hidden_size, generator=torch.Generator().manual_seed(0))
        output = await session.prefill(hidden, 0)
        expected = open_runner(node.swarm.checkpoint, BlockSpan(2, 7), FLOAT32)
        (whole,) = expected.run([Chunk(expected.cache.reserve(5), 0, hidden)])
        assert torch.equal(output, whole[-1:])
        await session.aclose()


async def test_a_node_that_leaves_in_the_middle_of_sessions_says_how_many(open_node: OpenNode) -> None:
    async with open_node(blocks="0:8", serve=replace(QUICK, drain_s=0.1)) as node:
        await node.wait_for(Ready)
        await node.session()
        node.scope.cancel()
        assert await node.wait_for(NodeLeaving) == NodeLeaving(1)


async def test_a_goodbye_that_nobody_takes_does_not_hold_up_the_end(
    open_node: OpenNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_node(blocks="0:2", serve=ServeConfig(leave_timeout_s=0.2)) as node:
        await node.wait_for(Ready)

        async def say_nothing(announcement: object) -> None:
            await trio.sleep_forever()

        monkeypatch.setattr(node.swarm.gossip, "announce", say_nothing)
        node.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(PeerRefused, match="this node is shutting down"):
            await node.session()
        await node.wait_for(NodeLeaving)
