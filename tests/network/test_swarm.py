"""Joining a swarm: bootstrap peers, snapshots, neighbours, with real hosts."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import cast

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.errors import PeerVanished, ProtocolViolation
from p2pinfer.node.host.length_prefix import receive_value, send_value
from p2pinfer.node.swarm.anti_entropy import FIRST_S, LAST_S, AntiEntropy, next_pause_s
from p2pinfer.node.swarm.live_table import LiveTable
from p2pinfer.node.swarm.proof_gossip import MAX_TOLD, Heard, Notice, ProofCarrier, encode_notice
from p2pinfer.node.swarm.signed_records import MAX_RECORD_BYTES, open_record, seal
from p2pinfer.node.swarm.snapshot import (
    MAX_RECORDS,
    MAX_REQUEST_BYTES,
    MAX_RESPONSE_BYTES,
    SNAPSHOT_PROTOCOL,
    decode_request,
    decode_response,
    encode_response,
    fetch_snapshot,
    serve_snapshots,
    tags,
    without,
)
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.routing.announcement import encode_announcement

from .support import StartHost
from .swarms import OTHER, REVISION, announce, peers

# ---------------------------------------------------------------------- snapshots


async def test_a_newcomer_learns_at_once_what_a_neighbour_knows(start_host: StartHost) -> None:
    old, newcomer = await start_host(), await start_host()
    known, learned = LiveTable(), LiveTable()
    mine, other = announce(known), announce(known, OTHER)
    serve_snapshots(old, known)
    await newcomer.connect(old.peer_id, old.addrs)
    assert await fetch_snapshot(newcomer, learned, old.peer_id, REVISION) == 1
    assert peers(learned) == {mine.peer_id}
    assert await fetch_snapshot(newcomer, learned, old.peer_id) == 1
    assert peers(learned) == {mine.peer_id, other.peer_id}


async def test_a_newcomer_hears_of_the_proofs_that_a_neighbour_holds(start_host: StartHost) -> None:
    old, newcomer = await start_host(), await start_host()
    known, learned = LiveTable(), LiveTable()
    mine, accuser = announce(known), new_identity()
    notice = Notice("proof", REVISION, bytes(32), "a liar")
    record = seal(accuser, encode_notice(notice))

    class Carrier:
        def __init__(self, *records: bytes) -> None:
            self.heard: list[Heard] = []
            self._records = records

        def records(self, revision: str | None) -> list[tuple[bytes, float]]:
            return [(each, 1.0) for each in self._records] if revision in (None, REVISION) else []

        def hear(self, heard: Heard) -> bool:
            self.heard.append(heard)
            return True

    serve_snapshots(old, known, cast(ProofCarrier, Carrier(*[record] * (MAX_TOLD + 1))))
    await newcomer.connect(old.peer_id, old.addrs)
    ours = Carrier()
    assert await fetch_snapshot(newcomer, learned, old.peer_id, OTHER, cast(ProofCarrier, ours)) == 0
    assert ours.heard == []
    assert await fetch_snapshot(newcomer, learned, old.peer_id, proofs=cast(ProofCarrier, ours)) == 1
    assert peers(learned) == {mine.peer_id}
    assert ours.heard == [Heard(notice, accuser.peer_id, record, old.peer_id)] * MAX_TOLD
    has_it = Carrier(record)
    assert await fetch_snapshot(newcomer, learned, old.peer_id, proofs=cast(ProofCarrier, has_it)) == 0
    assert has_it.heard == []


async def test_who_says_what_it_has_is_sent_the_rest(start_host: StartHost) -> None:
    old, other = await start_host(), await start_host()
    known, learned = LiveTable(), LiveTable()
    shared, missing = announce(known), announce(known)
    for record, age_s in known.records():
        if open_record(record)[0] == shared.peer_id:
            learned.take(record, age_s)
    sent: list[bytes] = []

    async def answer(stream: PeerStream) -> None:
        request = decode_request(await receive_value(stream, MAX_REQUEST_BYTES))
        assert request.known == tags(learned.records())
        sent.extend(record for record, _ in without(known.records(), request.known))
        await send_value(stream, encode_response(without(known.records(), request.known)))

    old.serve(SNAPSHOT_PROTOCOL, answer)
    await other.connect(old.peer_id, old.addrs)
    assert await fetch_snapshot(other, learned, old.peer_id) == 1
    assert [open_record(record)[0] for record in sent] == [missing.peer_id]
    serve_snapshots(old, known)
    assert await fetch_snapshot(other, learned, old.peer_id) == 0
    assert peers(learned) == {shared.peer_id, missing.peer_id}


async def test_what_gossip_lost_is_caught_up_with(start_host: StartHost, nursery: trio.Nursery) -> None:
    old, other = await start_host(), await start_host()
    known, learned = LiveTable(), LiveTable()
    serve_snapshots(old, known)
    catching_up = AntiEntropy(other, learned, lambda: [REVISION], rng=random.Random(1))
    assert await catching_up.compare() == 1.0  # nobody is there yet: the next turn comes soon
    await other.connect(old.peer_id, old.addrs)
    lost, foreign = announce(known), announce(known, OTHER)
    nursery.start_soon(catching_up.serve)
    while lost.peer_id not in peers(learned):
        await learned.changed.wait()
    assert foreign.peer_id not in peers(learned)
    old.stop_serving(SNAPSHOT_PROTOCOL)
    assert await catching_up.compare() == 0.0


def test_turns_come_sooner_after_news_and_rarely_in_the_long_run() -> None:
    pauses = [FIRST_S]
    while pauses[-1] < LAST_S:
        pauses.append(next_pause_s(pauses[-1], 0.0))
    assert sum(pauses[:5]) < 35  # five turns in the first half minute
    assert next_pause_s(LAST_S, 0.5) < LAST_S
    assert next_pause_s(FIRST_S, 0.5) == FIRST_S
    assert next_pause_s(LAST_S, 0.001) == LAST_S


async def test_forged_records_in_a_snapshot_are_left_out(start_host: StartHost) -> None:
    liar, newcomer = await start_host(), await start_host()
    known, learned = LiveTable(), LiveTable()
    true = announce(known)
    forged = seal(new_identity(), encode_announcement(known.everybody()[0]))

    async def answer(stream: PeerStream) -> None:
        content = encode_response([(forged, 0.0), (b"garbage", 0.0), *known.records()])
        await stream.receive_some()
        await stream.send_all(len(content).to_bytes(4, "big") + content)

    liar.serve(SNAPSHOT_PROTOCOL, answer)
    await newcomer.connect(liar.peer_id, liar.addrs)
    assert await fetch_snapshot(newcomer, learned, liar.peer_id) == 1
    assert peers(learned) == {true.peer_id}


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", PeerVanished),
        (b"\x00\x00", PeerVanished),
        (b"\x00\x00\x00\x09\x93", PeerVanished),
        ((MAX_RESPONSE_BYTES + 1).to_bytes(4, "big"), ProtocolViolation),
        (b"\x00\x00\x00\x01\xc1", ProtocolViolation),
        (b"\x00\x00\x00\x01\x01", ProtocolViolation),
    ],
)
async def test_a_peer_that_answers_nonsense_is_named(
    start_host: StartHost, answer: bytes, error: type[Exception]
) -> None:
    liar, newcomer = await start_host(), await start_host()

    async def respond(stream: PeerStream) -> None:
        await stream.receive_some()
        await stream.send_all(answer)

    liar.serve(SNAPSHOT_PROTOCOL, respond)
    await newcomer.connect(liar.peer_id, liar.addrs)
    with pytest.raises(error) as caught:
        await fetch_snapshot(newcomer, LiveTable(), liar.peer_id)
    assert getattr(caught.value, "peer_id", "") in ("", liar.peer_id)


async def test_a_peer_that_does_not_answer_is_given_up(
    start_host: StartHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pinfer.node.swarm.snapshot.GRACE_S", 0.1)
    silent, newcomer = await start_host(), await start_host()

    async def say_nothing(stream: PeerStream) -> None:
        await trio.sleep_forever()

    silent.serve(SNAPSHOT_PROTOCOL, say_nothing)
    await newcomer.connect(silent.peer_id, silent.addrs)
    with pytest.raises(PeerVanished, match="no snapshot"):
        await fetch_snapshot(newcomer, LiveTable(), silent.peer_id)


async def test_a_request_that_is_none_ends_its_stream_only(start_host: StartHost) -> None:
    old, newcomer = await start_host(), await start_host()
    known, learned = LiveTable(), LiveTable()
    announce(known)
    serve_snapshots(old, known)
    for request in (b"\x00\x00\x00\x01\xc1", b"\xff\xff\xff\xff", b"\x00"):
        stream = await newcomer.open_stream(old.peer_id, SNAPSHOT_PROTOCOL, old.addrs)
        await stream.send_all(request)
        await stream.muxed.close()
        with pytest.raises(PeerVanished):
            await stream.receive_some()
    assert await fetch_snapshot(newcomer, learned, old.peer_id) == 1


def test_a_response_is_bounded_and_the_youngest_come_first() -> None:
    records = [(bytes(MAX_RECORD_BYTES), float(age_s)) for age_s in range(MAX_RECORDS)]
    encoded = encode_response(records)
    assert len(encoded) <= MAX_RESPONSE_BYTES
    assert [age_s for _, age_s in decode_response(encoded)][:3] == [0.0, 1.0, 2.0]
    assert len(decode_response(encode_response([(b"x", 0.0)] * (MAX_RECORDS + 1)))) == MAX_RECORDS


@given(st.binary(max_size=200))
def test_garbage_is_a_violation_or_a_snapshot(encoded: bytes) -> None:
    for decode in (decode_request, decode_response):
        with suppress(ProtocolViolation):
            decode(encoded)
