"""What is kept of sessions, for how long, and how it is asked for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.errors import PeerError, PeerVanished, ProtocolViolation
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.node.evidence.store import (
    ASKS_AT_ONCE,
    EVIDENCE_PROTOCOL,
    LIMITS,
    MAX_CONTENT_BYTES,
    MAX_DIGESTS,
    EvidenceStore,
    contents_for,
    decode_answer,
    decode_ask,
    fetch_evidence,
    serve_evidence,
)
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.reputation.receipt import digest_of

from ..memory import MemoryNetwork

SESSION = b"s" * 16


def pairs(*contents: bytes) -> list[tuple[bytes, bytes]]:
    return [(digest_of(content), content) for content in contents]


def test_what_was_added_is_there_until_it_is_too_old() -> None:
    store = EvidenceStore(1000, keep_s=10)
    store.add(SESSION, pairs(b"one", b"two"), now=0)
    store.add(SESSION, pairs(b"three"), now=5)
    assert store.get(digest_of(b"one"), 14) == b"one"
    assert store.get(digest_of(b"none"), 14) is None
    assert store.held_bytes == 11
    assert store.get(digest_of(b"one"), 15.1) is None
    assert store.held_bytes == 0


def test_the_oldest_sessions_make_room() -> None:
    store = EvidenceStore(100, keep_s=10)
    for number in range(6):
        store.add(b"%d" % number, pairs(b"%d" % number * 20), now=number)
    assert store.held_bytes == 100
    assert store.get(digest_of(b"0" * 20), 6) is None
    assert store.get(digest_of(b"1" * 20), 6) is not None


def test_of_a_session_that_outgrows_its_share_the_beginning_is_kept() -> None:
    store = EvidenceStore(100, keep_s=10)
    store.add(b"small", pairs(b"kept"), now=0)
    store.add(b"greedy", pairs(b"x" * 20), now=0)
    store.add(b"greedy", pairs(b"y" * 20), now=0)
    store.add(b"greedy", pairs(b"z"), now=0)
    contents = [store.get(digest_of(each), 1) for each in (b"x" * 20, b"y" * 20, b"z", b"kept")]
    assert contents == [b"x" * 20, None, None, b"kept"]
    assert store.held_bytes == 24


def test_a_group_is_handed_out_when_one_peer_has_all_of_it() -> None:
    store = EvidenceStore(1000, keep_s=10)
    store.add(SESSION, pairs(b"one", b"two"), now=0)
    one, two = (digest_of(each) for each in (b"one", b"two"))
    event = store.watch(SESSION)
    store.note_sent("a", [one, digest_of(b"unknown")])
    store.note_sent("b", [two])
    assert not event.is_set()
    store.note_sent("a", [one, two])
    assert event.is_set()
    store.note_sent("a", [one])


def test_what_two_sessions_share_outlives_the_older() -> None:
    store = EvidenceStore(1000, keep_s=10)
    store.add(b"old", pairs(b"both"), now=0)
    store.add(b"new", pairs(b"both"), now=8)
    assert store.get(digest_of(b"both"), 12) == b"both"


def test_what_two_sessions_share_outlives_the_later_that_ends_first() -> None:
    store = EvidenceStore(1000, keep_s=10)
    store.add(b"old", pairs(b"both", b"own"), now=0)
    store.add(b"new", pairs(b"both"), now=1)
    store.add(b"old", pairs(b"more"), now=8)
    handed_out = store.watch(b"old")
    store.note_sent("a", [digest_of(each) for each in (b"both", b"own", b"more")])
    assert handed_out.is_set(), "whoever has the content has that of both sessions"
    assert store.get(digest_of(b"both"), 12) == b"both"
    assert store.get(digest_of(b"both"), 19) is None


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(b"abcdef"), st.integers(0, 3)), max_size=60))
def test_a_content_is_found_for_as_long_as_any_session_holds_it(events: list[tuple[int, int, int]]) -> None:
    store, now = EvidenceStore(1000, keep_s=5), 0.0
    touched: dict[int, float] = {}
    held: dict[int, set[bytes]] = {}
    for group, letter, wait in events:
        now += wait
        for old in [each for each, at in touched.items() if at + 5 < now]:
            del touched[old], held[old]
        touched[group] = now
        held.setdefault(group, set()).add(bytes([letter]))
        store.add(b"%d" % group, pairs(bytes([letter])), now)
        for each in (bytes([letter]) for letter in b"abcdef"):
            expected = each if any(each in contents for contents in held.values()) else None
            assert store.get(digest_of(each), now) == expected


@given(st.lists(st.tuples(st.integers(0, 5), st.binary(max_size=40), st.integers(0, 3)), max_size=60))
def test_the_store_never_holds_more_than_it_may(events: list[tuple[int, bytes, int]]) -> None:
    store, now = EvidenceStore(100, keep_s=5), 0.0
    for group, content, wait in events:
        now += wait
        store.add(b"%d" % group, pairs(content), now)
        assert 0 <= store.held_bytes <= 100
    store.forget_expired(now + 6)
    assert store.held_bytes == 0


@given(st.binary(max_size=200))
def test_garbage_is_a_violation_or_means_something(garbage: bytes) -> None:
    for decode in (decode_ask, decode_answer):
        with suppress(ProtocolViolation):
            assert len(decode(garbage)) <= MAX_DIGESTS


def test_an_answer_stops_where_it_would_grow_too_large() -> None:
    store = EvidenceStore(MAX_CONTENT_BYTES * 8, keep_s=10)
    half = [bytes([number]) * (MAX_CONTENT_BYTES // 2) for number in range(3)]
    store.add(SESSION, pairs(*half), now=0)
    answer = contents_for([store], [digest_of(each) for each in half], 0)
    assert [len(each or b"") for each in answer] == [MAX_CONTENT_BYTES // 2] * 2


async def test_evidence_is_fetched_by_its_digest() -> None:
    async with open_nursery() as nursery:
        network = MemoryNetwork(nursery)
        store = EvidenceStore(1 << 20, keep_s=10)
        serve_evidence(network.host("hop"), store)
        store.add(SESSION, pairs(b"", b"hidden", bytes(100_000)), trio.current_time())
        asked = [digest_of(each) for each in (b"hidden", b"unknown", bytes(100_000), b"")]
        found = await fetch_evidence(network.host("client"), "hop", asked)
        assert found == {asked[0]: b"hidden", asked[2]: bytes(100_000), asked[3]: b""}
        with pytest.raises(ProtocolViolation, match="evidence of 100006 bytes"):
            await fetch_evidence(network.host("client"), "hop", asked, max_bytes=1000)


async def test_who_asks_too_often_is_cut_off() -> None:
    async with open_nursery() as nursery:
        network = MemoryNetwork(nursery)
        serve_evidence(network.host("hop"), EvidenceStore(1 << 20, keep_s=10), clock=lambda: 0.0)
        client = network.host("client")
        for _ in range(ASKS_AT_ONCE):
            assert await fetch_evidence(client, "hop", [bytes(32)]) == {}
        with pytest.raises(PeerError):
            await fetch_evidence(client, "hop", [bytes(32)])
        assert await fetch_evidence(network.host("another"), "hop", [bytes(32)]) == {}


async def test_megabytes_are_handed_out_in_a_burst_and_then_at_a_rate(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A digest is 32 bytes long, and may be asked for again and again."""
    async with open_nursery() as nursery:
        network, store = MemoryNetwork(nursery), EvidenceStore(64 << 20, keep_s=1000)
        serve_evidence(network.host("hop"), store)
        store.add(SESSION, pairs(bytes(8 << 20)), trio.current_time())
        client, times = network.host("client"), [trio.current_time()]
        for _ in range(20):
            await fetch_evidence(client, "hop", [digest_of(bytes(8 << 20))])
            times.append(trio.current_time())
        burst = LIMITS.peer.burst_bytes // (8 << 20)
        assert times[burst] - times[0] < 0.1
        assert times[-1] - times[0] == pytest.approx(
            (20 - burst) * (8 << 20) / LIMITS.peer.bytes_per_s, abs=1
        )


