"""Real hosts on loopback: streams, handlers, dialling."""

from __future__ import annotations

import trio

from p2pinfer.node.host import HostConfig, open_host
from p2pinfer.node.identity import new_identity
from p2pinfer.node.stream import PeerStream

LOOPBACK = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))


async def test_two_hosts_talk() -> None:
    async def echo(stream: PeerStream) -> None:
        while received := await stream.receive_some():
            await stream.send_all(received)

    with trio.fail_after(10):
        async with open_host(new_identity(), LOOPBACK) as alice, open_host(new_identity(), LOOPBACK) as bob:
            bob.serve("/test/echo", echo)
            async with await alice.open_stream(bob.peer_id, "/test/echo", bob.addrs) as stream:
                await stream.send_all(b"hello")
                assert await stream.receive_some() == b"hello"
                assert stream.peer_id == bob.peer_id
                assert alice.connected_peers() == [bob.peer_id]
                assert alice.connection_kind(bob.peer_id) == "direct"
