"""Joining a swarm: bootstrap peers, snapshots, neighbours, with real hosts."""

from __future__ import annotations

import logging
import random
import socket
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import cast

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.errors import PeerVanished, ProtocolViolation
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.host.host import Host, HostConfig
from p2pinfer.node.host.length_prefix import receive_value, send_value
from p2pinfer.node.swarm import bootstrap, retries
from p2pinfer.node.swarm.anti_entropy import FIRST_S, LAST_S, AntiEntropy, next_pause_s
from p2pinfer.node.swarm.bootstrap import BootstrapPeer, Neighbourhood
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
from p2pinfer.node.transport.identity import Identity, new_identity
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.routing.announcement import Announcement, encode_announcement

from .support import DEAD, StartHost

REVISION, OTHER = "a" * 32, "b" * 32


def announce(view: LiveTable, revision: str = REVISION, host: Host | None = None) -> Identity:
    """Have somebody announce to `view`: `host`'s addresses, or nobody in particular."""
    identity = new_identity()
    announcement = Announcement(
        identity.peer_id,
        "model",
        revision,
        BlockSpan(0, 4),
        "float32",
        10.0,
        1000,
        1,
        addrs=host.addrs if host else (),
    )
    view.publish(identity, announcement)
    return identity


def peers(view: LiveTable) -> set[str]:
    return {announcement.peer_id for announcement in view.everybody()}


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


# ---------------------------------------------------------------------- neighbours


def as_bootstrap(host: Host) -> BootstrapPeer:
    return BootstrapPeer(host.peer_id, host.addrs)


async def test_one_bootstrap_peer_that_answers_is_enough(
    start_host: StartHost, nursery: trio.Nursery
) -> None:
    introducer, newcomer = await start_host(), await start_host()
    known, learned = LiveTable(), LiveTable()
    somebody = announce(known)
    serve_snapshots(introducer, known)
    dead = BootstrapPeer(new_identity().peer_id, (DEAD,))
    neighbourhood = Neighbourhood(newcomer, learned, [dead, as_bootstrap(introducer), as_bootstrap(newcomer)])
    assert neighbourhood.has_peers
    nursery.start_soon(neighbourhood.keep)
    await neighbourhood.settled.wait()
    assert peers(learned) == {somebody.peer_id}
    while not neighbourhood.describe_failures():
        await trio.lowlevel.checkpoint()
    assert dead.peer_id in neighbourhood.describe_failures()
    assert "refused" in neighbourhood.describe_failures()


async def test_a_bootstrap_peer_that_comes_late_is_found(
    start_host: StartHost, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "FIRST_RETRY_S", 0.01)
    identity = new_identity()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
    newcomer = await start_host()
    neighbourhood = Neighbourhood(newcomer, LiveTable(), [BootstrapPeer(identity.peer_id, (address,))])
    nursery.start_soon(neighbourhood.keep)
    while not neighbourhood.describe_failures():
        await trio.lowlevel.checkpoint()
    late = await start_host(HostConfig(listen=(address,)), identity)
    serve_snapshots(late, LiveTable())
    await neighbourhood.settled.wait()
    assert newcomer.connected_peers() == [identity.peer_id]
    assert neighbourhood.describe_failures() == ""


async def test_peers_from_the_table_fill_the_neighbourhood_up(
    start_host: StartHost, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "CHECK_INTERVAL_S", 0.03)
    monkeypatch.setattr(bootstrap, "NEIGHBOURS", 2)
    view = LiveTable()
    others = [await start_host() for _ in range(3)]
    for other in others:
        serve_snapshots(other, LiveTable())
    me = await start_host()
    send, connected = trio.open_memory_channel[str](3)
    me.when_connected(send.send_nowait)
    nursery.start_soon(Neighbourhood(me, view, []).keep)
    for other in others:
        view.accept(
            Announcement(
                other.peer_id, "m", REVISION, BlockSpan(0, 4), "float32", 1.0, 1, 1, addrs=other.addrs
            ),
            b"",
        )
    assert await connected.receive() != await connected.receive()
    looked = trio.Event()

    def enough() -> list[str]:
        looked.set()
        return [peer.peer_id for peer in others[:2]]

    monkeypatch.setattr(me, "connected_peers", enough)
    await looked.wait()
    with pytest.raises(trio.WouldBlock):
        connected.receive_nowait()


