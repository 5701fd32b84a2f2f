"""Run of a command's trio part, ended in order by Ctrl-C, SIGTERM or a lost terminal."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

import trio

from p2pinfer.cli.output.terminal import note

from .failures import Interrupted

_HANGUP: int | None = getattr(signal, "SIGHUP", None)  # Windows has none


def run(main: Callable[[], Awaitable[None]], *, until_stdin_closes: bool = False) -> None:
    """Run `main` in trio until it returns.

    What has been imported is left out of garbage collection meanwhile: to look through a quarter of a million
    objects of torch and libp2p takes 0.1 s, in which no peer is answered.

    The first SIGINT, SIGTERM or SIGHUP cancels it, so that every `finally` and `async with` has its say. A
    second SIGINT or SIGTERM ends the process at once. A second SIGHUP does not: of a terminal that is closed
    one comes from the shell and one from the system. Whoever was started by nohup, lives on.

    Args:
        until_stdin_closes: Cancel `main` also when standard input ends. A pipe from the process that started
            this one then sees to it that this one is not left behind, not even after a SIGKILL.

    Raises:
        Interrupted: A signal ended it.
    """
    gc.freeze()
    try:
        trio.run(_supervise, main, until_stdin_closes)
    finally:
        gc.unfreeze()


async def _supervise(main: Callable[[], Awaitable[None]], until_stdin_closes: bool) -> None:
    received: list[int] = []

    async def watch(signals: AsyncIterator[int], work: trio.CancelScope) -> None:
        async for signum in signals:
            if received and signum == _HANGUP:
                continue
            if received:
                os._exit(128 + signum)  # pragma: no cover - nothing counts after that
            received.append(signum)
            if signum == signal.SIGINT and sys.stderr.isatty():
                note("")  # the terminal has just echoed ^C
            work.cancel()

    with trio.open_signal_receiver(*_farewells()) as signals:
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as work:
                nursery.start_soon(watch, signals, work)
                if until_stdin_closes:
                    nursery.start_soon(_cancel_when_stdin_closes, work)
                await main()
            nursery.cancel_scope.cancel()
    if received:
        raise Interrupted(received[0])


def _farewells() -> list[int]:
    """The signals that ask this process to leave."""
    asked: list[int] = [signal.SIGINT, signal.SIGTERM]
    if _HANGUP is not None and signal.getsignal(_HANGUP) is not signal.SIG_IGN:
        asked.append(_HANGUP)
    return asked


async def _cancel_when_stdin_closes(work: trio.CancelScope) -> None:
    def wait_for_the_end() -> None:
        # os.read and not sys.stdin: a daemon thread inside a buffered reader aborts the interpreter's exit.
        while os.read(0, 1 << 16):
            pass

    await trio.to_thread.run_sync(wait_for_the_end, abandon_on_cancel=True)
    work.cancel()
