"""Peers of js-libp2p in processes of their own, which do what a test tells them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import trio

HERE: Final = Path(__file__).parent
OLDEST_NODE: Final = 20


class JavaScriptPeer:
    """One js-libp2p host. Made by `open_peer`.

    Attributes:
        peer_id: Known once it has started.
        events: What it says unasked.
    """

    def __init__(self, process: trio.Process) -> None:
        self.peer_id = ""
        self._process = process
        self._answers: dict[int, dict[str, Any]] = {}
        self._arrived = trio.Event()
        self._tell, self.events = trio.open_memory_channel[dict[str, Any]](64)

    async def do(self, order: str, **told: Any) -> dict[str, Any]:
        """Have it carry out one of the orders of peer.mjs; its answer.

        Raises:
            RuntimeError: It could not; the message is its own.
        """
        number = len(self._answers)
        self._answers[number] = {}
        assert self._process.stdin is not None
        line = json.dumps({"id": number, "do": order, **told})
        await self._process.stdin.send_all(line.encode() + b"\n")
        while not self._answers[number]:
            await self._arrived.wait()
        answer = self._answers[number]
        if "error" in answer:
            raise RuntimeError(f"{order}: {answer['error']}")
        return answer

    async def address(self, part: str = "/tcp/") -> str:
        """One of its addresses that contains `part`, once it has such a one."""
        found: str = (await self.do("addrs", part=part))["addrs"][0]
        return found

    async def read(self) -> None:
        """Take in what it says until it ends."""
        assert self._process.stdout is not None
        rest = b""
        async for received in self._process.stdout:
            *lines, rest = (rest + received).split(b"\n")
            for line in map(json.loads, lines):
                if "event" in line:
                    self._tell.send_nowait(line)
                else:
                    self._answers[line["id"]] = line
            self._arrived.set()
            self._arrived = trio.Event()


@asynccontextmanager
async def open_peer(
    javascript: tuple[Path, str], *, listen: tuple[str, ...] = (), relay: bool = False
) -> AsyncGenerator[JavaScriptPeer]:
    """A started peer until the block ends.

    Args:
        javascript: Folder to run in and node to run, as `installed` gives them.
        listen: Multiaddrs; one that ends in `/p2p-circuit` means a reservation at that relay.
        relay: Carry connections for others.
    """
    folder, node = javascript
    process = await trio.lowlevel.open_process(
        [node, "peer.mjs"],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "NODE_ENV": "production"},
    )
    async with trio.open_nursery() as nursery:
        peer = JavaScriptPeer(process)
        nursery.start_soon(peer.read)
        try:
            peer.peer_id = (await peer.do("start", listen=listen, relay=relay))["peer_id"]
            yield peer
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
                for stream in (process.stdin, process.stdout):
                    assert stream is not None
                    await stream.aclose()
            nursery.cancel_scope.cancel()
