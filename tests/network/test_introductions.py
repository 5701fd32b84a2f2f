"""Peers of different models, over real hosts: who serves the one introduces those who serve the other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from p2pinfer.models.span import BlockSpan
from p2pinfer.node.host.host import HostConfig
from p2pinfer.node.swarm.membership import SwarmMember, open_swarm
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.routing.announcement import Announcement

ONE, OTHER, THIRD = "a" * 32, "b" * 32, "c" * 32
CONFIG = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",), mdns=False, upnp=False)
LIMIT_S = 120.0

Join = Callable[..., Awaitable[SwarmMember]]


@pytest.fixture
async def join(nursery: trio.Nursery, tmp_path: Path) -> Join:
    """Starts members of a swarm that end with the test, and ends a test that hangs."""

    async def run(
        bootstrap: Sequence[str], task_status: trio.TaskStatus[SwarmMember] = trio.TASK_STATUS_IGNORED
    ) -> None:
        async with open_swarm(new_identity(), CONFIG, bootstrap, tmp_path) as member:
            task_status.started(member)
            await trio.sleep_forever()

    async def start(*met: SwarmMember, serves: str | None = None, asks: str | None = None) -> SwarmMember:
        member: SwarmMember = await nursery.start(run, [addr for each in met for addr in each.addrs])
        for revision in {serves, asks} - {None}:
            await member.join(str(revision))
        if serves is not None:
            await announce(member, serves)
        return member

    async def limit() -> None:
        await trio.sleep(LIMIT_S)
        raise TimeoutError(f"the test took more than {LIMIT_S:g} s")

    nursery.start_soon(limit)
    return start


async def announce(member: SwarmMember, revision: str) -> None:
    await member.announce(
        Announcement(
            member.peer_id,
            "model",
            revision,
            BlockSpan(0, 4),
            "float32",
            10.0,
            1000,
            member.sequence.next(),
            addrs=member.addrs,
            num_blocks=4,
        )
    )


async def knows(member: SwarmMember, *others: SwarmMember, revision: str = OTHER) -> None:
    """Until `member` has heard from all of the others that they serve the model."""
    wanted = {each.peer_id for each in others}
    while not wanted <= {each.peer_id for each in member.announcements(revision)}:
        await member.table_changed.wait()


async def test_peers_of_a_second_model_meet_at_a_node_of_the_first(join: Join) -> None:
    ordinary = await join(serves=ONE)
    first = await join(ordinary, serves=OTHER)
    second = await join(ordinary, serves=OTHER)
    await knows(first, second)
    await knows(second, first)
    while second.peer_id not in first.host.connected_peers():  # and talk to each other, not through it
        await trio.sleep(0.01)


async def test_peers_of_a_second_model_meet_across_two_nodes_of_the_first(join: Join) -> None:
    near = await join(serves=ONE)
    far = await join(near, serves=ONE)
    first = await join(near, serves=OTHER)
    second = await join(far, serves=OTHER)
    await knows(first, second)
    await knows(second, first)


async def test_peers_of_a_second_model_meet_at_somebody_who_asks_for_a_third(join: Join) -> None:
    client = await join(asks=THIRD)
    first = await join(client, serves=OTHER)
    second = await join(client, serves=OTHER)
    await knows(first, second)
    await knows(second, first)


async def test_a_client_of_one_model_finds_it_at_a_node_of_another(join: Join) -> None:
    ordinary = await join(serves=ONE)
    serving = [await join(ordinary, serves=OTHER) for _ in range(3)]
    client = await join(ordinary, asks=OTHER)
    await knows(client, *serving)
    while set(client.models()) != {ONE, OTHER}:
        await client.table_changed.wait()


async def test_what_is_introduced_says_goodbye_where_it_was_introduced(join: Join) -> None:
    ordinary = await join(serves=ONE)
    passing = await join(ordinary, serves=OTHER)
    await knows(ordinary, passing)
    (said,) = ordinary.announcements(OTHER)
    await passing.announce(replace(said, sequence=passing.sequence.next(), leaving=True))
    while ordinary.announcements(OTHER):
        await ordinary.table_changed.wait()
    assert set(ordinary.models()) == {ONE}
