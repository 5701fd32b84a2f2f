"""A signal ends a command the way a cancellation does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import trio

from p2pinfer.cli.failures import Interrupted
from p2pinfer.cli.running import run
from p2pinfer.errors import LocalError


def test_a_command_that_ends_by_itself_just_ends() -> None:
    ran: list[bool] = []

    async def main() -> None:
        await trio.lowlevel.checkpoint()
        ran.append(True)

    run(main)
    assert ran == [True]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_the_command_put_things_away(signum: signal.Signals) -> None:
    put_away: list[bool] = []

    async def main() -> None:
        os.kill(os.getpid(), signum)
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()
            put_away.append(True)

    with pytest.raises(Interrupted) as caught:
        run(main)
    assert caught.value.signum == signum
    assert put_away == [True]


def test_an_error_comes_out() -> None:
    async def main() -> None:
        await trio.lowlevel.checkpoint()
        raise LocalError("full")

    with pytest.RaisesGroup(LocalError):
        run(main)


def test_a_second_signal_does_not_wait() -> None:
    """In a process of its own, since the end is an abrupt one."""
    script = """
import os, signal, trio
from p2pinfer.cli.running import run

async def main():
    os.kill(os.getpid(), signal.SIGINT)
    try:
        await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True):
            os.kill(os.getpid(), signal.SIGINT)
            await trio.sleep_forever()

run(main)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=90, check=False)
    assert ended.returncode == 130
    assert b"Traceback" not in ended.stderr


def test_a_terminal_that_says_twice_that_it_is_gone_cuts_nobody_short() -> None:
    """A shell passes SIGHUP on, and the system sends another."""
    put_away: list[bool] = []

    async def main() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                os.kill(os.getpid(), signal.SIGHUP)
                await trio.sleep(0.01)
            put_away.append(True)

    with pytest.raises(Interrupted) as caught:
        run(main)
    assert (caught.value.signum, put_away) == (signal.SIGHUP, [True])


def test_who_was_started_by_nohup_goes_on() -> None:
    async def main() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        await trio.sleep(0.01)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(main)
    finally:
        signal.signal(signal.SIGHUP, before)
