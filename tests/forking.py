"""p2pinfer commands in processes of their own, forked from one that has imported what takes seconds.

A process of tests starts one server, this file run as a script, and sends it the arguments, environment and
standard streams of each command. The server forks, and the child becomes `p2pinfer`: it has a pid of its own,
and can be killed, frozen and waited for. How a process starts is shown by tests that use `subprocess`.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal

MODULES = (
    "p2pinfer.cli.output.progress",
    "p2pinfer.cli.output.swarm_table",
    "p2pinfer.cli.running",
    "p2pinfer.client",
    "p2pinfer.embedded",
    "p2pinfer.idle_audits",
    "p2pinfer.models.checkpoint.hub",
    "p2pinfer.node.node",
)
STREAMS = 4  # standard input, output and error, and the one that its pid and its exit code are written to
LENGTH_BYTES = 4


class Command:
    """A running `p2pinfer` command, with the part of `subprocess.Popen[str]` that tests use.

    Attributes:
        stdin: A pipe; None if the command was given something else. So are `stdout` and `stderr`.
        returncode: As of the last `poll` or `wait`.
    """

    def __init__(
        self, pid: int, news: IO[bytes], stdin: IO[str] | None, stdout: IO[str] | None, stderr: IO[str] | None
    ) -> None:
        self.pid = pid
        self.stdin, self.stdout, self.stderr = stdin, stdout, stderr
        self.returncode: int | None = None
        self._news = news

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        if self.returncode is None and select.select([self._news], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended; minus the number of the signal that killed it.

        Raises:
            subprocess.TimeoutExpired: It runs for longer than `timeout` seconds.
        """
        if self.returncode is None:
            if not select.select([self._news], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"p2pinfer (process {self.pid})", timeout or 0.0)
            with self._news:
                self.returncode = int(self._news.readline())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Close its standard input; what it still writes to its pipes until it ends."""
        if self.stdin is not None:
            self.stdin.close()
        said = ["", ""]

        def read(index: int, pipe: IO[str]) -> None:
            with pipe:
                said[index] = pipe.read()

        pipes = [(index, pipe) for index, pipe in enumerate((self.stdout, self.stderr)) if pipe is not None]
        readers = [threading.Thread(target=read, args=each, daemon=True) for each in pipes]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        return said[0], said[1]

    def send_signal(self, signum: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it ends just now: who forked it waits for it
                os.kill(self.pid, signum)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The process that forks commands, for the process that makes this object.

    Args:
        env: The environment in which it imports. Commands have it too, unless they are given another one;
            what libraries read while they are imported is as it is here.
    """

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        self._env = env
        self._asking = threading.Lock()
        self._orders, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=env,
                start_new_session=True,  # a Ctrl-C is for the tests, which end their commands themselves
            )

    def start(
        self,
        argv: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        stdin: IO[Any] | None = None,
        stderr: IO[Any] | None = None,
    ) -> Command:
        """Start a command.

        Args:
            argv: What follows `p2pinfer`.
            cwd: Its working directory.
            env: All of its environment.
            stdin: An open file to read instead of a pipe.
            stderr: An open file to write to instead of a pipe.
        """
        environ = next(dict(each) for each in (env, self._env, os.environ) if each is not None)
        order = json.dumps({"argv": list(argv), "cwd": str(cwd), "environ": environ}).encode()
        read_in, ours_in = _pipe("w") if stdin is None else (os.dup(stdin.fileno()), None)
        write_out, ours_out = _pipe("r")
        write_err, ours_err = _pipe("r") if stderr is None else (os.dup(stderr.fileno()), None)
        reading, write_news = os.pipe()
        theirs = [read_in, write_out, write_err, write_news]
        with self._asking:
            socket.send_fds(self._orders, [len(order).to_bytes(LENGTH_BYTES)], theirs)
            self._orders.sendall(order)
        for each in theirs:
            os.close(each)
        news = os.fdopen(reading, "rb", buffering=0)
        pid = news.readline()
        assert pid, "the process that forks commands has died"
        return Command(int(pid), news, ours_in, ours_out, ours_err)

    def run(
        self,
        argv: Sequence[str],
        *,
        cwd: Path,
        timeout: float,
        env: Mapping[str, str] | None = None,
        stdin: IO[Any] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, with nothing on its standard input unless a file is given.

        Raises:
            subprocess.TimeoutExpired: It took longer than `timeout` seconds, and was killed.
        """
        command = self.start(argv, cwd=cwd, env=env, stdin=stdin)
        try:
            text, said = command.communicate(timeout)
        finally:
            command.kill()
        return subprocess.CompletedProcess(["p2pinfer", *argv], command.wait(), text, said)

    def close(self) -> None:
        """End it, and every command that still runs."""
        self._orders.close()
        self._process.wait()


@cache
def fork_server() -> ForkServer:
    """This process's own, which ends with it."""
    server = ForkServer()
    atexit.register(server.close)
    return server


def _pipe(ours: Literal["r", "w"]) -> tuple[int, IO[str]]:
    """The other end of a pipe, and ours."""
    reading, writing = os.pipe()
    theirs, kept = (writing, reading) if ours == "r" else (reading, writing)
    return theirs, os.fdopen(kept, ours, encoding="utf-8")


# ---------------------------------------------------------------------- the server


def _serve(orders: socket.socket) -> None:
    """Fork commands until the connection ends; what runs then is killed."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, _note_child)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    running: dict[int, int] = {}  # pid -> the descriptor to write its exit code to
    while True:
        ready, _, _ = select.select([orders.fileno(), woken], [], [])
        if woken in ready:
            os.read(woken, 1 << 12)
            _reap(running)
        if orders.fileno() in ready:
            length, descriptors, _, _ = socket.recv_fds(orders, LENGTH_BYTES, STREAMS)
            if not length:
                break
            encoded = bytearray()
            while len(encoded) < int.from_bytes(length):
                encoded += orders.recv(int.from_bytes(length) - len(encoded))
            *streams, news = descriptors
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for ours in (orders.fileno(), woken, wake, news, *running.values()):
                    os.close(ours)
                _become(json.loads(encoded), streams)
            for stream in streams:
                os.close(stream)
            running[pid] = news
            os.write(news, b"%d\n" % pid)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _note_child(signum: int, frame: FrameType | None) -> None:
    """Python writes to the wake-up descriptor only for signals that have a handler."""


def _reap(running: dict[int, int]) -> None:
    for pid, news in list(running.items()):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            os.write(news, b"%d\n" % os.waitstatus_to_exitcode(status))
            os.close(running.pop(pid))


def _become(order: dict[str, Any], streams: Sequence[int]) -> None:
    try:
        os.chdir(order["cwd"])
        os.environ.clear()
        os.environ.update(order["environ"])
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
        sys.argv = ["p2pinfer", *order["argv"]]
        sys.path[0] = ""  # as with `python -m p2pinfer`
        tempfile.tempdir = None  # it was looked up in the server's environment
        import_module("p2pinfer.cli.app").main()
    finally:
        os._exit(99)  # not reached: the command ends its process


def main() -> None:
    """Import everything, then serve."""
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the command has it before it imports torch
    for name in MODULES:
        import_module(name)
    assert threading.active_count() == 1, "a fork takes no threads along"
    _serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
