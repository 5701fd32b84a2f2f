"""Who is there, by what became of the last try to reach them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio

from p2pinfer.errors import PeerUnreachable
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.host.host import Host, open_host
from p2pinfer.node.host.stranger_dials import StrangerDials
from p2pinfer.node.swarm.live_table import LiveTable
from p2pinfer.node.swarm.membership import open_swarm
from p2pinfer.node.swarm.presence import RETRY_S, SILENT_S, Presence
from p2pinfer.node.transport.identity import Identity, new_identity
from p2pinfer.routing.announcement import Announcement

from .support import DEAD, LOOPBACK, StartHost

WITHIN_S = 60.0


def announced(peer_id: str, addrs: tuple[str, ...], sequence: int = 1) -> Announcement:
    span = BlockSpan(0, 4)
    return Announcement(peer_id, "tiny", "ab" * 16, span, "float32", 10.0, 1000, sequence, addrs=addrs)


def watching(host: Host, view: LiveTable) -> Presence:
    watch = Presence(host, view)
    watch.watch()
    return watch


async def test_who_answers_is_connected_and_who_does_not_is_silent(start_host: StartHost) -> None:
    view, looker, there = LiveTable(), await start_host(), await start_host()
    ghost, unasked = announced(new_identity().peer_id, (DEAD,)), announced(new_identity().peer_id, ())
    known = [announced(there.peer_id, there.addrs), ghost, unasked]
    for each in known:
        view.accept(each, b"record")
    watch = watching(looker, view)
    with trio.fail_after(WITHIN_S):
        await watch.call(known, WITHIN_S)
    assert looker.connected_peers() == [there.peer_id]
    assert [watch.is_silent(each) for each in known] == [False, True, False]


async def test_a_dial_that_fails_for_anybody_tells_and_news_of_the_peer_ends_it(
    start_host: StartHost,
) -> None:
    view, looker, there = LiveTable(), await start_host(), await start_host()
    watch = watching(looker, view)
    moved = announced(there.peer_id, (DEAD,), sequence=7)
    view.accept(moved, b"record")
    await watch.call([moved], WITHIN_S)
    assert watch.is_silent(moved)
    again = replace(moved, sequence=8, addrs=there.addrs)
    assert not watch.is_silent(again)  # it has announced itself since
    await looker.connect(there.peer_id, there.addrs)
    assert not watch.is_silent(moved)  # it is connected


async def test_a_member_of_a_swarm_hears_of_the_dials_of_its_host(tmp_path: Path) -> None:
    async with open_swarm(new_identity(), LOOPBACK, (), tmp_path) as member:
        ghost = announced(new_identity().peer_id, (DEAD,))
        member._view.accept(ghost, b"record")  # pyright: ignore[reportPrivateUsage]  # as gossip does
        with trio.fail_after(WITHIN_S), pytest.raises(PeerUnreachable):
            await member.host.connect(ghost.peer_id, ghost.addrs)
        assert member.presence.is_silent(ghost)


async def test_silence_counts_for_a_minute_and_is_not_asked_again_at_once(start_host: StartHost) -> None:
    now = 1000.0
    view, looker = LiveTable(), await start_host()
    looker.stranger_dials = StrangerDials(clock=lambda: now)
    looker.stranger_dials.note_own(looker.addrs)
    watch = Presence(looker, view, lambda: now)
    watch.watch()
    ghost = announced(new_identity().peer_id, (DEAD,))
    view.accept(ghost, b"record")
    tries: list[str] = []
    looker.when_unreachable(lambda error: tries.append(error.peer_id))
    for _ in range(3):
        await watch.call([ghost], WITHIN_S)
    assert tries == [ghost.peer_id]
    now += RETRY_S
    await watch.call([ghost], WITHIN_S)
    assert tries == [ghost.peer_id] * 2
    now += SILENT_S - 1
    assert watch.is_silent(ghost)
    now += 1
    assert not watch.is_silent(ghost)


async def test_who_does_not_let_us_in_has_answered(start_host: StartHost) -> None:
    view, looker = LiveTable(), await start_host()
    closed = await start_host(replace(LOOPBACK, deny=(looker.peer_id,)))
    watch = watching(looker, view)
    said = announced(closed.peer_id, closed.addrs)
    view.accept(said, b"record")
    await watch.call([said], WITHIN_S)
    assert watch.refuses_us(closed.peer_id)
    assert not watch.is_silent(said)


async def test_a_host_that_was_ended_is_silent_at_the_next_call(
    start_host: StartHost,
) -> None:
    view, looker = LiveTable(), await start_host()
    watch = watching(looker, view)
    identity: Identity = new_identity()
    async with open_host(identity, LOOPBACK) as mortal:
        said = announced(mortal.peer_id, mortal.addrs)
        view.accept(said, b"record")
        await watch.call([said], WITHIN_S)
        assert not watch.is_silent(said)
    with trio.fail_after(WITHIN_S):
        while looker.connected_peers():
            await trio.sleep(0.01)
        await watch.call([said], WITHIN_S)
    assert watch.is_silent(said)
