"""Which blocks a node takes, and when it moves."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
import trio.testing

from p2pinfer.errors import ConfigError, LocalError, ModelNotFound, OutOfMemory, SpanOutOfRange
from p2pinfer.models.compute.runner import SpanRunner, open_runner
from p2pinfer.models.machine import split
from p2pinfer.models.machine.memory import FreeMemory
from p2pinfer.models.span import BlockSpan
from p2pinfer.node import node as node_module
from p2pinfer.node.events import Event, Joined, Loading, NodeLeaving, Ready
from p2pinfer.node.node import NodeConfig, run_node
from p2pinfer.node.serve.capacity import Capacity
from p2pinfer.node.swarm.membership import SwarmMember
from p2pinfer.session.session import Session

from .nodes import OpenNode


def room_for(monkeypatch: pytest.MonkeyPatch, blocks: int, memory: FreeMemory | None = None) -> None:
    def measure(*_: object) -> Capacity:
        return Capacity(blocks, 1000.0, memory or FreeMemory(1 << 40))

    monkeypatch.setattr(node_module, "measure_capacity", measure)


async def test_a_node_takes_the_blocks_that_the_swarm_needs_most(
    open_node: OpenNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for(monkeypatch, 5)
    async with open_node(num_blocks=3, others=((0, 4), (7, 8))) as node:
        assert await node.wait_for(Loading) == Loading((4, 7), "5 blocks fit; the swarm is weakest here")
        assert (await node.wait_for(Ready)).blocks == (4, 7)


async def test_a_node_says_which_limit_its_blocks_were_reckoned_by(
    open_node: OpenNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for(monkeypatch, 2, FreeMemory(3 << 29, 2 << 30, "its control group"))
    async with open_node(others=((0, 4),)) as node:
        said = (await node.wait_for(Loading)).reason
        assert "2 blocks fit, since 1.5 GiB are free (limited to 2.0 GiB by its control group); the" in said


async def test_blocks_that_exceed_a_limit_are_refused_in_a_line(
    open_node: OpenNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = FreeMemory(1 << 10, 2 << 30, "ulimit -v")

    def free_on(_device: torch.device) -> FreeMemory:
        return room

    monkeypatch.setattr(split, "free_on", free_on)
    with pytest.raises(OutOfMemory, match=r"limited to 2\.0 GiB by ulimit -v"):
        async with open_node(blocks="0:4") as node:
            await node.wait_for(Ready)


async def test_a_node_that_is_refused_memory_says_so(
    open_node: OpenNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(node_module, "open_runner", refuse)
    with pytest.raises(OutOfMemory, match=r"no memory for blocks 0:4 on cpu: .* serve fewer blocks"):
        async with open_node(blocks="0:4") as node:
            await node.wait_for(Ready)


async def test_a_node_whose_first_step_is_refused_memory_says_so(
    open_node: OpenNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card's libraries take theirs when they are first used, which is after the blocks were loaded."""

    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    for measure in ("measure_speed", "find_threads"):
        monkeypatch.setattr(node_module, measure, refuse)
    with pytest.raises(OutOfMemory, match=r"no memory for a step through blocks 0:4 on cpu: .* serve fewer"):
        async with open_node(blocks="0:4") as node:
            await node.wait_for(Ready)