async def test_what_the_store_has_dropped_is_not_held_for_a_slow_reader() -> None:
    async with open_nursery() as nursery:
        network, store = MemoryNetwork(nursery), EvidenceStore(4 << 20, keep_s=1000)
        serve_evidence(network.host("hop"), store)
        store.add(b"old", pairs(bytes(1 << 20), b"x" * 100_000), 0)
        stream = await network.host("client").open_stream("hop", EVIDENCE_PROTOCOL)
        ask = msgspec.msgpack.encode([[digest_of(bytes(1 << 20)), digest_of(b"x" * 100_000)]])
        await stream.send_all(len(ask).to_bytes(4, "big") + ask)
        received = len(await stream.receive_some(1))
        for number in range(4):
            store.add(b"new%d" % number, pairs(bytes([number + 1]) * (1 << 20)), 0)
        with suppress(PeerError):
            while received < (1 << 20) + 100_000 and (more := await stream.receive_some(1 << 16)):
                received += len(more)
        assert received < (1 << 20) + 1000  # the rest of what was being sent, and none of what came after it


def answering(head: bytes, content: bytes = b"") -> Callable[[PeerStream], Awaitable[None]]:
    async def answer(stream: PeerStream) -> None:
        await stream.receive_some()
        await stream.send_all(len(head).to_bytes(4, "big") + head + content)

    return answer


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (answering(b"\x91\x91\x03", b"abd"), ProtocolViolation),  # not what has that digest
        (answering(b"\x91\x92\x03\x03", b"abcabc"), ProtocolViolation),  # more than was asked for
        (answering(b"\x91\x91\xff", b"abc"), ProtocolViolation),  # of a negative size
        (answering(b"\x91\x91\x03", b"ab"), PeerVanished),
        (answering(b"nonsense"), ProtocolViolation),
        (answering(bytes(10_000)), ProtocolViolation),
    ],
)
async def test_what_comes_instead_of_evidence_is_the_peer_s_fault(
    answer: Callable[[PeerStream], Awaitable[None]], error: type[PeerError]
) -> None:
    async with open_nursery() as nursery:
        network = MemoryNetwork(nursery)
        network.host("hop").serve(EVIDENCE_PROTOCOL, answer)
        with pytest.raises(error):
            await fetch_evidence(network.host("client"), "hop", [digest_of(b"abc")])


async def test_who_never_answers_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    async with open_nursery() as nursery:
        network = MemoryNetwork(nursery)

        async def listen(stream: PeerStream) -> None:
            await trio.sleep_forever()

        network.host("hop").serve(EVIDENCE_PROTOCOL, listen)
        with pytest.raises(PeerVanished, match="no evidence in"):
            await fetch_evidence(network.host("client"), "hop", [bytes(32)])
