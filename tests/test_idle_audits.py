"""A node's rounds: when they are made, over whom, and what stops them."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import trio
import trio.testing

from p2pinfer.client import Client, ClientConfig
from p2pinfer.client_config import AuditConfig
from p2pinfer.config import SharedConfig
from p2pinfer.embedded import client_host_config
from p2pinfer.errors import NoRoute
from p2pinfer.idle_audits import (
    Identities,
    IdleAudits,
    LeastKnown,
    VerifyConfig,
    open_idle_audits,
    read_texts,
)
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL, resolve_model
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.events import Event, NodeLeaving, Ready, SessionClosed, SessionOpened, Verified
from p2pinfer.node.host_config import HostConfig
from p2pinfer.reputation.config import LedgerConfig
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.verdict import Verdict
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.policy import RoutingPolicy
from p2pinfer.routing.route import Candidate, RouteRequest

from .audit.audited_swarm import ALWAYS, OpenClient, cheat, noisy, open_client, swarm
from .node.memory_swarm import MemorySwarm

__all__ = ["open_client", "swarm"]  # fixtures

READY = Ready("me", ("/memory/me",), "tiny-stories", "r" * 32, (0, 8), "float32", "cpu", 1.0, 1)
REQUEST = RouteRequest("r" * 32, 8, 640, 10)
AT_ONCE = VerifyConfig(enabled=True, share=1, idle_s=0, pause_s=0, texts=1, max_new_tokens=24)


def opened(client: str = "a client", sessions: int = 1) -> SessionOpened:
    return SessionOpened(client, (0, 8), 10, sessions)


def candidate(peer_id: str, start: int, stop: int) -> Candidate:
    return Candidate(
        Announcement(peer_id, "model", "r" * 32, BlockSpan(start, stop), "float32", 10.0, 1000, 1)
    )


class Rounds:
    """Counts the clients that idle-time audits open; none of them gets to do anything."""

    def __init__(self) -> None:
        self.begun = self.ended = 0
        self.policies: list[RoutingPolicy] = []

    @asynccontextmanager
    async def open_client(
        self, policy: RoutingPolicy, own: str, addrs: Sequence[str]
    ) -> AsyncGenerator[Client]:
        assert (own, tuple(addrs)) == (READY.peer_id, READY.addrs)
        self.begun += 1
        self.policies.append(policy)
        try:
            await trio.sleep_forever()
            yield
        finally:
            self.ended += 1


async def test_rounds_wait_for_a_node_that_serves_and_is_idle_and_end_when_it_is_not(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    rounds = Rounds()
    idle_audits = IdleAudits(rounds.open_client, VerifyConfig(idle_s=10, pause_s=30), rng=random.Random(1))
    nursery.start_soon(idle_audits.serve)
    await trio.sleep(100)
    assert rounds.begun == 0  # it does not serve yet
    idle_audits.note(READY)
    await trio.sleep(5)
    idle_audits.note(opened())
    await trio.sleep(100)
    assert rounds.begun == 0  # somebody is served
    idle_audits.note(SessionClosed("a client", 10, "done", 0))
    idle_audits.note(NodeLeaving(0))
    await trio.sleep(9)
    assert rounds.begun == 0
    await trio.sleep(2)
    assert (rounds.begun, rounds.ended) == (1, 0)
    idle_audits.note(opened())
    await trio.sleep(0.1)
    assert rounds.ended == 1
    idle_audits.note(SessionClosed("a client", 10, "done", 0))
    await trio.sleep(12)
    assert rounds.begun == 1  # the pause
    await trio.sleep(50)
    assert rounds.begun == 2


async def test_a_round_finds_who_cheats(
    swarm: MemorySwarm, open_client: OpenClient, nursery: trio.Nursery
) -> None:
    cheat(await swarm.serve("b", 0, 8), partial(noisy, generator=torch.Generator().manual_seed(1)))
    await swarm.serve("me", 0, 8)
    ledger, told = Ledger(), list[Event]()
    done = trio.Event()

    @asynccontextmanager
    async def join(policy: RoutingPolicy, own: str, addrs: Sequence[str]) -> AsyncGenerator[Client]:
        async with open_client(policy=policy, reputation=ledger, audit=ALWAYS) as client:
            yield client

    def report(event: Event) -> None:
        told.append(event)
        if ledger.is_banned("b"):
            done.set()

    idle_audits = IdleAudits(join, AT_ONCE, report, random.Random(1))
    idle_audits.note(READY)
    nursery.start_soon(idle_audits.serve)
    await done.wait()  # of a text of a few tokens there is nothing to tell, and some are that short
    assert told[-1] == Verified(1, 0, 1, 0)
    assert ledger.account("me").audits == 0


def test_identities_are_new_or_hours_old_and_audit_no_more_than_those_of_clients() -> None:
    """A client is sure to audit a peer in its first eight sessions with it."""
    kept, at = Identities(random.Random(1)), dict[str, list[float]]()
    for number in range(2000):
        at.setdefault(kept.current(600.0 * number).peer_id, []).append(600.0 * number)
    rounds = [len(each) for each in at.values()]
    assert max(rounds) == 2
    assert max(rounds) * VerifyConfig().texts <= LedgerConfig().newcomer_audits
    again = sorted(each[1] - each[0] for each in at.values() if len(each) == 2)
    assert 0.2 < len(again) / len(at) < 0.5
    assert again[0] < 3600 < again[-len(again) // 4]  # minutes old, or hours


def test_prompts_are_of_the_operators_own_texts_where_there_are_some(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffOne text.\nStill the same.\n\nAnother one.".encode())
    assert read_texts(path) == ["One text.\nStill the same.", "Another one."]
    assert read_texts(None) == []
    assert not caplog.text
    assert read_texts(tmp_path / "absent") == []
    path.write_bytes(b"\xff\xfe\xfd")
    assert read_texts(path) == []
    assert caplog.text.count("no prompts can be read from") == 2


async def test_an_error_of_ours_ends_a_round_and_no_node(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    rounds = 0

    @asynccontextmanager
    async def join(policy: RoutingPolicy, own: str, addrs: Sequence[str]) -> AsyncGenerator[Client]:
        nonlocal rounds
        rounds += 1
        raise IndexError("tuple index out of range")
        yield

    audits = IdleAudits(join, VerifyConfig(idle_s=1, pause_s=1), rng=random.Random(1))
    audits.note(READY)
    nursery.start_soon(audits.serve)
    await trio.sleep(60)
    assert rounds > 2
    assert "a round of audits ended in an error of our own" in caplog.text


async def test_where_there_is_nobody_a_round_comes_to_nothing(
    swarm: MemorySwarm, open_client: OpenClient, nursery: trio.Nursery
) -> None:
    await swarm.serve("me", 0, 8)
    rounds = 0
    twice = trio.Event()

    @asynccontextmanager
    async def join(policy: RoutingPolicy, own: str, addrs: Sequence[str]) -> AsyncGenerator[Client]:
        nonlocal rounds
        rounds += 1
        if rounds == 2:
            twice.set()
        config = ClientConfig(dtype="float32", find_timeout_s=0.01)
        async with open_client(policy=policy, audit=ALWAYS, config=config) as client:
            yield client

    def report(event: Event) -> None:
        raise AssertionError("nothing was checked")

    idle_audits = IdleAudits(join, AT_ONCE, report)
    idle_audits.note(READY)
    nursery.start_soon(idle_audits.serve)
    await twice.wait()


def test_routes_go_over_those_known_least_and_never_over_ourselves_alone() -> None:
    ledger = Ledger()
    for _ in range(300):
        ledger.record_audit("known", Verdict.PASS, 0.0)
    ledger.ban("banned")
    policy = LeastKnown("me", random.Random(1))
    peers = [candidate("known", 0, 8), candidate("new", 0, 8), candidate("banned", 0, 8)]
    mine = candidate("me", 0, 8)
    routes = [policy.choose_routes([*peers, mine], REQUEST, ledger)[0] for _ in range(200)]
    used = [route.peer_ids for route in routes]
    assert set(used) == {("known",), ("new",)}
    assert used.count(("new",)) > 180
    with pytest.raises(NoRoute):
        policy.choose_routes([mine], REQUEST, ledger)
    policy.readers = frozenset({"new"})  # it could know the prompt again
    routes = [policy.choose_routes(peers, REQUEST, ledger)[0] for _ in range(200)]
    assert 10 < [route.peer_ids for route in routes].count(("new",)) < 180
    # Where nobody else serves some blocks, our own help to look at who serves the others.
    (route,) = policy.choose_routes([mine, candidate("new", 0, 4)], REQUEST, ledger)
    assert route.peer_ids == ("new", "me")


@pytest.mark.parametrize(
    ("field", "value"), [("share", 0), ("share", 1.1), ("idle_s", -1), ("pause_s", -1), ("texts", 0)]
)
def test_settings_that_make_no_sense_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        VerifyConfig(**{field: value})  # type: ignore[arg-type]


async def test_a_nodes_patrol_joins_by_the_node_and_asks_it_for_no_opinion(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    seen: list[dict[str, object]] = []

    class Joined:
        def __init__(self, **options: object) -> None:
            seen.append(options)

        async def __aenter__(self) -> Joined:
            raise NoRoute("nobody")

        async def __aexit__(self, *_: object) -> None: ...

    monkeypatch.setattr("p2pinfer.idle_audits.Client", Joined)
    shared = SharedConfig(bootstrap=("/ip4/192.0.2.1/tcp/1/p2p/x",), cache_dir=tmp_path)  # type: ignore[arg-type]
    tell: Callable[[Event], None] = lambda _: None  # noqa: E731
    announced = HostConfig(announce=("/ip4/203.0.113.7/tcp/14001",))
    idle_audits = open_idle_audits(AT_ONCE, AuditConfig(rate=0.1), shared, announced, tell)
    idle_audits.note(READY)
    with trio.move_on_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(idle_audits.serve)
            while len(seen) < 2:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    one, other = seen[:2]
    assert one["bootstrap"] == ("/memory/me", "/ip4/192.0.2.1/tcp/1/p2p/x")
    assert one["verifier"] is other["verifier"]
    # What it tells others of itself is what a client does: nothing about the node.
    assert one["host_config"] == client_host_config(HostConfig(), embedding=False)
    audit = one["audit"]
    assert isinstance(audit, AuditConfig)
    assert (audit.rate, audit.own_peers) == (1.0, ("me",))


async def test_a_patrol_whose_folder_was_written_anew_checks_nobody_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Other:
        """A client that finds another model in the folder than their verifier did."""

        spec = replace(resolve_model(BUNDLED_MODEL, cache_dir=tmp_path).spec, revision="f" * 32)

        def __init__(self, **options: object) -> None: ...

        async def __aenter__(self) -> Other:
            return self

        async def __aexit__(self, *_: object) -> None: ...

        # There is no `generate`: a text would fail here.

    monkeypatch.setattr("p2pinfer.idle_audits.Client", Other)
    heard: list[Event] = []
    shared = SharedConfig(cache_dir=tmp_path)
    idle_audits = open_idle_audits(AT_ONCE, AuditConfig(), shared, HostConfig(), heard.append)
    idle_audits.note(READY)
    with trio.move_on_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(idle_audits.serve)
            while "audits no peers until it is started again" not in caplog.text:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    assert "audits no peers until it is started again" in caplog.text
    assert heard == []
