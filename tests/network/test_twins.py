"""Two processes with one identity, over real hosts: both hear of it, and the later one has to stop."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from p2pinfer.errors import IdentityTaken
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.host.host import HostConfig
from p2pinfer.node.swarm.duplicate_identity import DuplicateDetector
from p2pinfer.node.swarm.identity_check import DuplicateCheck
from p2pinfer.node.swarm.live_table import LiveTable
from p2pinfer.node.swarm.membership import SwarmMember, open_swarm
from p2pinfer.node.swarm.signed_records import seal
from p2pinfer.node.transport.identity import Identity, new_identity
from p2pinfer.routing.announcement import Announcement, encode_announcement

from ..ports import free_port

REVISION = "a" * 32
CONFIG = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",), mdns=False, upnp=False)
LIMIT_S = 120.0

Join = Callable[..., Awaitable[SwarmMember]]


@pytest.fixture
async def join(nursery: trio.Nursery, tmp_path: Path) -> Join:
    """Starts members, with a given identity if need be, that announce whenever they have to."""

    async def run(
        identity: Identity,
        bootstrap: list[str],
        listen: str,
        task_status: trio.TaskStatus[SwarmMember] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        async with open_swarm(identity, replace(CONFIG, listen=(listen,)), bootstrap, tmp_path) as member:
            await member.join(REVISION)
            wanted = trio.Event()
            wanted.set()

            def again() -> None:
                wanted.set()

            with member.disputed(again):
                task_status.started(member)
                while True:
                    await wanted.wait()
                    wanted = trio.Event()
                    await member.announce(offer(member))

    async def start(
        *met: str, identity: Identity | None = None, listen: str = CONFIG.listen[0]
    ) -> SwarmMember:
        member: SwarmMember = await nursery.start(run, identity or new_identity(), list(met), listen)
        return member

    async def limit() -> None:
        await trio.sleep(LIMIT_S)
        raise TimeoutError(f"the test took more than {LIMIT_S:g} s")

    nursery.start_soon(limit)
    return start


def offer(member: SwarmMember) -> Announcement:
    return Announcement(
        member.peer_id,
        "model",
        REVISION,
        BlockSpan(0, 4),
        "float32",
        10.0,
        1000,
        member.sequence.next(),
        addrs=member.addrs,
        instance=member.duplicates.instance,
        uptime_s=member.duplicates.uptime_s,
        twin=member.duplicates.suspect,
    )


def view_of(member: SwarmMember) -> LiveTable:
    view = vars(member)["_view"]
    assert isinstance(view, LiveTable)
    return view


async def both_know(first: SwarmMember, second: SwarmMember, caplog: pytest.LogCaptureFixture) -> None:
    """The second has to stop, and the first has said so and goes on."""
    with pytest.raises(IdentityTaken, match=r"already runs as .*--data-dir DIR.*delete some/identity\.key"):
        await second.duplicates.wait_taken("some/identity.key")
    while "has a copy of this node's identity" not in caplog.text:
        await trio.sleep(0.01)
    assert not first.duplicates.taken.is_set()
    assert caplog.text.count("has a copy of this node's identity") == 1


def has_run(member: SwarmMember) -> SwarmMember:
    """As if it had been started a minute and a half earlier."""
    vars(member.duplicates)["_started_at"] -= 90.0
    return member


async def test_a_twin_that_joins_by_the_first_one_has_to_stop(
    join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    identity = new_identity()
    first = has_run(await join(identity=identity))
    await both_know(first, await join(*first.addrs, identity=identity), caplog)


async def test_a_twin_that_is_known_by_its_address_before_it_starts_has_to_stop(
    join: Join, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pinfer.node.swarm.identity_check.AGAIN_S", 0.2)
    identity = new_identity()
    place = f"/ip4/127.0.0.1/tcp/{free_port()}"
    first = has_run(await join(f"{place}/p2p/{identity.peer_id}", identity=identity))
    await trio.sleep(0.3)
    second = await join(identity=identity, listen=place)
    await both_know(first, second, caplog)


async def test_twins_that_share_a_bootstrap_peer_hear_of_each_other(
    join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    identity, meeting_point = new_identity(), await join()
    first = has_run(await join(*meeting_point.addrs, identity=identity))
    await both_know(first, await join(*meeting_point.addrs, identity=identity), caplog)


async def test_twins_at_two_ends_of_a_swarm_hear_of_each_other(
    join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    identity, near = new_identity(), await join()
    far = await join(*near.addrs)
    first = has_run(await join(*near.addrs, identity=identity))
    await both_know(first, await join(*far.addrs, identity=identity), caplog)


async def test_twins_that_nobody_can_dial_hear_of_each_other_by_their_announcements(
    join: Join, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def in_vain(self: DuplicateCheck, addrs: object) -> bool:
        await trio.lowlevel.checkpoint()
        return False

    monkeypatch.setattr(DuplicateCheck, "call", in_vain)
    identity, meeting_point = new_identity(), await join()
    first = has_run(await join(*meeting_point.addrs, identity=identity))
    await both_know(first, await join(*meeting_point.addrs, identity=identity), caplog)


async def test_an_address_that_leads_back_to_a_node_is_no_twin(
    join: Join, caplog: pytest.LogCaptureFixture, nursery: trio.Nursery
) -> None:
    caplog.set_level(logging.INFO)
    alone = await join()
    calls = DuplicateCheck(new_identity(), CONFIG, alone.duplicates, alone.sequence)
    assert not await calls.call(alone.addrs), "it has another identity: its answers prove nothing"
    identity = new_identity()
    member = await join(identity=identity)
    assert await DuplicateCheck(identity, CONFIG, member.duplicates, member.sequence).call(member.addrs)
    assert "leads back to it" in caplog.text
    assert not member.duplicates.taken.is_set()


async def test_records_of_before_a_restart_are_no_twin(join: Join, caplog: pytest.LogCaptureFixture) -> None:
    """However late they are, and whatever instance they name, unless it is the present one."""
    identity, neighbour = new_identity(), await join()
    member = await join(*neighbour.addrs, identity=identity)
    old = replace(
        offer(member),
        instance=b"before!!",
        uptime_s=1e6,
        addrs=("/ip4/127.0.0.1/tcp/1",),
    )
    last = member.sequence.last
    for sequence, named in ((5, b""), (last + 100, b"earlier!"), (last + 200, b"")):
        record = seal(identity, encode_announcement(replace(old, sequence=sequence, twin=named)))
        view_of(neighbour).take(record)
        view_of(member).take(record)
    assert member.sequence.last >= last + 200, "neighbours listen to nothing below it"
    await trio.sleep(0.5)
    assert not member.duplicates.taken.is_set()
    assert "copy of this node's identity" not in caplog.text


async def test_of_two_that_started_together_one_stops_and_both_agree_on_which() -> None:
    identity = new_identity()
    one, other = DuplicateDetector(identity.peer_id), DuplicateDetector(identity.peer_id)
    assert one.meet(other.instance, 1.0) != other.meet(one.instance, 1.5)
