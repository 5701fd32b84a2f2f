"""A client over a swarm in memory: routes chosen, waited for, given up, remembered."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from p2pinfer.client import Client, ClientConfig
from p2pinfer.errors import ConfigError, NoRoute, PromptTooLong, Unfinished
from p2pinfer.generation.outage import Waiting
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.numerics import Codec
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.config import ServeConfig
from p2pinfer.planning import session_opener
from p2pinfer.reputation.view import ReputationView
from p2pinfer.routing.route import Candidate, Route, RouteRequest
from p2pinfer.session.hosting import open_session
from p2pinfer.session.session import Session

from .clients import PROMPT, OpenClient, Recorder, text_of

SOON = ClientConfig(find_timeout_s=0.05, dtype="float32")


async def test_a_peer_without_room_is_left_alone_for_a_while_and_not_blamed(open_client: OpenClient) -> None:
    policy = Recorder()
    config = ClientConfig(dtype="float32", busy_pause_s=1000.0)
    async with open_client(policy=policy, config=config) as (client, swarm):
        full = await swarm.serve("full", tokens_per_s=1000.0, config=ServeConfig(client_share=0.001))
        assert full.runner.cache.free_tokens > 64
        await swarm.serve("other", tokens_per_s=10.0)
        for _ in range(2):
            assert await text_of(client.generate(PROMPT, max_new_tokens=200)) != ""
        while len(policy.outcomes) < 3:  # it is told in a thread of its own
            await trio.lowlevel.checkpoint()
        routes = [route.peer_ids for route, _ in policy.outcomes]
        assert routes == [("full",), ("other",), ("other",)]
        assert policy.requests[1].excluded == policy.requests[2].excluded == {"full"}
        assert client.ledger.score("full") == client.ledger.score("nobody")
        assert swarm.network.hosts["full"].counts.by_label("refusals") == {"over_share": 1}


async def test_a_client_finds_its_way_and_remembers_how_it_was(open_client: OpenClient) -> None:
    policy = Recorder()
    async with open_client(policy=policy) as (client, swarm):
        await swarm.serve("a", 0, 5)
        await swarm.serve("b", 3, 8)
        await client.member.host.ping("a")
        generation = client.generate(PROMPT, max_new_tokens=5)
        assert await text_of(generation) == ", there was a little"
        assert [hop.connection for hop in generation.result.route] == ["direct", "direct"]
        (request,) = policy.requests
        assert (request.revision, request.num_blocks) == (swarm.spec.revision, 8)
        assert (request.hidden_bytes_per_token, request.tokens) == (1280, 10)
        assert request.coordinate == client.member.coordinate
        assert [(each.peer_id, each.relayed) for each in policy.candidates[0]] == [("a", False), ("b", False)]
        newcomer = client.ledger.score("nobody").reliability
        assert client.ledger.score("a").reliability > newcomer
        peers = {peer.announcement.peer_id: peer for peer in client.peers()}
        assert {peer_id: peer.connection for peer_id, peer in peers.items()} == {"a": "direct", "b": "direct"}
        assert peers["a"].announcement.span == BlockSpan(0, 5)
        assert client.spec == client.ends.spec == swarm.spec
        assert client.connection_kind("nobody") == "direct"
        with pytest.raises(PromptTooLong, match="1025 tokens are asked for, and tiny-stories takes 1024"):
            await client.open_session(1025, frozenset())
        await swarm.all_closed()
    ((route, outcome),) = policy.outcomes
    assert set(route.peer_ids) == {"a", "b"}
    assert outcome.ok


async def test_a_peer_that_died_is_left_out_and_relied_on_less(open_client: OpenClient) -> None:
    policy = Recorder()
    async with open_client(policy=policy) as (client, swarm):
        await swarm.serve("a", 0, 3)
        await swarm.serve("b", 3, 8, tokens_per_s=900)
        await swarm.serve("c", 3, 8, tokens_per_s=10)
        undisturbed = await text_of(client.generate(PROMPT, max_new_tokens=8))
        generation = client.generate(PROMPT, max_new_tokens=8)
        for _ in range(3):
            await anext(generation)
        await swarm.network.kill("b")
        assert await text_of(generation) == undisturbed
        assert generation.result.failovers == 1
        assert [hop.peer_id for hop in generation.result.route] == ["a", "c"]
        assert policy.requests[-1].excluded == {"a", "b"}
        assert client.ledger.score("b").reliability < client.ledger.score("c").reliability
    assert [outcome.failed_peer for _, outcome in policy.outcomes] == [None, "b", None]


async def test_two_peers_that_die_together_are_one_failover(open_client: OpenClient) -> None:
    """The second one is found dead while the next route is opened."""
    policy = Recorder()
    async with open_client(policy=policy) as (client, swarm):
        for peer_id, start, stop, tokens_per_s in (
            ("a", 0, 3, 50),
            ("b", 3, 5, 900),
            ("c", 5, 8, 900),
            ("d", 3, 5, 10),
            ("e", 5, 8, 10),
        ):
            await swarm.serve(peer_id, start, stop, tokens_per_s=tokens_per_s)
        undisturbed = await text_of(client.generate(PROMPT, max_new_tokens=8))
        generation = client.generate(PROMPT, max_new_tokens=8)
        await anext(generation)
        await swarm.network.kill("b")
        await swarm.network.kill("c")
        assert await text_of(generation) == undisturbed
        assert generation.result.failovers == 1
        assert [hop.peer_id for hop in generation.result.route] == ["a", "d", "e"]
        # The second death is known before the first repair, or during it.
        assert {"b", "c"} <= policy.requests[-1].excluded <= {"a", "b", "c"}


async def test_a_peer_out_of_reach_counts_as_failed_and_one_that_refuses_does_not(
    open_client: OpenClient,
) -> None:
    policy = Recorder()
    async with open_client(policy=policy) as (client, swarm):
        served = await swarm.serve("full", tokens_per_s=900)
        served.runner.cache.reserve(served.runner.cache.free_tokens)
        swarm.announce("gone", tokens_per_s=500)
        await swarm.serve("good", tokens_per_s=10)
        newcomer = client.ledger.score("nobody").reliability
        assert await text_of(client.generate(PROMPT, max_new_tokens=1))
        assert client.ledger.score("full").reliability == newcomer
        assert client.ledger.score("gone").reliability < newcomer
        assert client.ledger.score("good").reliability > newcomer
        assert "gone cannot be reached" in client.ledger.account("gone").notes[0].text
    assert [(outcome.ok, outcome.failed_peer) for _, outcome in policy.outcomes] == [
        (False, "full"),
        (False, "gone"),
        (True, None),
    ]
    assert "the KV cache has" in (policy.outcomes[0][1].error or "")


async def test_a_client_waits_for_peers_that_are_about_to_come(open_client: OpenClient) -> None:
    async with open_client() as (client, swarm), trio.open_nursery() as nursery:
        await swarm.serve("a", 0, 3)
        texts: list[str] = []

        async def generate() -> None:
            texts.append(await text_of(client.generate(PROMPT, max_new_tokens=5)))

        nursery.start_soon(generate)
        await trio.testing.wait_all_tasks_blocked()
        swarm.announce("unrelated", 0, 1)
        await trio.testing.wait_all_tasks_blocked()
        await swarm.serve("b", 3, 8)
    assert texts == [", there was a little"]


async def test_a_text_waits_for_who_replaces_the_one_that_died(open_client: OpenClient) -> None:
    told: list[Waiting] = []
    waiting = trio.Event()

    def note(reason: Waiting) -> None:
        told.append(reason)
        waiting.set()

    async with open_client(on_wait=note) as (client, swarm), trio.open_nursery() as nursery:
        await swarm.serve("a", 0, 3)
        await swarm.serve("b", 3, 8)
        generation = client.generate(PROMPT, max_new_tokens=5)
        await anext(generation)
        await swarm.network.kill("b")
        swarm.announce("b", 3, 8, leaving=True)
        nursery.start_soon(text_of, generation)
        await waiting.wait()
        await swarm.serve("c", 3, 8)
    assert generation.result.text == ", there was a little"
    assert [each.missing for each in told] == [((3, 8),)]


async def leave_by_break(client: Client) -> None:
    async for _ in client.generate(PROMPT, max_new_tokens=200):
        break


async def leave_by_error(client: Client) -> None:
    with pytest.raises(ZeroDivisionError):
        async for token in client.generate(PROMPT, max_new_tokens=200):
            print(token.id / 0)


async def leave_a_generator(client: Client) -> None:
    async def words() -> AsyncGenerator[str]:
        async for token in client.generate(PROMPT, max_new_tokens=200):
            yield token.text

    async for _ in words():
        break


async def leave_the_block(client: Client) -> None:
    with pytest.raises(ZeroDivisionError):
        async with client.generate(PROMPT, max_new_tokens=200) as generation:
            print((await anext(generation)).id / 0)


@pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")  # trio's word on leave_a_generator
@pytest.mark.parametrize("leave", [leave_by_break, leave_by_error, leave_a_generator, leave_the_block])
async def test_a_text_that_is_left_in_the_middle_gives_its_room_back(
    open_client: OpenClient, leave: Callable[[Client], Awaitable[None]]
) -> None:
    """Long before the lease ends: the client lives on, and so do the hops."""
    async with open_client() as (client, swarm):
        await swarm.serve("a", 0, 3)
        await swarm.serve("b", 3, 8)
        await leave(client)
        await swarm.all_closed()
        assert await text_of(client.generate(PROMPT, max_new_tokens=1)) == ","


async def test_a_text_for_which_nobody_has_room_begins_with_what_there_is(open_client: OpenClient) -> None:
    """What a peer announces is too little for the whole, and what it gives one client is less."""
    async with open_client() as (client, swarm):
        served = await swarm.serve("a")
        cache = served.runner.cache
        taken = cache.reserve(cache.free_tokens - 256)
        swarm.announce("a", free_cache_tokens=256)
        assert (
            await text_of(client.generate(PROMPT, max_new_tokens=1000, stop=(" little",))) == ", there was a"
        )
        taken.release()


async def test_a_text_that_waited_in_vain_can_be_resumed_by_another_client(open_client: OpenClient) -> None:
    async with open_client(config=ClientConfig(wait_s=0.05, dtype="float32", speculate="off")) as (
        client,
        swarm,
    ):
        await swarm.serve("a")
        generation = client.generate(PROMPT, max_new_tokens=5, temperature=1.0, seed=3)
        whole = await text_of(client.generate(PROMPT, max_new_tokens=5, temperature=1.0, seed=3))
        await anext(generation)
        await swarm.network.kill("a")
        swarm.announce("a", leaving=True)
        with pytest.raises(Unfinished, match="nobody serves blocks 0:8") as caught:
            await text_of(generation)
        assert caught.value.text == generation.result.text
    async with open_client() as (client, swarm):
        await swarm.serve("b")
        resumed = client.resume(caught.value.resume_token)
        assert await text_of(resumed) == whole
        with pytest.raises(ConfigError, match="not a resume token"):
            client.resume("p2pr0.AAAA")


async def test_blocks_that_nobody_serves_are_named(open_client: OpenClient) -> None:
    async with open_client(config=SOON) as (client, swarm):
        swarm.announce("a", 0, 3)
        swarm.announce("b", 5, 6)
        with pytest.raises(NoRoute, match="nobody serves blocks 3:5, 6:8") as caught:
            await anext(client.generate(PROMPT))
        assert caught.value.missing == ((3, 5), (6, 8))


async def test_blocks_whose_only_peer_failed_are_named_with_the_reason(open_client: OpenClient) -> None:
    async with open_client(config=SOON) as (client, swarm):
        swarm.announce("gone")
        message = "blocks 0:8 are served only by peers that failed this request.*gone cannot be reached"
        with pytest.raises(NoRoute, match=message) as caught:
            await anext(client.generate(PROMPT))
        assert caught.value.missing == ()


@pytest.mark.parametrize(
    ("dtypes", "codec"),
    [
        (("float32", "float32"), "float32"),
        (("float32", "bfloat16"), "float32"),
        (("bfloat16", "bfloat16"), "bfloat16"),
        (("float16", "float16"), "float16"),
    ],
)
async def test_hidden_states_travel_in_what_all_hops_compute_in_or_in_float32(
    dtypes: tuple[str, str], codec: Codec, open_client: OpenClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    codecs: list[Codec] = []

    def note(*args: Any, codec: Codec, **more: Any) -> AbstractAsyncContextManager[Session]:
        codecs.append(codec)
        return open_session(*args, codec=codec, **more)

    monkeypatch.setattr(session_opener, "open_session", note)
    async with open_client() as (client, swarm):
        for peer_id, span, dtype in zip("ab", ((0, 3), (3, 8)), dtypes, strict=True):
            compute = ComputeConfig(device="cpu", dtype=dtype, threads=1, cache_bytes=1 << 22)
            await swarm.serve(peer_id, *span, compute=compute)
        swarm.announce("irrelevant", 0, 1, dtype="float16", tokens_per_s=0.01)
        assert await text_of(client.generate(PROMPT, max_new_tokens=2))
    assert codecs == [codec]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_what_travels_does_not_change_when_an_announcement_ends_before_the_session_opens(
    dtype: Codec, open_client: OpenClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor when a hop is replaced by one that computes in something else."""
    codecs: list[Codec] = []

    class Slow(Recorder):
        """While it chooses, a peer says goodbye."""

        def choose_routes(
            self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
        ) -> Sequence[Route]:
            if not self.requests:
                trio.from_thread.run_sync(partial(swarm.announce, "a", 0, 3, dtype=dtype, leaving=True))
            return super().choose_routes(candidates, request, view)

    def note(*args: Any, codec: Codec, **more: Any) -> AbstractAsyncContextManager[Session]:
        codecs.append(codec)
        return open_session(*args, codec=codec, **more)

    monkeypatch.setattr(session_opener, "open_session", note)
    policy = Slow()
    async with open_client(policy=policy) as (client, swarm):
        for peer_id, span in (("a", (0, 3)), ("b", (3, 8))):
            compute = ComputeConfig(device="cpu", dtype=dtype, threads=1, cache_bytes=1 << 22)
            await swarm.serve(peer_id, *span, compute=compute)
        generation = client.generate(PROMPT, max_new_tokens=4)
        await anext(generation)
        assert {peer.announcement.peer_id for peer in client.peers()} == {"b"}
        await swarm.serve("c", 3, 8)  # in float32
        await swarm.network.kill("b")
        assert await text_of(generation)
        assert generation.result.failovers == 1
        assert [hop.peer_id for hop in generation.result.route] == ["a", "c"]
    assert codecs == [dtype]
    assert [request.hidden_bytes_per_token for request in policy.requests] == [640, 640]
