"""p2pinfer commands in the hosts of a lab: started within a tenth of a second, watched, killed.

They are the commands a user types, down to their exit code; only the imports were made beforehand.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .lab import Lab
from .namespaces import environ_of_tests

LOOK_EVERY_S = 0.02
PATIENCE_S = 60.0

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Sighting:
    """What a command's host noticed about a peer."""

    at: float  # monotonic clock of this machine, seconds
    peer_id: str
    what: str  # host (the peer is the host itself), contact, relayed, direct, gone


class Command:
    """A p2pinfer command in a host. Made by `Commands.start`."""

    def __init__(self, host: str, folder: Path, look: Callable[[], None]) -> None:
        self.host = host
        self.folder = folder
        self.pid = 0
        self.exit_code: int | None = None
        self.started_at = time.monotonic()
        self._look = look

    @property
    def out(self) -> str:
        """What it printed so far."""
        return (self.folder / "stdout").read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        """What it wrote to standard error so far."""
        return (self.folder / "stderr").read_text(encoding="utf-8")

    def events(self) -> list[dict[str, Any]]:
        """The JSON lines it has printed in full."""
        return [json.loads(line) for line in self.out.splitlines(keepends=True) if line.endswith("\n")]

    def sightings(self, peer_id: str = "") -> list[Sighting]:
        """What its host noticed, in order; about one peer if given."""
        path = self.folder / "witness"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        seen = [json.loads(line) for line in lines if line.endswith("\n")]
        return [
            Sighting(each["at"], each["peer"], each["what"]) for each in seen if peer_id in ("", each["peer"])
        ]

    def event(self, kind: str, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        """The first event of a kind, waited for.

        Raises:
            TimeoutError: It did not come; the message has what the command said.
        """

        def look() -> dict[str, Any] | None:
            return next((event for event in self.events() if event.get("event") == kind), None)

        return self.wait_until(look, f"event {kind}", timeout_s)

    def sighting(self, peer_id: str, what: str, timeout_s: float = PATIENCE_S) -> Sighting:
        """The first sighting of a kind of a peer, waited for.

        Raises:
            TimeoutError: There was none.
        """

        def look() -> Sighting | None:
            return next((seen for seen in self.sightings(peer_id) if seen.what == what), None)

        return self.wait_until(look, f"peer {peer_id} {what}", timeout_s)

    def wait_until(self, look: Callable[[], _T | None], what: str, timeout_s: float = PATIENCE_S) -> _T:
        """Look until something is found.

        Raises:
            TimeoutError: Nothing was, or the command ended without it.
        """
        until = time.monotonic() + timeout_s
        while (found := look()) is None:
            self._look()
            if time.monotonic() > until or self.exit_code is not None:
                how = "waited in vain for" if self.exit_code is None else "ended without"
                raise TimeoutError(f"{self.host}: {how} {what}\n{self.out[-2000:]}\n{self.err[-4000:]}")
            time.sleep(LOOK_EVERY_S)
        return found

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Its exit code, once it has ended by itself.

        Raises:
            TimeoutError: It did not.
        """
        until = time.monotonic() + timeout_s
        while self.exit_code is None:
            self._look()
            if time.monotonic() > until:
                raise TimeoutError(f"{self.host}: still running\n{self.out[-2000:]}\n{self.err[-4000:]}")
            time.sleep(LOOK_EVERY_S)
        return self.exit_code

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        self._look()
        return self.exit_code

    def signal(self, signum: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        self._look()
        if self.exit_code is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        """End it as a power cut does: no goodbye, no FIN from the program; the kernel closes its sockets."""
        self.signal(signal.SIGKILL)
        self.wait()


class Commands:
    """Starts p2pinfer commands in a lab. Made by `open_commands`."""

    def __init__(self, lab: Lab, zygote: subprocess.Popen[bytes]) -> None:
        self.lab = lab
        self._zygote = zygote
        self.started: list[Command] = []  # in order
        self._rest = b""
        assert zygote.stdout is not None
        os.set_blocking(zygote.stdout.fileno(), False)

    def start(self, host: str, *argv: str, **environ: str) -> Command:
        """Start `p2pinfer ARGV` in a host, with folders of its own."""
        number = len(self.started)
        folder = self.lab.home / f"{number}-{host}"
        folder.mkdir()
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        command = Command(host, folder, self._look)
        self.started.append(command)
        request = {
            "id": number,
            "host": host,
            "argv": argv,
            "cwd": str(folder),
            "environ": {**self._folders(host), **environ},
            "streams": ["/dev/null", str(folder / "stdout"), str(folder / "stderr")],
            "witness": str(folder / "witness"),
        }
        assert self._zygote.stdin is not None
        self._zygote.stdin.write(json.dumps(request).encode() + b"\n")
        self._zygote.stdin.flush()
        command.wait_until(lambda: command.pid or None, "its process")
        return command

    def node(self, host: str, *argv: str) -> Command:
        """Start a node; with an identity of its own, unless `--data-dir` says which."""
        return self.start(host, "node", "--json", "--data-dir", "data", *_FRUGAL, *argv)

    def generate(self, host: str, prompt: str, *argv: str, **environ: str) -> Command:
        """Start a generation; its result is the JSON it prints."""
        return self.start(host, "generate", "--json", *argv, prompt, **environ)

    def _folders(self, host: str) -> dict[str, str]:
        home = self.lab.home / f"home-{host}"
        return {f"XDG_{kind}_HOME": str(home / kind.lower()) for kind in ("DATA", "CONFIG", "CACHE")}

    def _look(self) -> None:
        """Take in what the zygote has to say."""
        assert self._zygote.stdout is not None
        read = self._zygote.stdout.read()
        if read == b"":
            raise OSError("the process that starts commands has ended")
        *lines, self._rest = (self._rest + (read or b"")).split(b"\n")
        for line in lines:
            told = json.loads(line)
            if "pid" in told:
                self.started[told["id"]].pid = told["pid"]
            elif "exit" in told:
                self.started[told["id"]].exit_code = told["exit"]


_FRUGAL = ("--set", "compute.threads=1", "--dtype", "float32")


@contextmanager
def open_commands(lab: Lab) -> Generator[Commands]:
    """What starts commands in the lab's hosts; they are killed when the block ends."""
    with (lab.home / "zygote-stderr").open("wb") as said:
        zygote = subprocess.Popen(
            lab.corner.enter([sys.executable, "-m", "tests.lab.zygote"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=environ_of_tests(),
        )
    assert zygote.stdin is not None
    assert zygote.stdout is not None
    with zygote:
        try:
            if b"ready" not in zygote.stdout.readline():
                raise OSError((lab.home / "zygote-stderr").read_text())
            yield Commands(lab, zygote)
        finally:
            zygote.kill()  # and the kernel its children


def bootstrap(addrs: Sequence[str]) -> list[str]:
    """The flags by which others join at these addresses."""
    return [word for address in addrs for word in ("--bootstrap", address)]
