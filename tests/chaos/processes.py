"""The processes of a chaos run: started through the zygote, harmed by signals, heard through files."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from p2pinfer.node.transport.identity import load_identity

from ..ports import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
START_S = 120.0


class Zygote:
    """Starts processes, and knows which of them have ended and how."""

    def __init__(self) -> None:
        self.exits: dict[int, int] = {}  # by request: numbers of processes come round again
        self._pids: dict[int, int] = {}  # request -> pid
        self._asked = 0
        self._unread = b""
        self._ready = False
        reading, self._life = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.zygote", str(reading)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[reading],
        )
        os.close(reading)
        self._wait(lambda: self._ready)

    def start(
        self, kind: Literal["node", "client", "crowd"], home: Path, argv: Sequence[str]
    ) -> tuple[int, int]:
        """(request, pid) of a new process that writes to `stdout` and `stderr` in `home`."""
        home.mkdir(parents=True, exist_ok=True)
        for name in ("stdout", "stderr"):
            (home / name).touch()
        self._asked += 1
        asked = {"id": self._asked, "kind": kind, "home": str(home), "argv": list(argv)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        self._process.stdin.flush()
        self._wait(lambda: self._asked in self._pids)
        return self._asked, self._pids.pop(self._asked)

    def listen(self, seconds: float) -> None:
        """Take in what has happened, waiting so long for the next thing."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            return
        received = os.read(self._process.stdout.fileno(), 1 << 16)
        assert received, "the zygote died"
        *lines, self._unread = (self._unread + received).split(b"\n")
        for line in lines:
            event = json.loads(line)
            match event["event"]:
                case "started":
                    self._pids[event["id"]] = event["pid"]
                case "ended":
                    self.exits[event["id"]] = event["exit"]
                case _:
                    self._ready = True

    def close(self) -> None:
        """Kill whatever is left."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()
        os.close(self._life)

    def _wait(self, done: Any) -> None:
        deadline = time.monotonic() + START_S
        while not done():
            assert time.monotonic() < deadline, "the zygote does not answer"
            self.listen(1.0)


class Process:
    """One of them. It keeps its folder over restarts, and what it said there."""

    kind: Literal["node", "client", "crowd"]

    def __init__(self, zygote: Zygote, home: Path) -> None:
        self.home = home
        self.pid = 0
        self.starts = 0
        self._asked = 0  # of the zygote, as
        self._handle = -1  # of this very process, whatever else gets its number
        self._zygote = zygote
        self._heard = 0  # bytes of its stdout

    def start(self, *argv: str) -> None:
        self.starts += 1
        self._asked, self.pid = self._zygote.start(self.kind, self.home, argv)
        if self._handle >= 0:
            os.close(self._handle)
        try:
            self._handle = os.pidfd_open(self.pid)
        except ProcessLookupError:  # it has ended already
            self._handle = -1

    @property
    def exit_code(self) -> int | None:
        """How it ended; None while it runs."""
        return self._zygote.exits.get(self._asked)

    def signal(self, signum: signal.Signals) -> None:
        """Send it, unless the process has ended."""
        if self.exit_code is None and self._handle >= 0:
            with suppress(ProcessLookupError):  # it has, and we have not heard of it yet
                signal.pidfd_send_signal(self._handle, signum)

    def events(self) -> list[dict[str, Any]]:
        """What it reported since the last look, whole lines only."""
        with (self.home / "stdout").open("rb") as file:
            file.seek(self._heard)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._heard += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines() if line.startswith(b"{")]

    def said(self) -> str:
        """All it wrote to standard error."""
        return (self.home / "stderr").read_text(encoding="utf-8", errors="replace")

    def wait_ended(self, seconds: float) -> int:
        """Its exit code.

        Raises:
            TimeoutError: It goes on.
        """
        deadline = time.monotonic() + seconds
        while self.exit_code is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.home.name} does not end within {seconds:g} s")
            self._zygote.listen(0.2)
        return self.exit_code


class NodeProcess(Process):
    """A `p2pinfer node` that is the same peer, at the same port, every time it is started."""

    kind = "node"

    def __init__(self, zygote: Zygote, home: Path, blocks: tuple[int, int] | None) -> None:
        """Set up; it does not run before `run`. `blocks` None: it introduces peers, and serves nothing."""
        super().__init__(zygote, home)
        self.blocks = blocks
        self.peer_id = load_identity(home).peer_id
        self.revision = ""  # of its model, once it serves
        self._ready_start = 0
        self.move()

    def move(self) -> None:
        """Listen at another port from the next start on."""
        self._listen = f"/ip4/127.0.0.1/tcp/{free_port()}"
        self.address = f"{self._listen}/p2p/{self.peer_id}"

    def run(self, bootstrap: Sequence[str], *flags: str) -> None:
        """Start it."""
        argv = ["node", "--json", "--until-stdin-closes"]
        argv += ["--blocks", "{}:{}".format(*self.blocks)] if self.blocks else ["--no-blocks"]
        argv += ["--dtype", "float32", "--listen", self._listen, "--data-dir", str(self.home)]
        argv += ["--set", "compute.threads=1", "--set", f"cache_dir={self.home.parent}", *flags]
        # What is kept for auditors grows for a quarter of an hour by design, and would hide other growth.
        argv += ["--set", f"serve.evidence_bytes={4 << 20}"]
        for address in bootstrap:
            argv += ["--bootstrap", address]
        self.start(*argv)

    @property
    def serves(self) -> bool:
        """Whether it has become ready since it was last started."""
        for event in self.events():
            self.revision = event.get("revision", self.revision)
            if event["event"] == "ready":
                self._ready_start = self.starts
        return self._ready_start == self.starts

    def wait_ready(self) -> None:
        """Until it serves."""
        deadline = time.monotonic() + START_S
        while not self.serves:
            assert self.exit_code is None, f"{self.home.name} ended: {self.said()}"
            assert time.monotonic() < deadline, f"{self.home.name} is not ready: {self.said()}"
            self._zygote.listen(0.1)


class ClientProcess(Process):
    """A tests.chaos client, another peer every time it is started."""

    kind = "client"

    def run(self, bootstrap: Sequence[str], seed: int, wait_s: float, *flags: str) -> None:
        """Start it."""
        argv = ["--seed", str(seed), "--wait", str(wait_s), "--home", str(self.home), *flags]
        for address in bootstrap:
            argv += ["--bootstrap", address]
        self.start(*argv)


class CrowdProcess(Process):
    """A crowd of tests.chaos, perhaps with a bootstrap node, that is killed when its time is over."""

    kind = "crowd"

    def __init__(self, zygote: Zygote, home: Path) -> None:
        super().__init__(zygote, home)
        self._bootstrap = home / "bootstrap", f"/ip4/127.0.77.1/tcp/{free_port()}"
        self.address = f"{self._bootstrap[1]}/p2p/{load_identity(self._bootstrap[0]).peer_id}"

    def run(
        self,
        node: NodeProcess,
        victims: Sequence[str],
        *flags: str,
        identities: int,
        introduces: bool = False,
    ) -> None:
        """Attack a node of eight blocks, with a bootstrap node at `address` if it `introduces`."""
        argv = ["--peer", node.peer_id, "--address", node.address, "--revision", node.revision]
        argv += ["--blocks", "8", "--identities", str(identities), "--victims", *victims, *flags]
        if introduces:
            argv += ["--bootstrap", *map(str, self._bootstrap)]
        self.start(*argv)
