"""A client over a swarm in memory: routes chosen, waited for, given up, remembered."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from p2pinfer import client as client_module
from p2pinfer.client import Client, ClientConfig
from p2pinfer.errors import ConfigError, ModelNotFound, NoRoute, PolicyError, PromptTooLong, Unfinished
from p2pinfer.generation.generation import Generation
from p2pinfer.generation.outage import Waiting
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.numerics import Codec
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.protocol.messages import SESSION_PROTOCOL
from p2pinfer.planning import opening_race, session_opener
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.view import ReputationView
from p2pinfer.routing.config import RoutingConfig
from p2pinfer.routing.planner import cheapest_routes
from p2pinfer.routing.policy import Fastest, RiskAdjusted, RoutingPolicy, TrustedOnly
from p2pinfer.routing.route import Candidate, Hop, Route, RouteOutcome, RouteRequest
from p2pinfer.session.hosting import open_session
from p2pinfer.session.session import Session

from .memory_client import open_memory_client
from .node.memory_swarm import MemorySwarm

PROMPT = "Once upon a time"
SOON = ClientConfig(find_timeout_s=0.05, policy_timeout_s=0.05, dtype="float32")

OpenClient = Callable[..., AbstractAsyncContextManager[tuple[Client, MemorySwarm]]]


@pytest.fixture
def open_client(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> OpenClient:
    """Opens a client in a memory swarm."""

    @asynccontextmanager
    async def opened(**options: Any) -> AsyncGenerator[tuple[Client, MemorySwarm]]:
        async with open_memory_client(checkpoint, monkeypatch, tmp_path, **options) as opened:
            yield opened

    return opened


class Recorder(RoutingPolicy):
    """The cheapest routes, with everything noted."""

    def __init__(self) -> None:
        self.requests: list[RouteRequest] = []
        self.candidates: list[Sequence[Candidate]] = []
        self.outcomes: list[tuple[Route, RouteOutcome]] = []

    def choose_routes(
        self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
    ) -> Sequence[Route]:
        self.requests.append(request)
        self.candidates.append(candidates)
        return cheapest_routes(candidates, request, view)

    def on_result(self, route: Route, outcome: RouteOutcome) -> None:
        self.outcomes.append((route, outcome))


async def text_of(generation: Generation) -> str:
    async for _ in generation:
        pass
    return generation.result.text


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
    async with open_client(config=ClientConfig(wait_s=0.05, dtype="float32")) as (client, swarm):
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


class Broken(RoutingPolicy):
    """Raises where it should choose; never learns."""

    def choose_routes(
        self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
    ) -> Sequence[Route]:
        raise ZeroDivisionError("by zero")


class Forgetful(Recorder):
    """Raises where it should learn."""

    def on_result(self, route: Route, outcome: RouteOutcome) -> None:
        raise ZeroDivisionError("by zero")


class Absurd(RoutingPolicy):
    """Chooses somebody who is not there."""

    def choose_routes(
        self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
    ) -> Sequence[Route]:
        return [Route((Hop("ghost", BlockSpan(0, 8)),))]


class BanLover(RoutingPolicy):
    """Chooses a peer that is banned, and tries to lift the ban."""

    def choose_routes(
        self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
    ) -> Sequence[Route]:
        assert view.is_banned("bad")
        assert not hasattr(view, "forgive")
        return [Route((Hop("bad", BlockSpan(0, 8)),))]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            Broken(),
            "policy Broken raised ZeroDivisionError: by zero; the policy RiskAdjusted chooses instead",
        ),
        (Absurd(), "uses ghost, which is not a candidate; the policy RiskAdjusted chooses instead"),
        (BanLover(), "uses bad, which is banned; the policy RiskAdjusted chooses instead"),
    ],
)
async def test_for_a_policy_that_fails_the_default_stands_in_and_it_is_named(
    policy: RoutingPolicy, message: str, open_client: OpenClient, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_client(policy=policy) as (client, swarm):
        await swarm.serve("a", tokens_per_s=10)
        swarm.announce("bad", tokens_per_s=900)
        client.ledger.ban("bad", "it cheated")
        generation = client.generate(PROMPT, max_new_tokens=2)
        assert await text_of(generation) == ", there"
        assert [hop.peer_id for hop in generation.result.route] == ["a"]
    assert message in caplog.text


async def test_a_policy_that_thinks_for_ever_is_asked_once(
    open_client: OpenClient, caplog: pytest.LogCaptureFixture
) -> None:
    done = threading.Event()
    asked: list[RouteRequest] = []

    class Thinker(Recorder):
        def choose_routes(
            self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
        ) -> Sequence[Route]:
            asked.append(request)
            done.wait()
            return []

    config = ClientConfig(policy_timeout_s=0.05, dtype="float32")
    async with open_client(policy=Thinker(), config=config) as (client, swarm):
        await swarm.serve("a")
        for _ in range(2):
            assert await text_of(client.generate(PROMPT, max_new_tokens=1)) == ","
        done.set()
    assert len(asked) == 1
    assert "policy Thinker: choose_routes took longer than 0.05 s" in caplog.text


async def test_a_policy_that_listens_for_ever_holds_nothing_up(
    open_client: OpenClient, caplog: pytest.LogCaptureFixture
) -> None:
    done = threading.Event()

    class Dreamer(Recorder):
        def on_result(self, route: Route, outcome: RouteOutcome) -> None:
            super().on_result(route, outcome)
            done.wait()

    policy = Dreamer()
    config = ClientConfig(policy_timeout_s=0.05, dtype="float32")
    async with open_client(policy=policy, config=config) as (client, swarm):
        await swarm.serve("a")
        for _ in range(3):
            assert await text_of(client.generate(PROMPT, max_new_tokens=1)) == ","
    done.set()
    assert len(policy.outcomes) == 1
    assert "policy Dreamer: on_result took longer than 0.05 s" in caplog.text


async def test_what_a_client_learnt_is_there_for_the_next_one(
    open_client: OpenClient, tmp_path: Path
) -> None:
    async with open_client() as (client, swarm):
        await swarm.serve("a")
        await text_of(client.generate(PROMPT, max_new_tokens=1))
        before = client.ledger.account("a")
    async with open_client() as (client, _):
        assert client.ledger.account("a") == before
        assert before.sessions == 1


async def test_a_ledger_of_ones_own_is_used_and_not_kept(open_client: OpenClient, tmp_path: Path) -> None:
    own = Ledger()
    async with open_client(reputation=own) as (client, swarm):
        await swarm.serve("a")
        await text_of(client.generate(PROMPT, max_new_tokens=1))
        await client.keep_no_record(vouched=["a"])
    assert own.account("a").sessions == 1
    assert not own.account("a").vouched
    assert not (tmp_path / "ledger.sqlite").exists()


async def test_of_peers_that_end_with_the_client_no_record_is_kept(
    open_client: OpenClient, tmp_path: Path
) -> None:
    async with open_client() as (client, swarm):
        await swarm.serve("a")
        client.ledger.ban("known before")
        await client.keep_no_record(vouched=["a"])
        assert client.ledger.score("a").integrity == 1.0
        assert not client.ledger.is_banned("known before")
        assert await text_of(client.generate(PROMPT, max_new_tokens=1))
    async with open_client() as (client, _):
        assert client.ledger.is_banned("known before")
        assert client.ledger.account("a").sessions == 0


async def test_a_policy_that_cannot_learn_spoils_no_text(
    open_client: OpenClient, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_client(policy=Forgetful()) as (client, swarm):
        await swarm.serve("a")
        assert await text_of(client.generate(PROMPT, max_new_tokens=2)) == ", there"
    assert caplog.messages == ["policy Forgetful raised ZeroDivisionError: by zero"]


def test_a_policy_is_an_object_or_a_name_or_that_of_the_configuration() -> None:
    own = Recorder()
    assert Client(policy=own).policy is own
    assert isinstance(Client(policy="fastest").policy, Fastest)
    assert isinstance(Client(config=ClientConfig(policy="trusted-only")).policy, TrustedOnly)
    assert isinstance(Client().policy, RiskAdjusted)
    with pytest.raises(PolicyError, match="'slowest' is no routing policy"):
        Client(policy="slowest")


@pytest.mark.parametrize(
    ("config", "chosen"),
    [
        (RoutingConfig(explore_share=0.0), ["whole"]),
        (
            RoutingConfig(explore_share=0.0, redo_s=0.0, integrity_weight_s=0.0, default_rtt_ms=0.0),
            ["first", "second"],
        ),
    ],
)
async def test_built_in_policies_weigh_by_the_configuration(
    config: RoutingConfig, chosen: list[str], open_client: OpenClient
) -> None:
    """One slow peer against two fast ones: it depends on what a further hop is held to cost."""
    async with open_client(routing_config=config) as (client, swarm):
        await swarm.serve("whole", tokens_per_s=30)
        await swarm.serve("first", 0, 4, tokens_per_s=900)
        await swarm.serve("second", 4, 8, tokens_per_s=900)
        generation = client.generate(PROMPT, max_new_tokens=1)
        await text_of(generation)
        assert [hop.peer_id for hop in generation.result.route] == chosen


async def test_what_a_client_was_generating_ends_with_it(open_client: OpenClient) -> None:
    async with open_client() as (client, swarm):
        await swarm.serve("a")
        generation = client.generate(PROMPT)
        await anext(generation)
        await client.__aexit__(None, None, None)
        with trio.CancelScope() as scope:
            scope.cancel()
            await generation.aclose()
        await swarm.all_closed()


async def test_a_model_that_is_not_there_is_said_on_entering(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no/such/folder"):
        async with Client(model="no/such/folder", cache_dir=tmp_path, data_dir=tmp_path):
            pass


async def test_entering_can_be_cancelled_while_weights_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived = threading.Event()
    asked = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def fetch_slowly(model: str, **_: object) -> None:
        token.run_sync_soon(asked.set)
        arrived.wait()

    monkeypatch.setattr(client_module, "resolve_model", fetch_slowly)
    try:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(Client(cache_dir=tmp_path, data_dir=tmp_path).__aenter__)
                await asked.wait()
                nursery.cancel_scope.cancel()
    finally:
        arrived.set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_attempts": 0}, "max_attempts is 0; it must be 1 or more"),
        ({"find_timeout_s": 0.0}, "find_timeout_s is 0; it must be above 0"),
        ({"wait_s": -1.0}, "wait_s is -1; it must be 0 or more"),
        ({"policy_timeout_s": -1.0}, "policy_timeout_s is -1; it must be above 0"),
    ],
)
def test_nobody_finds_a_way_with_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClientConfig(**options)


async def test_invented_peers_are_no_attempts(open_client: OpenClient) -> None:
    config = ClientConfig(dtype="float32", max_attempts=1)
    async with open_client(config=config) as (client, swarm):
        for number in range(40):
            swarm.announce(f"invented-{number}", tokens_per_s=1e6)
        await swarm.serve("real", tokens_per_s=1.0)
        assert await text_of(client.generate(PROMPT, max_new_tokens=5)) == ", there was a little"


async def test_peers_that_swallow_what_they_are_asked_are_no_attempts(
    open_client: OpenClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening_race, "FIRST_HEDGE_S", 0.05)
    config = ClientConfig(dtype="float32", max_attempts=1)
    async with open_client(config=config) as (client, swarm):
        for number in range(12):
            host = swarm.network.host(f"silent-{number}")
            host.serve(SESSION_PROTOCOL, lambda stream: trio.sleep_forever())
            swarm.announce(f"silent-{number}", tokens_per_s=1e6)
        await swarm.serve("real", tokens_per_s=1.0)
        assert await text_of(client.generate(PROMPT, max_new_tokens=5)) == ", there was a little"