async def test_a_node_that_was_killed_comes_back_to_its_blocks_as_the_same_peer(
    open_node: OpenNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own announcement, which has not expired, does not drive it away."""
    room_for(monkeypatch, 3)
    async with open_node(others=((0, 4), (7, 8))) as node:
        first = await node.wait_for(Ready)
        assert first.blocks == (4, 7)
    async with open_node(others=((0, 4), (4, 8)), ghost=(4, 7)) as node:
        again = await node.wait_for(Ready)
        assert (again.peer_id, again.blocks) == (first.peer_id, (4, 7))
        assert await node.wait_for(Loading) == Loading((4, 7), "served before, and still needed")
    async with open_node(others=((4, 8),), ghost=(4, 7)) as node:
        assert (await node.wait_for(Ready)).blocks == (0, 3)


@pytest.mark.parametrize("num_blocks", [None, 100])
async def test_a_node_takes_no_more_blocks_than_fit(
    num_blocks: int | None, open_node: OpenNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for(monkeypatch, 5)
    async with open_node(num_blocks=num_blocks) as node:
        assert (await node.wait_for(Ready)).blocks == (0, 5)


@pytest.mark.parametrize("invented", [((0, 4),), ((0, 4),) * 40, ((0, 1), (1, 4), (0, 8))])
async def test_invented_peers_send_no_node_away_from_blocks_that_nobody_serves(
    invented: tuple[tuple[int, int], ...], open_node: OpenNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for(monkeypatch, 4)
    async with open_node(others=((4, 8),), invented=invented) as node:
        assert (await node.wait_for(Ready)).blocks == (0, 4)


async def test_a_peer_that_answers_counts_as_no_faster_than_the_node_itself(
    open_node: OpenNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may claim what it likes: with three at the other blocks, these are the weaker ones."""
    room_for(monkeypatch, 4)
    async with open_node(others=((4, 8),) * 3, boast=(0, 4)) as node:
        assert (await node.wait_for(Ready)).blocks == (0, 4)


async def test_a_node_moves_to_where_it_is_needed_once_nobody_uses_it(
    open_node: OpenNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []
    runners: list[weakref.ref[SpanRunner]] = []
    session: Session | None = None

    def look(own: object, others: list[object], num_blocks: int, dwelt_s: float) -> BlockSpan | None:
        looks.append(dwelt_s)
        assert others == []
        return BlockSpan(4, 6) if len(runners) == 1 else None

    def load(*args: Any, **options: Any) -> SpanRunner:
        assert not [runner for runner in runners if runner()], "the old blocks are gone before new ones come"
        runner = open_runner(*args, **options)
        runners.append(weakref.ref(runner))
        return runner

    monkeypatch.setattr(node_module, "should_move", look)
    monkeypatch.setattr(node_module, "open_runner", load)
    room_for(monkeypatch, 2)
    async with open_node() as node:
        assert (await node.wait_for(Ready)).blocks == (0, 2)
        session = await node.session()
        seen = len(looks)
        while len(looks) < seen + 2:
            await trio.sleep(0.01)
        gc.disable()  # what is freed must not depend on it
        try:
            await session.aclose()
            assert (await node.wait_for(Ready, 2)).blocks == (4, 6)
        finally:
            gc.enable()
        assert [event.reason for event in node.events if isinstance(event, Loading)][1:] == [
            "the swarm has come to need these more"
        ]
        assert not any(isinstance(event, NodeLeaving) for event in node.events)
        (announced,) = node.swarm.view.live(node.swarm.spec.revision)
        assert announced.span == BlockSpan(4, 6)
        await (await node.session()).aclose()
        assert looks[0] < looks[1]


async def test_a_node_without_blocks_only_introduces(open_node: OpenNode) -> None:
    async with open_node(no_blocks=True) as node:
        ready = await node.wait_for(Ready)
        assert (ready.blocks, ready.model, ready.cache_tokens) == (None, "", 0)
        assert node.swarm.view.everybody() == []
        assert [event for event in node.events if not isinstance(event, Joined)] == [ready]


async def test_loading_can_be_cancelled(open_node: OpenNode, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, arrived = trio.Event(), threading.Event()
    token = trio.lowlevel.current_trio_token()

    def load_slowly(*_: object, **__: object) -> None:
        token.run_sync_soon(asked.set)
        arrived.wait()

    monkeypatch.setattr(node_module, "open_runner", load_slowly)
    try:
        with trio.fail_after(60):
            async with open_node(blocks="0:2") as node:
                await asked.wait()
                node.scope.cancel()
    finally:
        arrived.set()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"blocks": "0:9"}, SpanOutOfRange, "tiny-stories has 8 blocks, 0:8; 0:9 is not among them"),
        ({"model": "no/such/folder"}, ModelNotFound, "no/such/folder"),
    ],
)
async def test_what_cannot_be_served_is_said_before_the_network_is_touched(
    options: dict[str, Any], error: type[LocalError], message: str, tmp_path: Path
) -> None:
    events: list[Event] = []
    with pytest.raises(error, match=message):
        await run_node(NodeConfig(data_dir=tmp_path, cache_dir=tmp_path, **options), report=events.append)
    assert events == []


async def test_a_node_without_blocks_loads_no_model_when_it_ends(
    open_node: OpenNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def end(member: SwarmMember) -> None: ...

    monkeypatch.setattr(SwarmMember, "follow_neighbours", end)
    async with open_node(no_blocks=True, model="no/such/folder") as node:
        await node.wait_for(Ready)
        await trio.testing.wait_all_tasks_blocked()  # going on would raise ModelNotFound


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": "0:4", "num_blocks": 2}, "give one of them"),
        ({"blocks": "0:4", "no_blocks": True}, "give one of them"),
        ({"num_blocks": 2, "no_blocks": True}, "give one of them"),
        ({"num_blocks": 0}, "--num-blocks is 0; use --no-blocks to serve no blocks"),
        ({"num_blocks": -1}, "--num-blocks is -1"),
        ({"blocks": "4:2"}, "'4:2' is not a span of blocks"),
    ],
)
def test_what_contradicts_itself_is_no_configuration(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NodeConfig(**options)
