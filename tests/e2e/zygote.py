"""A process that has imported what takes seconds, and becomes the `p2pinfer` command as often as it is asked.

Reads a JSON object a line: argv, cwd, environ, and the files for the three standard streams. Forks, lets the
child run the command as `p2pinfer` would, and writes its exit code as a line. Run as a script by tests.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from importlib import import_module
from typing import Any

MODULES = (
    "p2pinfer.cli.output.progress",
    "p2pinfer.cli.running",
    "p2pinfer.cli.output.swarm_table",
    "p2pinfer.client",
    "p2pinfer.embedded",
    "p2pinfer.models.checkpoint.hub",
    "p2pinfer.node.node",
)


def main() -> None:
    _import_everything()
    assert threading.active_count() == 1, "a fork takes no threads along"
    for line in sys.stdin:
        print(_run(json.loads(line)), flush=True)


def _import_everything() -> None:
    for name in MODULES:
        import_module(name)
    auto: Any = import_module("transformers").AutoConfig
    auto.for_model("llama")


def _run(asked: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        _become(asked)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def _become(asked: dict[str, Any]) -> None:
    os.chdir(asked["cwd"])
    os.environ.update(asked["environ"])
    modes = (os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT)
    for number, (path, mode) in enumerate(zip(asked["streams"], modes, strict=True)):
        opened = os.open(path, mode)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - the old one has read ahead
    sys.argv = ["p2pinfer", *asked["argv"]]
    sys.path[0] = ""  # as with `python -m p2pinfer`
    from p2pinfer.cli.app import main as command

    try:
        command()
    finally:
        os._exit(99)  # not reached: the command ends its process


if __name__ == "__main__":
    main()
