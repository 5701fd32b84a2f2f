"""Answers with a table of peers: what is in them, how many there are at a time, what they hold in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.errors import PeerError
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.host.length_prefix import receive_value, send_value
from p2pinfer.node.swarm.live_table import LiveTable
from p2pinfer.node.swarm.signed_records import seal
from p2pinfer.node.swarm.snapshot import (
    LIMITS,
    MAX_RESPONSE_BYTES,
    SNAPSHOT_PROTOCOL,
    decode_response,
    encode_response,
    fetch_snapshot,
    serve_snapshots,
    tags,
)
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.routing.announcement import Announcement, encode_announcement

from ..memory import MemoryNetwork

EVERYTHING = msgspec.msgpack.encode([None])  # a question of three bytes
PEERS = 60
_BASE = Announcement("", "m" * 200, "ab" * 16, BlockSpan(0, 8), "float32", 1.0, 0, 1, addrs=(), ttl_s=300.0)


def large_table(peers: int = PEERS) -> LiveTable:
    """Records of 4 kB, with as many long names as an announcement may have."""
    view = LiveTable()
    addrs = tuple(f"/dns4/{'a' * 200}{number}/tcp/1" for number in range(16))
    for _ in range(peers):
        identity = new_identity()
        said = replace(_BASE, peer_id=identity.peer_id, addrs=addrs)
        view.accept(said, seal(identity, encode_announcement(said)))
    return view


@dataclass
class Asker:
    """Peers that ask one server."""

    network: MemoryNetwork
    view: LiveTable

    async def ask(self, peer_id: str) -> PeerStream:
        stream = await self.network.host(peer_id).open_stream("server", SNAPSHOT_PROTOCOL)
        await send_value(stream, EVERYTHING)
        return stream

    async def is_answered(self, stream: PeerStream) -> bool:
        """True if the beginning of an answer comes."""
        with trio.move_on_after(1):
            try:
                return bool(await stream.receive_some(1))
            except PeerError:
                return False
        raise AssertionError("neither an answer nor a refusal")


@pytest.fixture
async def asker(nursery: trio.Nursery) -> Asker:
    network, view = MemoryNetwork(nursery), large_table()
    serve_snapshots(network.host("server"), view)
    return Asker(network, view)


@given(st.lists(st.tuples(st.binary(max_size=400), st.floats(-1, 1e6)), max_size=40))
def test_an_answer_made_in_pieces_is_what_messagepack_makes_of_it(records: list[tuple[bytes, float]]) -> None:
    encoded = encode_response(records)
    assert msgspec.msgpack.decode(encoded) == [[record, max(age_s, 0.0)] for record, age_s in records]
    assert decode_response(encoded) == [(record, max(age_s, 0.0)) for record, age_s in records]


def test_an_answer_stops_where_it_would_grow_too_large() -> None:
    record = bytes(8000)
    encoded = encode_response([(record, 1.0)] * 1000)
    assert MAX_RESPONSE_BYTES - 8013 < len(encoded) <= MAX_RESPONSE_BYTES


async def test_who_reads_nothing_is_answered_twice_at_a_time(asker: Asker) -> None:
    streams = [await asker.ask("greedy") for _ in range(5)]
    assert [await asker.is_answered(each) for each in streams] == [True, True, False, False, False]
    assert await asker.is_answered(await asker.ask("another"))
    for each in streams:
        await each.aclose()
    await trio.testing.wait_all_tasks_blocked()
    assert await asker.is_answered(await asker.ask("greedy"))


async def test_identities_of_one_address_range_share_its_places(asker: Asker) -> None:
    names = [f"greedy{number}" for number in range(LIMITS.address_range.turns + 3)]
    asker.network.ranges.update(dict.fromkeys(names, "192.0.2.0/24"))
    streams = [await asker.ask(name) for name in names]
    answered = [await asker.is_answered(each) for each in streams]
    assert answered == [True] * LIMITS.address_range.turns + [False] * 3
    assert await asker.is_answered(await asker.ask("honest"))


async def test_what_nobody_reads_is_not_encoded(nursery: trio.Nursery, autojump_clock: object) -> None:
    """An answer waits for its reader with one piece in its hands, and no longer than a slow line would."""
    network = MemoryNetwork(nursery)
    serve_snapshots(network.host("server"), large_table())
    handler = network.hosts["server"].handlers[SNAPSHOT_PROTOCOL]
    unread = Unread(msgspec.msgpack.encode([None]))
    started = trio.current_time()
    with pytest.raises(PeerError, match="took no answer in"):
        await handler(cast(PeerStream, unread))
    assert unread.sent <= 1 << 16
    assert 10 <= trio.current_time() - started < 60


class Unread(trio.abc.Stream):
    """A stream whose other end asks, takes the first piece of the answer in and no more."""

    peer_id = address_range = "silent"

    def __init__(self, question: bytes) -> None:
        self._question = len(question).to_bytes(4, "big") + question
        self.sent = 0

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        question, self._question = self._question, b""
        return question

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.sent:
            await trio.sleep_forever()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.sent += len(data)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_who_asks_again_and_again_gets_no_more_than_its_budget(
    nursery: trio.Nursery, autojump_clock: object
) -> None:
    network, view = MemoryNetwork(nursery), large_table(300)
    serve_snapshots(network.host("server"), view)
    client, received = network.host("greedy"), 0
    started = trio.current_time()
    while trio.current_time() < started + 60:
        stream = await client.open_stream("server", SNAPSHOT_PROTOCOL)
        await send_value(stream, EVERYTHING)
        received += len(await receive_value(stream, MAX_RESPONSE_BYTES))
        await stream.aclose()
        await trio.sleep(0.5)
    most = LIMITS.peer.burst_bytes + 65 * LIMITS.peer.bytes_per_s
    assert most / 2 < received <= most
    # Somebody else is told everything meanwhile, and of what it has been told already nothing any more.
    newcomer = LiveTable()
    assert await fetch_snapshot(network.host("newcomer"), newcomer, "server") == 300
    assert await fetch_snapshot(network.host("newcomer"), newcomer, "server") == 0
    assert len(tags(newcomer.records())) == 300 * 8


async def test_a_thin_line_takes_a_large_answer_in(nursery: trio.Nursery, autojump_clock: object) -> None:
    """A megabyte over a quarter of a megabit a second, where ten seconds were all it had."""
    network, view = MemoryNetwork(nursery), large_table(200)
    serve_snapshots(network.host("fast"), view)

    async def forward_slowly(stream: PeerStream) -> None:
        question = await receive_value(stream, 1 << 16)
        behind = await network.hosts["thin"].open_stream("fast", SNAPSHOT_PROTOCOL)
        await send_value(behind, question)
        answer = await receive_value(behind, MAX_RESPONSE_BYTES)
        whole = len(answer).to_bytes(4, "big") + answer
        for at in range(0, len(whole), 32_000):
            await trio.sleep(1)
            await stream.send_all(whole[at : at + 32_000])

    network.host("thin").serve(SNAPSHOT_PROTOCOL, forward_slowly)
    assert await fetch_snapshot(network.host("newcomer"), LiveTable(), "thin") == 200
