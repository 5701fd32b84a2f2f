"""Lock on a data directory: two nodes in one would be one peer, and overwrite each other's files.

The lock is the operating system's, so that it is free as soon as its process is gone, however that ended. Who
holds it stands in a file of its own beside it: opening a lock file to try it may empty it.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import filelock
import msgspec
import psutil

from p2pinfer.errors import DataDirInUse
from p2pinfer.folders import make_private, write_private

logger = logging.getLogger(__name__)

LOCK_FILE: Final = "node.lock"
HOLDER_FILE: Final = "node.holder.json"
_MAX_BYTES: Final = 1 << 14
_COMMAND_CHARS: Final = 200


@dataclass(frozen=True, slots=True)
class Holder:
    """Process that holds a data directory."""

    pid: int
    host: str  # the computer's name: the directory may be shared by several
    since: float  # seconds since the epoch
    command: str

    def describe(self) -> str:
        """`process 4711 since 2026-01-31 12:00:00 (p2pinfer node)`, with the computer if that is another."""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        where = "" if self.host == socket.gethostname() else f" on {self.host}"
        return f"process {self.pid}{where} since {since} ({self.command})"

    @property
    def may_run(self) -> bool:
        """True if such a process may be there; that of another computer cannot be looked for."""
        return self.host != socket.gethostname() or psutil.pid_exists(self.pid)


@contextmanager
def hold_data_dir(data_dir: Path) -> Generator[None]:
    """Be the only node that uses `data_dir` until the block ends.

    Raises:
        DataDirInUse: Another node uses it; the message says which one.
    """
    lock = filelock.FileLock(data_dir / LOCK_FILE, mode=0o600)
    try:
        make_private(data_dir)
        lock.acquire(blocking=False)
    except filelock.Timeout:
        holder = read_holder(data_dir)
        who = holder.describe() if holder else "an unknown process"
        raise DataDirInUse(
            f"another node uses {data_dir}: {who}; stop that node, or give this one "
            "a directory of its own (--data-dir)"
        ) from None
    except (OSError, NotImplementedError) as exc:
        # A key may be mounted read-only: the node can run, only nobody notices a second one here.
        logger.info("%s cannot be locked against a second node: %s", data_dir, exc)
        yield
        return
    try:
        _write_holder(data_dir)
        yield
    finally:
        with suppress(OSError):
            (data_dir / HOLDER_FILE).unlink(missing_ok=True)
        lock.release()


def read_holder(data_dir: Path) -> Holder | None:
    """Process that claims to hold `data_dir`; None if nobody does, or the one that did is gone."""
    try:
        with (data_dir / HOLDER_FILE).open("rb") as file:
            noted: Any = json.loads(file.read(_MAX_BYTES))
        holder = msgspec.convert(noted, Holder)
        return holder if holder.may_run else None
    except (OSError, ValueError, OverflowError):
        return None


def _write_holder(data_dir: Path) -> None:
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name  # by python -m, or a script
    command = shlex.join([name or "python", *sys.argv[1:]])[:_COMMAND_CHARS]
    holder = Holder(os.getpid(), socket.gethostname(), time.time(), command)
    with suppress(OSError):  # the lock is what counts
        write_private(data_dir / HOLDER_FILE, json.dumps(asdict(holder)).encode())
