"""A process that has imported what takes seconds, and forks p2pinfer commands into the lab's hosts.

Reads a JSON object a line: an id, the host, argv, the working directory, environment and the files for the
three standard streams. Answers `{"id": ..., "pid": ...}`, and `{"id": ..., "exit": code}` when that one has
ended. Its children end with it, and it ends with its standard input. Runs inside the lab's mount and user
namespaces; each child goes on to its host's network namespace.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import threading
from importlib import import_module
from typing import Any

MODULES = (
    "p2pinfer.cli.app",
    "p2pinfer.cli.running",
    "p2pinfer.cli.output.progress",
    "p2pinfer.client",
    "p2pinfer.embedded",
    "p2pinfer.node.node",
    "tests.lab.pinned",
    "tests.lab.witness",
)
LOOK_EVERY_S = 0.02  # at children that may have ended
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Fork commands until standard input ends."""
    for name in MODULES:
        import_module(name)
    assert threading.active_count() == 1, "a fork takes no threads along"
    running: dict[int, Any] = {}
    _say({"ready": True})
    rest = b""
    while True:
        readable, _, _ = select.select([0], [], [], LOOK_EVERY_S)
        if readable:
            read = os.read(0, 1 << 16)
            if not read:
                return
            *lines, rest = (rest + read).split(b"\n")
            for line in lines:
                asked = json.loads(line)
                pid = _fork(asked)
                running[pid] = asked["id"]
                _say({"id": asked["id"], "pid": pid})
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            _say({"id": running.pop(pid), "exit": os.waitstatus_to_exitcode(status)})


def _say(answer: dict[str, Any]) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


def _fork(asked: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            _become(asked)
        finally:
            os._exit(99)  # not reached: the command ends its process
    return pid


def _become(asked: dict[str, Any]) -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    namespace = os.open(f"/run/netns/{asked['host']}", os.O_RDONLY)
    if _libc.setns(namespace, 0) != 0:
        raise OSError(ctypes.get_errno(), f"cannot enter {asked['host']}")
    os.close(namespace)
    os.setsid()
    os.chdir(asked["cwd"])
    os.environ.update(asked["environ"])
    modes = (os.O_RDONLY, os.O_WRONLY | os.O_CREAT | os.O_APPEND, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, (path, mode) in enumerate(zip(asked["streams"], modes, strict=True)):
        opened = os.open(path, mode)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - the old one has read ahead
    sys.argv = ["p2pinfer", *asked["argv"]]
    sys.path[0] = ""  # as with `python -m p2pinfer`
    import_module("tests.lab.witness").testify(asked["witness"])
    import_module("p2pinfer.cli.app").main()


if __name__ == "__main__":
    main()
