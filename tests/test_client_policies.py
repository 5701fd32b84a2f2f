"""A client's routing policy: its own, the user's, and what it remembers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pinfer import client as client_module
from p2pinfer.client import Client, ClientConfig
from p2pinfer.errors import ModelNotFound, PolicyError
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.protocol.messages import SESSION_PROTOCOL
from p2pinfer.planning import opening_race
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.view import ReputationView
from p2pinfer.routing.config import RoutingConfig
from p2pinfer.routing.policy import Fastest, RiskAdjusted, RoutingPolicy, TrustedOnly
from p2pinfer.routing.route import Candidate, Hop, Route, RouteOutcome, RouteRequest

from .clients import PROMPT, OpenClient, Recorder, text_of


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
        def choose_routes(
            self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
        ) -> Sequence[Route]:
            runner._timeout_s = 0.05  # pyright: ignore[reportPrivateUsage]
            return super().choose_routes(candidates, request, view)

        def on_result(self, route: Route, outcome: RouteOutcome) -> None:
            super().on_result(route, outcome)
            done.wait()

    policy = Dreamer()
    config = ClientConfig(policy_timeout_s=60.0, dtype="float32")  # for its choice, on a busy machine
    async with open_client(policy=policy, config=config) as (client, swarm):
        runner = client._policy_runner  # pyright: ignore[reportPrivateUsage]
        await swarm.serve("a")
        for _ in range(3):
            assert await text_of(client.generate(PROMPT, max_new_tokens=1)) == ","
            while "on_result took longer" not in caplog.text:
                await trio.sleep(0.01)
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
        with trio.fail_after(client._audit_config.linger_s / 2):  # pyright: ignore[reportPrivateUsage]
            await client.__aexit__(None, None, None)  # nobody is left whose audits could be waited for


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
