"""Generations over real processes: draws, deaths in the middle, many at once, and code without trio."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import trio

import p2pinfer
from p2pinfer.client import Client
from p2pinfer.errors import ConfigError, NoRoute, P2PInferError, PeerRefused
from p2pinfer.generation.generation import GenerationResult
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.events import Event, SessionClosed

from .support import Along, StartNode, Swarm, open_nodes, text_of

pytestmark = pytest.mark.slow

PROMPT = "Once upon a time"
DRAWN: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 7}


async def generate(client: Client, tokens: int = 30, **options: Any) -> GenerationResult:
    generation = client.generate(PROMPT, max_new_tokens=tokens, **options)
    await text_of(generation)
    return generation.result


async def test_a_seed_draws_the_same_on_every_way(swarm: Swarm) -> None:
    ways = [[(0, 0, 8)], [(3, 0, 1), (1, 1, 8)], [(2, 0, 3), (0, 3, 5), (1, 5, 8)]]
    results: list[GenerationResult] = []
    for way in ways:
        async with swarm.client(*way) as client:
            results.append(await generate(client, **DRAWN))
            assert (await generate(client, **{**DRAWN, "seed": 8})).token_ids != results[0].token_ids
    assert len({result.token_ids for result in results}) == 1
    assert len({result.text for result in results}) == 1
    assert [len(result.route) for result in results] == [1, 2, 3]
    assert len(results[0].text.split()) > 10


@pytest.mark.parametrize(
    ("position", "options"),
    [
        pytest.param(0, {}, id="first, greedy"),
        pytest.param(1, DRAWN, id="middle, drawn"),
        pytest.param(2, {}, id="last, greedy"),
        pytest.param(0, DRAWN, id="first, drawn", marks=pytest.mark.sweep),
        pytest.param(1, {}, id="middle, greedy", marks=pytest.mark.sweep),
        pytest.param(2, DRAWN, id="last, drawn", marks=pytest.mark.sweep),
    ],
)
async def test_a_hop_killed_in_the_middle_changes_no_token(
    position: int, options: dict[str, Any], swarm: Swarm, start_node: StartNode
) -> None:
    node = start_node()
    async with swarm.client((0, 0, 8)) as client:
        undisturbed = await generate(client, **options)
    peer_id, _ = await trio.to_thread.run_sync(node.ready)
    way = [(swarm.peers[0], 0, 3), (swarm.peers[1], 3, 5), (swarm.peers[2], 5, 8)]
    way[position] = (peer_id, *way[position][1:])
    async with swarm.client(policy=Along(way), speculate="off") as client:  # the rest is not there yet
        generation = client.generate(PROMPT, max_new_tokens=30, **options)
        for _ in range(10):
            await anext(generation)
        node.signal(signal.SIGKILL)
        await text_of(generation)
        assert client.ledger.score(peer_id).reliability < client.ledger.score("newcomer").reliability
    result = generation.result
    assert result.token_ids == undisturbed.token_ids
    assert result.text == undisturbed.text
    assert result.failovers == 1
    assert peer_id not in [hop.peer_id for hop in result.route]


async def test_a_node_that_leaves_is_dropped_at_once_and_its_sessions_go_on_elsewhere(
    swarm: Swarm, start_node: StartNode
) -> None:
    node = start_node("0:4")
    peer_id, _ = await trio.to_thread.run_sync(node.ready)
    way = Along([(peer_id, 0, 4), (swarm.peers[1], 4, 8)])
    async with swarm.client(policy=way, speculate="off") as client:
        generation = client.generate(PROMPT, max_new_tokens=30)
        for _ in range(5):
            await anext(generation)
        assert peer_id in known(client)
        node.signal(signal.SIGINT)
        with trio.fail_after(60):
            while peer_id in known(client):
                await client.member.table_changed.wait()
        await text_of(generation)
        assert generation.result.failovers == 0  # it was handed over, or done before the node was gone
        assert len(generation.result.token_ids) == 30
    await trio.to_thread.run_sync(node.wait_for, "leaving")
    assert await trio.to_thread.run_sync(node.end) == 128 + signal.SIGINT


def known(client: Client) -> list[str]:
    """Who the client's table says is there. Fetch the next news before you look again."""
    return [peer.announcement.peer_id for peer in client.peers()]


