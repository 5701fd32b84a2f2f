"""Asking a real peer from where it sees us, and whether it gets through."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.errors import PeerError, PeerRefused, PeerVanished, ProtocolViolation
from p2pinfer.node.host.host import Host, HostConfig
from p2pinfer.node.reach import dialback
from p2pinfer.node.reach.dialback import (
    DIALBACK_PROTOCOL,
    ask,
    decode_request,
    decode_response,
    serve_dialback,
)
from p2pinfer.node.reach.temporary_listener import keep_open
from p2pinfer.node.transport.addresses import parse_tcp
from p2pinfer.node.transport.peer_stream import PeerStream

from ..ports import free_port
from .support import ECHO, StartHost, echo


def port_of(host: Host) -> int:
    return parse_tcp(host.listening[0])[2]


async def test_a_peer_says_where_it_sees_us_and_which_ports_answer(start_host: StartHost) -> None:
    asking, asked = await start_host(), await start_host()
    serve_dialback(asked)
    await asking.connect(asked.peer_id, asked.addrs)
    seen = await ask(asking, asked.peer_id, (port_of(asking), 1))
    assert (seen.peer_id, seen.seen_ip, seen.reached) == (asked.peer_id, "127.0.0.1", (port_of(asking),))
    assert seen.seen_port == seen.local_port
    assert asked.connected_peers() == [asking.peer_id]


async def test_a_port_where_somebody_else_answers_does_not_count(start_host: StartHost) -> None:
    asking, asked, other = await start_host(), await start_host(), await start_host()
    serve_dialback(asked)
    await asking.connect(asked.peer_id, asked.addrs)
    assert (await ask(asking, asked.peer_id, (port_of(other),))).reached == ()


async def test_of_a_connection_that_the_peer_made_the_port_says_nothing(start_host: StartHost) -> None:
    asking, asked = await start_host(), await start_host()
    serve_dialback(asked)
    await asked.connect(asking.peer_id, asking.addrs)
    seen = await ask(asking, asked.peer_id, ())
    assert (seen.seen_port, seen.local_port) == (port_of(asking), None)


async def test_who_asks_too_often_is_told_what_is_free_to_tell(
    start_host: StartHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialback, "ASKS_AT_ONCE", 1)
    asking, asked = await start_host(), await start_host()
    serve_dialback(asked)
    await asking.connect(asked.peer_id, asked.addrs)
    assert (await ask(asking, asked.peer_id, (port_of(asking),))).reached
    assert not (await ask(asking, asked.peer_id, (port_of(asking),))).reached


async def test_a_peer_that_does_not_know_the_question_or_answers_nonsense(
    start_host: StartHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking, asked = await start_host(), await start_host()
    await asking.connect(asked.peer_id, asked.addrs)
    with pytest.raises(PeerRefused):
        await ask(asking, asked.peer_id, ())

    async def babble(stream: PeerStream) -> None:
        await stream.send_all(b"\0\0\0\x03abc")

    async def hang(stream: PeerStream) -> None:
        await trio.sleep_forever()

    asked.serve(DIALBACK_PROTOCOL, babble)
    with pytest.raises(ProtocolViolation) as caught:
        await ask(asking, asked.peer_id, ())
    assert caught.value.peer_id == asked.peer_id
    asked.serve(DIALBACK_PROTOCOL, hang)
    monkeypatch.setattr(dialback, "ANSWER_S", 0.1)
    monkeypatch.setattr(dialback, "DIAL_S", 0.1)
    with pytest.raises(PeerVanished, match="no answer"):
        await ask(asking, asked.peer_id, ())


@given(st.binary(max_size=100))
def test_anything_else_is_the_peers_fault(encoded: bytes) -> None:
    for decode in (decode_request, decode_response):
        try:
            decode(encoded)
        except PeerError as exc:
            assert isinstance(exc, ProtocolViolation)


async def test_a_host_that_does_not_listen_lets_peers_in_at_a_port_of_its_choice(
    start_host: StartHost, nursery: trio.Nursery
) -> None:
    client, peer = await start_host(HostConfig(listen=())), await start_host()
    port = free_port()
    await nursery.start(keep_open, client, "127.0.0.1", port)
    client.serve(ECHO, echo)
    async with await peer.open_stream(client.peer_id, ECHO, [f"/ip4/127.0.0.1/tcp/{port}"]) as stream:
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
    async with await trio.open_tcp_stream("127.0.0.1", port) as stranger:
        await stranger.send_all(b"GET / HTTP/1.1\r\n\r\n")
        while await stranger.receive_some():
            pass
