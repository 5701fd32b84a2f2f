"""How often a process that looks for neighbours tries peers that others told of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import cast

import trio
import trio.testing

from p2pinfer.errors import PeerUnreachable
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.host.host import Host
from p2pinfer.node.swarm.bootstrap import NEIGHBOURS, TRIES_PER_S, BootstrapPeer, Neighbourhood
from p2pinfer.node.swarm.live_table import LiveTable
from p2pinfer.node.swarm.peer_book import PeerBook
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.routing.announcement import Announcement

REVISION = "ab" * 16
MINUTE_S = 60.0


class LonelyHost:
    """Has one neighbour, which tells nothing, and finds those who are `there`."""

    peer_id = "me"

    def __init__(
        self, *there: str, silent: Collection[str] = (), connected: Sequence[str] = ("neighbour",)
    ) -> None:
        self.there = there
        self.silent = silent
        self.connected = list(connected)
        self.tried: list[str] = []

    def connected_peers(self) -> list[str]:
        return list(self.connected)

    def when_disconnected(self, callback: Callable[[str], None]) -> None:
        """Nobody is lost."""

    async def connect(self, peer_id: str, addrs: Sequence[str] = (), *, hearsay: bool = False) -> None:
        await trio.sleep(10.0 if peer_id in self.silent else 0.05)
        self.tried.append(peer_id)
        if peer_id not in self.there:
            raise PeerUnreachable("connection refused", peer_id)
        self.connected.append(peer_id)

    async def open_stream(self, peer_id: str, *_: object, **__: object) -> None:
        await trio.lowlevel.checkpoint()
        raise PeerUnreachable("it tells nothing", peer_id)


class Models:
    """One model is of interest, and nobody gossips about it."""

    revisions = frozenset({REVISION})

    def topic_peers(self, revision: str) -> set[str]:
        return set()


def announce(view: LiveTable, peer_id: str, sequence: int) -> None:
    addrs = ("/ip4/11.0.0.1/tcp/9",)
    said = Announcement(
        peer_id, "m", REVISION, BlockSpan(0, 8), "float32", 9.0, 99, sequence, addrs=addrs, ttl_s=300.0
    )
    view.accept(said, b"record", told_by="neighbour")


async def test_peers_that_do_not_exist_are_tried_now_and_then(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """However many are announced, and however often: all of them may be at one victim."""
    host, view = LonelyHost(), LiveTable()
    neighbourhood = Neighbourhood(cast(Host, host), view, [], model_peers=Models())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(neighbourhood.keep)
        for sequence in range(int(MINUTE_S)):
            for number in range(40):
                announce(view, f"x{number}", sequence)
            await trio.sleep(1.0)
        nursery.cancel_scope.cancel()
    assert NEIGHBOURS < len(host.tried) <= NEIGHBOURS + MINUTE_S * TRIES_PER_S


async def test_peers_that_are_there_become_neighbours_at_once(autojump_clock: trio.testing.MockClock) -> None:
    there = [f"p{number}" for number in range(40)]
    host, view = LonelyHost(*there), LiveTable()
    for each in there:
        announce(view, each, 1)
    neighbourhood = Neighbourhood(
        cast(Host, host), view, [BootstrapPeer("neighbour", ())], model_peers=Models()
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(neighbourhood.keep)
        await trio.sleep(1.0)
        nursery.cancel_scope.cancel()
    assert len(host.connected) > NEIGHBOURS


async def test_a_peer_of_our_model_that_is_not_there_yet_is_tried_again_soon(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """It announces itself, and only then finds the relay that it can be reached through."""
    host, view = LonelyHost(connected=("neighbour", *(f"other{n}" for n in range(NEIGHBOURS)))), LiveTable()
    neighbourhood = Neighbourhood(cast(Host, host), view, [], model_peers=Models())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(neighbourhood.keep)
        announce(view, "late", 1)
        await trio.sleep(0.1)
        assert host.tried == ["late"]
        host.there = ("late",)
        await trio.sleep(0.5)
        assert "late" in host.connected
        nursery.cancel_scope.cancel()


async def test_a_silent_bootstrap_peer_delays_nobody(autojump_clock: trio.testing.MockClock) -> None:
    """One is there at the third try, while another's address swallows every packet for ten seconds."""
    host = LonelyHost("late", silent=["silent"], connected=())
    peers = [BootstrapPeer(name, ("/ip4/11.0.0.1/tcp/9",)) for name in ("silent", "late")]
    neighbourhood = Neighbourhood(cast(Host, host), LiveTable(), peers)
    host.there = ()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(neighbourhood.keep)
        await trio.sleep(0.5)
        host.there = ("late",)
        await trio.sleep(2.0)
        assert "late" in host.connected
        nursery.cancel_scope.cancel()


async def test_silent_peers_of_an_earlier_run_keep_no_place(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    """Eight that swallow packets were met last: the ninth is found after a few seconds, not after 20."""
    book = PeerBook(tmp_path)
    names = [new_identity().peer_id for _ in range(9)]
    for name in names:
        book.note(name, [f"/ip4/11.0.0.1/tcp/9/p2p/{name}"], reached=True)
    assert len(book.peers()) == 9
    last = book.peers()[-1].peer_id
    host = LonelyHost(last, silent=[name for name in names if name != last], connected=())
    neighbourhood = Neighbourhood(cast(Host, host), LiveTable(), (), book=book)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(neighbourhood.keep)
        await trio.sleep(3.5)
        assert last in host.connected
        nursery.cancel_scope.cancel()


class SilentStrangers(LonelyHost):
    """Swallows every dial but that of the bootstrap peer, which it loses once."""

    def __init__(self) -> None:
        super().__init__("bootstrap")
        self.connected = []
        self.met_at: list[float] = []
        self.on_loss: Callable[[str], None] = lambda peer_id: None

    def when_disconnected(self, callback: Callable[[str], None]) -> None:
        self.on_loss = callback

    async def connect(self, peer_id: str, addrs: Sequence[str] = (), *, hearsay: bool = False) -> None:
        await trio.sleep(0.05)
        if peer_id != "bootstrap":
            await trio.sleep(10)
            raise PeerUnreachable("no answer", peer_id)
        self.connected.append(peer_id)
        self.met_at.append(trio.current_time())


async def test_a_lost_bootstrap_peer_is_dialled_at_once_while_strangers_are_silent(
    autojump_clock: trio.testing.MockClock,
) -> None:
    host, view = SilentStrangers(), LiveTable()
    announce(view, "stranger", 1)
    neighbourhood = Neighbourhood(
        cast(Host, host), view, [BootstrapPeer("bootstrap", ("/ip4/11.0.0.1/tcp/9",))]
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(neighbourhood.keep)
        await trio.sleep(12)  # the stranger is being dialled again by now
        host.connected.clear()
        lost_at = trio.current_time()
        host.on_loss("bootstrap")
        await trio.sleep(5)
        nursery.cancel_scope.cancel()
    assert host.met_at[1] - lost_at < 1
