"""Process that renders the chat templates of one checkpoint, for as long as they are used.

A start takes a tenth of a second, which is too long for every question of a chat. So the process stays: it
renders request after request, each within bounds of its own, and is killed when one goes beyond them. The
next request starts another. Whatever a template did to its process, it only ever sees what its own model is
told, and answers nobody but the caller.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from p2pinfer.errors import ChatTemplateError

_PROGRAM: Final = Path(__file__).with_name("chat_renderer.py")
_KEPT: Final = ("TZ", "LANG", "LC_ALL", "LC_TIME", "SYSTEMROOT")  # of the environment: what dates depend on
_ANSWER_BYTES: Final = 208 << 20  # 16 million characters at their longest in JSON, and some more
_SPENT: Final = "it took more time or memory than it may"


class RendererProcess:
    """Renders by a process of its own, which the first request starts and which ends with this object.

    Any thread may ask; one asks at a time.
    """

    def __init__(self, sources: Mapping[str, str], patience_s: float) -> None:
        """`sources` are the templates by name; a request may take `patience_s` seconds."""
        self._sources = dict(sources)
        self._patience_s = patience_s
        self._turn = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that started it: a fork must not talk to the same one
        self._end: weakref.finalize[..., RendererProcess] | None = None

    def ask(self, request: str) -> Mapping[str, str]:
        """The answer of chat_renderer.py to a request, one line of JSON.

        Raises:
            ChatTemplateError: The process cannot be started.
        """
        with self._turn:
            process, greeting = self._running()
            late = threading.Event()

            def stop() -> None:
                late.set()
                process.kill()

            timer = threading.Timer(self._patience_s, stop)
            timer.start()
            try:
                line = _exchange(process, [*greeting, request])
            finally:
                timer.cancel()
                timer.join()
            try:
                answer: Mapping[str, str] = json.loads(line)
            except ValueError:  # it was killed, by us or by the system
                said = f"it did not end within {self._patience_s:g} s" if late.is_set() else _SPENT
                answer = {"broken": said, "last": "yes"}
            if late.is_set() or "last" in answer:
                self._stop()
            return answer

    def _running(self) -> tuple[subprocess.Popen[bytes], list[str]]:
        """The process, and the lines that it must be told first.

        Another one where it has ended, or is that of the process that this was forked from.
        """
        if self._process is not None and (self._owner != os.getpid() or self._process.poll() is not None):
            self._stop()
        if self._process is not None:
            return self._process, []
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _KEPT if name in os.environ},
            )
        except OSError as exc:
            raise ChatTemplateError(f"the process for the chat template could not be started: {exc}") from exc
        self._owner = os.getpid()
        self._end = weakref.finalize(self, _end, self._process, self._owner)
        return self._process, [json.dumps(self._sources)]

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._process = self._end = None


def _exchange(process: subprocess.Popen[bytes], lines: Sequence[str]) -> bytes:
    """The line that follows these; empty if the process ends before."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for line in lines:
            process.stdin.write(line.encode("utf-8", "replace") + b"\n")
        process.stdin.flush()
        return process.stdout.readline(_ANSWER_BYTES)
    except OSError:
        return b""


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """Kill the process, unless this is a fork of the one that it belongs to."""
    if os.getpid() == owner:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # what was not read is lost
                pipe.close()