async def test_blocks_that_only_a_node_that_left_had_are_named(tiny_stories: Path, tmp_path: Path) -> None:
    """The text so far is kept."""
    async with open_nodes(tiny_stories, tmp_path, [(0, 5)]) as nodes:
        async with nodes.client(wait_s=0.2) as client:
            soon = ServeConfig(drain_s=0.2)
            more = open_nodes(tiny_stories, tmp_path / "more", [(5, 8)], bootstrap=nodes.address, serve=soon)
            async with more:
                while len(client.peers()) < 2:
                    await client.member.table_changed.wait()
                generation = client.generate(PROMPT)
                tokens = [await anext(generation) for _ in range(4)]
            with pytest.raises(NoRoute, match="nobody serves blocks 5:8") as caught:
                await anext(generation)
        assert caught.value.missing == ((5, 8),)
        assert generation.result.text == "".join(token.text for token in tokens) == ", there was a"


@pytest.mark.parametrize(
    ("limits", "message", "code"),
    [
        ({"max_sessions": 1}, "1 sessions are open, which is the limit", "busy"),
        ({"replay_bytes": 1000}, "replay log full", "cache_full"),
    ],
)
async def test_a_node_without_room_says_why(
    limits: dict[str, Any], message: str, code: str, tiny_stories: Path, tmp_path: Path
) -> None:
    serve = ServeConfig(**limits)
    async with (
        open_nodes(tiny_stories, tmp_path, [(0, 5), (5, 8)], serve=serve) as nodes,
        nodes.client(find_timeout_s=0.1) as client,
    ):
        while len(client.peers()) < 2:  # or it would be told that nobody serves blocks 5:8
            await client.member.table_changed.wait()
        first = client.generate(PROMPT)  # held: one that nobody holds gives its room back
        if code == "busy":
            await anext(first)
        with pytest.raises(NoRoute, match=message) as caught:
            await generate(client)
        assert isinstance(caught.value.__cause__, PeerRefused)
        assert caught.value.__cause__.code == code


async def test_eight_clients_at_once_all_finish_and_none_starves(swarm: Swarm) -> None:
    """While all of them run, nobody gets less than half of what another one does, by positions computed."""
    counts = [0] * 8
    when_the_first_had_finished: list[int] = []

    async def use(index: int) -> None:
        async with swarm.client((0, 0, 8), speculate="off") as client:
            await begin(client)
            async for _ in client.generate(f"{PROMPT}{' long' * index * 20}", max_new_tokens=60):
                counts[index] += 1
            if not when_the_first_had_finished:
                when_the_first_had_finished.extend(counts)

    waiting = 0
    everybody_is_here = trio.Event()

    async def begin(client: Client) -> None:
        nonlocal waiting
        waiting += 1
        if waiting == 8:
            everybody_is_here.set()
        await everybody_is_here.wait()

    async with trio.open_nursery() as nursery:
        for index in range(8):
            nursery.start_soon(use, index)
    assert counts == [60] * 8
    assert max(when_the_first_had_finished) <= 2 * min(when_the_first_had_finished)


def test_code_without_trio_generates_too(swarm: Swarm) -> None:
    with p2pinfer.connect(bootstrap=[swarm.address], policy="fastest", cache_dir=swarm.home) as connected:
        assert {peer.announcement.peer_id for peer in connected.peers()} & set(swarm.peers)
        generation = connected.generate(PROMPT, max_new_tokens=8)
        texts = [token.text for token in generation]
        assert "".join(texts) == generation.result.text == ", there was a little girl named Lily"
        assert generation.result.finish_reason == "length"
        early = connected.generate(PROMPT)
        assert next(early).text == ","
        early.close()
        assert connected.generate(PROMPT, max_new_tokens=3).text() == ", there was"
        with pytest.raises(ConfigError, match="max_new_tokens is 0"):
            connected.generate(PROMPT, max_new_tokens=0)
    with pytest.raises(P2PInferError, match="this client is closed"):
        connected.generate(PROMPT)


async def test_a_generation_left_in_the_middle_frees_what_every_hop_held(
    tiny_stories: Path, tmp_path: Path
) -> None:
    """There is room for one session alone, and the next one gets it."""
    closed: list[SessionClosed] = []
    changed = trio.Event()

    def note(event: Event) -> None:
        if isinstance(event, SessionClosed):
            closed.append(event)
            changed.set()

    async with (
        open_nodes(
            tiny_stories, tmp_path, [(0, 2), (2, 8)], serve=ServeConfig(max_sessions=1), report=note
        ) as nodes,
        nodes.client() as client,
    ):
        for turn in range(1, 4):
            generation = client.generate(PROMPT)
            await anext(generation)
            await generation.aclose()
            while len(closed) < 2 * turn:
                changed = trio.Event()
                await changed.wait()
    assert {event.reason for event in closed} == {"done"}
