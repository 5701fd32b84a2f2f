"""Private swarms and lists of peers, over real sockets: who is kept out hears of it at once, and why."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pinfer.errors import NotAdmitted, PeerError, PeerUnreachable
from p2pinfer.node.host.host import Host, HostConfig
from p2pinfer.node.swarm.bootstrap import BootstrapPeer, Neighbourhood
from p2pinfer.node.swarm.live_table import LiveTable
from p2pinfer.node.swarm.snapshot import serve_snapshots
from p2pinfer.node.transport.identity import client_identity, new_identity
from p2pinfer.node.transport.swarm_key import make_swarm_key

from .support import ECHO, LOOPBACK, StartHost, echo, receive_exactly

AT_ONCE_S = 60.0  # for a busy machine, and below every time-out
PATIENT = replace(LOOPBACK, dial_timeout_s=600.0, stream_timeout_s=600.0, handshake_timeout_s=600.0)


def keyed(path: Path) -> HostConfig:
    if not path.exists():
        make_swarm_key(path)
    return replace(PATIENT, swarm_key=path)


def of_ours(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name.startswith("p2pinfer.node")]


async def test_members_of_a_private_swarm_talk(start_host: StartHost, tmp_path: Path) -> None:
    alice = await start_host(keyed(tmp_path / "key"))
    bob = await start_host(keyed(tmp_path / "key"))
    bob.serve(ECHO, echo)
    stream = await alice.open_stream(bob.peer_id, ECHO, bob.addrs)
    message = b"hello" * 100_000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, message)
        assert await receive_exactly(stream, len(message)) == message
    traffic = bob.counts.traffic["direct"]
    assert min(traffic.received, traffic.sent) > len(message)


@pytest.mark.parametrize(
    "ours, theirs, what_we_hear, what_they_log",
    [
        ("key", None, "it lacks the key of this private swarm", "whose key we lack"),
        (None, "key", "whose key we lack", "it lacks the key of this private swarm"),
        ("key", "other", "it has another key than this private swarm", "it has another key"),
    ],
)
async def test_a_peer_of_another_swarm_is_refused_at_once_on_both_sides(
    start_host: StartHost,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    ours: str | None,
    theirs: str | None,
    what_we_hear: str,
    what_they_log: str,
) -> None:
    alice = await start_host(keyed(tmp_path / ours) if ours else PATIENT)
    bob = await start_host(keyed(tmp_path / theirs) if theirs else PATIENT)
    with trio.fail_after(AT_ONCE_S), pytest.raises(NotAdmitted, match=what_we_hear):
        await alice.connect(bob.peer_id, bob.addrs)
    while not of_ours(caplog):
        await trio.lowlevel.checkpoint()
    (told,) = of_ours(caplog)
    assert told.levelno == logging.WARNING
    assert what_they_log in told.getMessage()
    assert "127.0.0.1" in told.getMessage()
    for _ in range(3):
        with pytest.raises(NotAdmitted):
            await alice.connect(bob.peer_id, bob.addrs)
    while bob.counts.total("refusals", "stranger") < 4:
        await trio.lowlevel.checkpoint()
    assert len(of_ours(caplog)) == 1  # once a minute for one address is enough


async def refused(alice: Host, bob: Host, *, optimistic: bool = False) -> PeerError:
    """What becomes of a connection that bob does not want, whenever alice notices."""
    with trio.fail_after(AT_ONCE_S), pytest.raises(PeerError) as caught:
        stream = await alice.open_stream(bob.peer_id, ECHO, bob.addrs, optimistic=optimistic)
        await stream.send_all(b"hello")
        await stream.receive_some()
    return caught.value


@pytest.mark.parametrize("listed", ["allow", "deny"])
async def test_who_is_not_let_in_is_told_so(
    start_host: StartHost, listed: str, caplog: pytest.LogCaptureFixture
) -> None:
    anna, eve = new_identity(), new_identity()
    lists: dict[str, Any] = {"allow": (anna.peer_id,)} if listed == "allow" else {"deny": (eve.peer_id,)}
    bob = await start_host(replace(PATIENT, **lists))
    bob.serve(ECHO, echo)
    welcome, unwelcome = await start_host(PATIENT, identity=anna), await start_host(PATIENT, identity=eve)
    await (await welcome.open_stream(bob.peer_id, ECHO, bob.addrs)).send_all(b"hello")
    error = await refused(unwelcome, bob)
    assert isinstance(error, NotAdmitted)
    assert "we are on its deny list, or not on its allow list" in str(error)
    assert f"ask its operator to let in {eve.peer_id}" in str(error)
    assert "which changes at every start: --identity FILE keeps the same id" in str(error)
    assert bob.connected_peers() == [anna.peer_id]
    assert bob.counts.by_label("refusals") == {"gated": 1}
    (told,) = [record.getMessage() for record in of_ours(caplog)]
    assert told.startswith(f"rejected a connection from peer {eve.peer_id}: it is ")
    assert listed in told


@pytest.mark.parametrize("optimistic", [False, True])
async def test_who_has_a_lasting_name_is_not_told_to_take_one(
    start_host: StartHost, tmp_path: Path, optimistic: bool
) -> None:
    eve = client_identity(tmp_path / "client.key")
    bob = await start_host(replace(PATIENT, deny=(eve.peer_id,)))
    error = await refused(await start_host(PATIENT, identity=eve), bob, optimistic=optimistic)
    assert str(error).endswith(f"ask its operator to let in {eve.peer_id}")


async def test_who_comes_onto_the_deny_list_is_hung_up_on(
    start_host: StartHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pinfer.node.transport.connection_gate.LOOK_S", 0.02)
    listed = tmp_path / "unwanted"
    listed.touch()
    alice, bob = await start_host(PATIENT), await start_host(replace(PATIENT, deny=(str(listed),)))
    await alice.connect(bob.peer_id, bob.addrs)
    await trio.sleep(0.1)
    assert bob.connected_peers() == [alice.peer_id]
    listed.write_text(alice.peer_id)
    with trio.fail_after(AT_ONCE_S):
        while alice.connected_peers():
            await trio.sleep(0.01)
    assert isinstance(await refused(alice, bob), NotAdmitted)


async def test_a_peer_that_is_denied_is_not_dialled_either(start_host: StartHost) -> None:
    bob = await start_host(PATIENT)
    alice = await start_host(replace(PATIENT, deny=(bob.peer_id,)))
    with pytest.raises(NotAdmitted, match="on our deny list"):
        await alice.connect(bob.peer_id, bob.addrs)
    assert bob.connected_peers() == []


async def test_waiting_for_a_swarm_ends_when_all_of_it_has_turned_us_away(
    start_host: StartHost, tmp_path: Path, caplog: pytest.LogCaptureFixture, nursery: trio.Nursery
) -> None:
    alice, bob = await start_host(keyed(tmp_path / "key")), await start_host(keyed(tmp_path / "other"))
    view = LiveTable()
    serve_snapshots(bob, view)
    neighbourhood = Neighbourhood(alice, view, [BootstrapPeer(bob.peer_id, bob.addrs)])
    nursery.start_soon(neighbourhood.keep)
    with trio.fail_after(AT_ONCE_S):
        await neighbourhood.decided.wait()
    assert not neighbourhood.settled.is_set()
    assert "it has another key" in neighbourhood.describe_failures()
    ours = [record for record in caplog.records if record.name.endswith("bootstrap")]
    assert [record.levelno for record in ours] == [logging.WARNING]


async def test_one_address_cannot_have_all_connections(
    start_host: StartHost, caplog: pytest.LogCaptureFixture
) -> None:
    bob = await start_host(replace(PATIENT, max_connections_per_address=2))
    port = int(bob.addrs[0].split("/")[4])
    streams = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(2)]
    for stream in streams:
        assert (await stream.receive_some(1)) == b"\x13"  # it has begun to talk to us
    alice = await start_host(PATIENT)
    with trio.fail_after(AT_ONCE_S), pytest.raises(PeerUnreachable):
        await alice.connect(bob.peer_id, bob.addrs)
    assert "it has 2 connections already" in caplog.text
    for stream in streams:
        await stream.aclose()
    with trio.fail_after(AT_ONCE_S):
        while True:
            try:
                return await alice.connect(bob.peer_id, bob.addrs)
            except PeerUnreachable:
                await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    "sent", [b"", b"\x13/multistream/1.0.0\n", b"\x13/multistream/1.0.0\n\x07/noise\n\x00"]
)
async def test_who_begins_and_does_not_go_on_is_cut_off(start_host: StartHost, sent: bytes) -> None:
    """Real sockets: a connection on which nothing happens costs a place for the handshake's time only."""
    bob = await start_host(replace(PATIENT, handshake_timeout_s=0.3))
    port = int(bob.addrs[0].split("/")[4])
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        if sent:
            await stream.send_all(sent)
        with trio.fail_after(AT_ONCE_S):
            while await stream.receive_some(1000):
                pass


async def test_streams_opened_too_fast_are_refused_and_the_connection_stays(start_host: StartHost) -> None:
    alice = await start_host(PATIENT)
    bob = await start_host(replace(PATIENT, streams_at_once=20, streams_per_s=0.001))
    bob.serve(ECHO, echo)
    await alice.connect(bob.peer_id, bob.addrs)
    error: PeerError | None = None
    for _ in range(30):
        try:
            await (await alice.open_stream(bob.peer_id, ECHO)).reset()
        except PeerError as exc:
            error = exc
    assert error is not None
    assert "streams were opened faster than it allows" in str(error)
    assert getattr(error, "is_passing", False)
    await alice.ping(bob.peer_id)
