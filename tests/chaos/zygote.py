"""Has imported what takes seconds, and forks a node, a client or a crowd whenever it is told to.

A node that is started every few seconds would otherwise spend the machine on imports. What is forked is a
process of its own all the same: it runs the `p2pinfer` command, or a client of tests.chaos, and can die.

Reads a JSON object a line: id, kind ("node", "client" or "crowd"), argv, home. Answers with its pid, and
later with how it ended. When its standard input ends, it kills what is left. Run as
`python -m tests.chaos.zygote FD`; FD becomes the standard input of all, and ends with the process that
started this one.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

from . import client, vitals

MODULES = ("p2pinfer.cli.output.progress", "p2pinfer.cli.running", "p2pinfer.client", "p2pinfer.node.node")


def main() -> None:
    life = int(sys.argv[1])
    for name in MODULES:
        import_module(name)
    assert threading.active_count() == 1, "a fork takes no threads along"
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, _note_child)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGUSR1, _end)  # a client inherits it, and listens itself once it can
    children: dict[int, int] = {}  # what they were asked for as, by pid
    _say({"event": "ready"})
    unread = b""
    while True:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            os.read(woken, 1 << 12)
            _reap(children)
        if 0 in ready:
            received = os.read(0, 1 << 16)
            if not received:
                break
            *lines, unread = (unread + received).split(b"\n")
            for line in lines:
                asked = json.loads(line)
                signal.pthread_sigmask(
                    signal.SIG_BLOCK, {signal.SIGUSR1}
                )  # or Python forgets it while it forks
                pid = os.fork()
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    os.close(woken)
                    os.close(wake)
                    _become(asked, life)
                children[pid] = asked["id"]
                _say({"event": "started", "id": asked["id"], "pid": pid})
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _note_child(signum: int, frame: FrameType | None) -> None:
    """Python writes to the wakeup descriptor only for signals that have a handler."""


def _end(signum: int, frame: FrameType | None) -> None:
    os._exit(0)


def _reap(children: dict[int, int]) -> None:
    for pid in list(children):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            _say({"event": "ended", "id": children.pop(pid), "exit": os.waitstatus_to_exitcode(status)})


def _say(event: dict[str, Any]) -> None:
    os.write(1, json.dumps(event).encode() + b"\n")


def _become(asked: dict[str, Any], life: int) -> None:
    home = Path(asked["home"])
    os.chdir(home)
    os.dup2(life, 0)
    os.close(life)
    for number, name in ((1, "stdout"), (2, "stderr")):
        opened = os.open(home / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    vitals.install(home / "vitals.json")
    try:
        if asked["kind"] == "client":
            client.main(asked["argv"])
        elif asked["kind"] == "crowd":
            import_module("tests.chaos.crowd.__main__").main(asked["argv"])
        else:
            from p2pinfer.cli.app import leave, run

            sys.argv = ["p2pinfer", *asked["argv"]]
            leave(run(asked["argv"]))
    finally:
        sys.stderr.flush()
        os._exit(99)  # not reached: both end the process themselves


if __name__ == "__main__":
    main()
