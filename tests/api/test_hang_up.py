"""Clients that hang up in the middle of an answer leave nothing behind."""

from __future__ import annotations

import json

import trio

from .conftest import Door, OpenDoor

CLIENTS = 12


async def hang_up_after(door: Door, stream: bool, until: bytes) -> None:
    """Ask for a long text, and go when `until` is there; at once if it is empty."""
    wish = {"model": "tiny-stories", "prompt": "Once upon a time", "max_tokens": 900, "stream": stream}
    body = json.dumps(wish).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with await trio.open_tcp_stream("127.0.0.1", door.port) as client:
        await client.send_all(head + body)
        received = b""
        while until not in received:
            received += await client.receive_some()


async def test_no_session_is_left_on_any_hop(open_door: OpenDoor) -> None:
    async with open_door() as door:
        servers = [each.server for each in door.swarm.served.values()]
        async with trio.open_nursery() as nursery:
            for index in range(CLIENTS):
                nursery.start_soon(hang_up_after, door, True, b"data: " if index % 3 else b"HTTP/1.1 200")
        await door.swarm.all_closed()  # or the swarm's own limit ends the test

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hang_up_after, door, False, b"")
            nursery.start_soon(hang_up_after, door, True, b"")
        await door.swarm.all_closed()
        assert [server.sessions for server in servers] == [0, 0]
        await hang_up_after(door, True, b"data: ")  # and the next one is served
        await door.swarm.all_closed()
