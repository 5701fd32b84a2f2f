"""Peers of js-libp2p in processes of their own, which do what a test tells them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import platformdirs
import trio

HERE: Final = Path(__file__).parent
FILES: Final = ("package.json", "package-lock.json", "peer.mjs")
OLDEST_NODE: Final = 20
INSTALL_S: Final = 240.0


class CannotRun(Exception):
    """There can be no JavaScript peer here; the message says why, in a line."""


def installed() -> Path:
    """A folder of the user's cache in which `node peer.mjs` runs, filled on the first call.

    The packages are those of package-lock.json, each checked against its hash by npm.

    Raises:
        CannotRun: node or npm is missing or too old, or the packages cannot be had.
    """
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise CannotRun(f"js-libp2p needs {program}, which is not installed")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").split(".")[0]) < OLDEST_NODE:
        raise CannotRun(f"js-libp2p needs node {OLDEST_NODE} or later; this is {version}")
    contents = {name: (HERE / name).read_bytes() for name in FILES}
    digest = hashlib.sha256(b"\0".join(contents.values())).hexdigest()[:16]
    folder = platformdirs.user_cache_path("p2pinfer") / "interop" / digest
    if not (folder / "complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        _npm_ci(folder)
        (folder / "complete").touch()
    return folder


def _npm_ci(folder: Path) -> None:
    argv = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    try:
        done = subprocess.run(
            argv, cwd=folder, capture_output=True, text=True, timeout=INSTALL_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as exc:
        raise CannotRun(f"npm did not fetch js-libp2p within {INSTALL_S:.0f} s") from exc
    if done.returncode != 0:
        why = next(iter(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        raise CannotRun(f"npm cannot fetch js-libp2p: {why}")


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
    folder: Path, *, listen: tuple[str, ...] = (), relay: bool = False
) -> AsyncGenerator[JavaScriptPeer]:
    """A started peer until the block ends.

    Args:
        folder: As `installed` gives it.
        listen: Multiaddrs; one that ends in `/p2p-circuit` means a reservation at that relay.
        relay: Carry connections for others.
    """
    process = await trio.lowlevel.open_process(
        ["node", "peer.mjs"],
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
