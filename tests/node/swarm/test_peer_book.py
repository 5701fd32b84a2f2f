"""Peers of earlier runs: what is kept, for how long, and how little of it is believed."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from p2pinfer.node.swarm.peer_book import EXPIRES_S, FILE_NAME, MAX_ADDRS, MAX_HEARD, MAX_REACHED, PeerBook
from p2pinfer.node.transport.identity import new_identity

ADDRESS = "/ip4/127.0.0.1/tcp/4001"


class Clock:
    now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def kept(book: PeerBook) -> None:
    """Until the book has been written."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(book.keep)
        await trio.sleep(0.1)
        nursery.cancel_scope.cancel()


async def test_who_was_reached_is_known_after_a_restart(tmp_path: Path, clock: Clock) -> None:
    peer_id = new_identity().peer_id
    book = PeerBook(tmp_path, clock)
    book.note(peer_id, [ADDRESS, f"/dns4/example.org/tcp/4001/p2p/{peer_id}"], reached=True)
    await kept(book)
    (known,) = PeerBook(tmp_path, clock).peers()
    assert (known.peer_id, known.reached) == (peer_id, True)
    assert known.addrs == (f"{ADDRESS}/p2p/{peer_id}", f"/dns4/example.org/tcp/4001/p2p/{peer_id}")


async def test_who_only_came_to_us_takes_no_place_of_those_we_reached(tmp_path: Path, clock: Clock) -> None:
    book = PeerBook(tmp_path, clock)
    reached = [new_identity().peer_id for _ in range(MAX_REACHED + 1)]
    for peer_id in reached:
        clock.now += 1
        book.note(peer_id, [ADDRESS], reached=True)
    for _ in range(100):
        clock.now += 1
        book.note(new_identity().peer_id, [ADDRESS], reached=False)
    book.note(reached[-1], ["/ip4/127.0.0.1/tcp/666"], reached=False)  # its word is not better than our dial
    await kept(book)
    known = PeerBook(tmp_path, clock).peers()
    assert [peer.peer_id for peer in known[:MAX_REACHED]] == reached[:0:-1]
    assert len(known) == MAX_REACHED + MAX_HEARD
    assert known[0].addrs == (f"{ADDRESS}/p2p/{reached[-1]}",)


async def test_peers_expire_and_a_clock_set_back_expires_nobody(tmp_path: Path, clock: Clock) -> None:
    peer_id = new_identity().peer_id
    book = PeerBook(tmp_path, clock)
    book.note(peer_id, [ADDRESS], reached=True)
    await kept(book)
    clock.now -= 1e8
    assert [peer.peer_id for peer in PeerBook(tmp_path, clock).peers()] == [peer_id]
    clock.now += 1e8 + EXPIRES_S - 1
    assert PeerBook(tmp_path, clock).peers()
    clock.now += 1
    assert not PeerBook(tmp_path, clock).peers()


async def test_nonsense_is_not_noted(tmp_path: Path, clock: Clock) -> None:
    peer_id, other = new_identity().peer_id, new_identity().peer_id
    book = PeerBook(tmp_path, clock)
    book.note(peer_id, ["/ip4/127.0.0.1/udp/1", "x" * 300, f"{ADDRESS}/p2p/{other}"], reached=True)
    book.note("nobody", [ADDRESS], reached=True)
    assert book.peers() == []
    book.note(peer_id, [f"/ip4/127.0.0.1/tcp/{port}" for port in range(1, 100)], reached=True)
    assert len(book.peers()[0].addrs) == MAX_ADDRS


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'[{"peer_id": 1}]', b"\xff", b"[" * 100_000])
def test_a_damaged_file_holds_nobody(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    assert PeerBook(tmp_path).peers() == []


async def test_without_a_folder_nothing_is_kept(clock: Clock) -> None:
    book = PeerBook(None, clock)
    book.note(new_identity().peer_id, [ADDRESS], reached=True)
    await book.keep()
    assert book.peers() == []


async def test_a_disk_that_cannot_be_written_is_said_once(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    (tmp_path / "file").touch()
    book = PeerBook(tmp_path / "file" / "below", clock)
    for _ in range(2):
        book.note(new_identity().peer_id, [ADDRESS], reached=True)
        await kept(book)
    assert caplog.text.count("cannot save known peers") == 1


def test_peers_of_another_swarm_are_forgotten(tmp_path: Path) -> None:
    book = PeerBook(tmp_path, file_name="client_peers.json")
    alice, bob = new_identity().peer_id, new_identity().peer_id
    book.note(alice, [ADDRESS], reached=True)
    book.keep_if_met([bob, alice])
    assert [peer.peer_id for peer in book.peers()] == [alice]
    book.keep_if_met([bob])
    assert book.peers() == []


async def test_whom_it_met_is_kept_though_the_peer_that_is_named_did_not_answer_then(
    tmp_path: Path, clock: Clock
) -> None:
    """A client was gone before that one answered; today it is the only one that is named."""
    met, silent = new_identity().peer_id, new_identity().peer_id
    book = PeerBook(tmp_path, clock)
    book.begin_with({met: [ADDRESS], silent: [ADDRESS]})
    book.note(met, [ADDRESS], reached=True)
    await kept(book)
    book = PeerBook(tmp_path, clock)
    book.begin_with({silent: [ADDRESS]})
    assert [peer.peer_id for peer in book.peers() if peer.reached] == [met]
    book.begin_with({new_identity().peer_id: [ADDRESS]})
    assert met not in {peer.peer_id for peer in book.peers()}