async def test_a_lost_neighbour_is_replaced_at_once(
    start_host: StartHost, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "CHECK_INTERVAL_S", 1000.0)
    monkeypatch.setattr(retries, "FIRST_RETRY_S", 1000.0)
    monkeypatch.setattr(bootstrap, "STEADY_S", 0.0)
    introducer, newcomer = await start_host(), await start_host()
    serve_snapshots(introducer, LiveTable())
    neighbourhood = Neighbourhood(newcomer, LiveTable(), [as_bootstrap(introducer)])
    nursery.start_soon(neighbourhood.keep)
    await neighbourhood.settled.wait()
    back, came_back = trio.open_memory_channel[str](1)
    introducer.when_connected(back.send_nowait)
    await hang_up(introducer)
    assert await came_back.receive() == newcomer.peer_id


async def hang_up(host: Host) -> None:
    """Have `host` close every connection it has."""
    for connections in list(host.libp2p.get_network().connections.values()):
        for connection in connections:
            await connection.close()


@pytest.mark.parametrize("answers", [True, False])
async def test_a_bootstrap_peer_that_accepts_and_hangs_up_is_dialled_ever_more_slowly(
    start_host: StartHost, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    delay_s = 0.02
    monkeypatch.setattr(bootstrap, "CHECK_INTERVAL_S", 0.001)
    monkeypatch.setattr(retries, "FIRST_RETRY_S", delay_s)
    introducer, newcomer = await start_host(), await start_host()
    if answers:
        serve_snapshots(introducer, LiveTable())
    tried_at: list[float] = []
    tried, attempts = trio.open_memory_channel[None](100)
    connect = newcomer.connect

    async def count(peer_id: str, addrs: Sequence[str] = (), **more: bool) -> None:
        if addrs:  # not for a stream
            tried_at.append(trio.current_time())
            tried.send_nowait(None)
        await connect(peer_id, addrs, **more)

    monkeypatch.setattr(newcomer, "connect", count)
    neighbourhood = Neighbourhood(newcomer, LiveTable(), [as_bootstrap(introducer)])
    nursery.start_soon(neighbourhood.keep)
    for _ in range(4):
        await attempts.receive()
        if answers:
            await neighbourhood.settled.wait()
        while not (newcomer.connected_peers() and introducer.connected_peers()):
            await trio.lowlevel.checkpoint()
        await hang_up(introducer)
    pauses = [after - before for before, after in pairwise(tried_at)]
    assert all(pause > 0.8 * delay_s * 2**number for number, pause in enumerate(pauses)), pauses
    while introducer.peer_id not in neighbourhood.describe_failures():
        await trio.lowlevel.checkpoint()


async def test_a_neighbour_that_did_not_answer_is_asked_again(
    start_host: StartHost, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "CHECK_INTERVAL_S", 0.03)
    introducer, newcomer = await start_host(), await start_host()
    neighbourhood = Neighbourhood(newcomer, LiveTable(), [as_bootstrap(introducer)])
    send, connected = trio.open_memory_channel[str](1)
    newcomer.when_connected(send.send_nowait)
    nursery.start_soon(neighbourhood.keep)
    await connected.receive()
    serve_snapshots(introducer, LiveTable())
    await neighbourhood.settled.wait()


async def test_nobody_answering_is_said_once_with_the_reasons(
    start_host: StartHost,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(retries, "FIRST_RETRY_S", 0.001)
    monkeypatch.setattr(retries, "LAST_RETRY_S", 0.004)
    monkeypatch.setattr(retries, "MAX_FAILED", 1)
    lonely = await start_host()
    dead = BootstrapPeer(new_identity().peer_id, (DEAD,))
    attempts, attempted = trio.open_memory_channel[str](0)
    connect = lonely.connect

    async def count(peer_id: str, addrs: Sequence[str] = (), **more: bool) -> None:
        await attempts.send(peer_id)
        await connect(peer_id, addrs, **more)

    monkeypatch.setattr(lonely, "connect", count)
    with caplog.at_level(logging.WARNING, "p2pinfer"):
        nursery.start_soon(Neighbourhood(lonely, LiveTable(), [dead]).keep)
        for _ in range(2 * bootstrap.WARN_AFTER):
            await attempted.receive()
    [record] = caplog.records
    assert dead.peer_id in record.getMessage()
    assert DEAD in record.getMessage()
