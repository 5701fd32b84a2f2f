"""`p2pinfer node status`: what the node of a data directory is doing, and what it has done today.

The node writes it down every few seconds while something changes, so another process need not ask it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from p2pinfer.cli.invocation import DATA_DIR, Invocation, command
from p2pinfer.cli.output.terminal import write_out
from p2pinfer.errors import LocalError

if TYPE_CHECKING:
    from p2pinfer.node.events import Event

FILE: Final = "status.json"
EVERY_S: Final = 5.0  # between two writes
LAST_WRITE_S: Final = 5.0  # that a disk has to take what a node did last
_MOST_BYTES: Final = 1 << 16


class DayTotals(msgspec.Struct, frozen=True):
    """Work of one day, by this computer's clock."""

    day: str  # 2026-01-31
    sessions: int = 0
    tokens: int = 0  # of sessions that ended
    refused: int = 0
    audits: int = 0  # of others, while idle


class NodeStatus(msgspec.Struct, frozen=True):
    """State of a node when it last wrote it down."""

    today: DayTotals
    since: float  # seconds since 1970
    written: float
    peer_id: str = ""
    name: str = ""  # that others see beside the peer id
    model: str = ""
    blocks: tuple[int, int] | None = None
    sessions: int = 0  # open
    reached: str = ""  # how others reach it
    addrs: tuple[str, ...] = ()
    state: str = "starting"  # starting, loading, serving, introducing, leaving or stopped


class StatusBoard:
    """Follows a node's events, and adds what they say to what the day had before."""

    def __init__(
        self, before: NodeStatus | None, clock: Callable[[], float] = time.time, name: str = ""
    ) -> None:
        """A board; `before` is what an earlier run of today left."""
        self._clock = clock
        now = clock()
        today = DayTotals(_day(now)) if before is None else before.today
        self.status = NodeStatus(_of_day(today, now), now, now, name=name)
        self.is_written = False

    def note(self, event: Event) -> None:
        """Take an event in."""
        from p2pinfer.node import events

        change: dict[str, object] = {}
        done: dict[str, int] = {}
        match event:
            case events.Starting():
                change = {"peer_id": event.peer_id, "model": event.model, "addrs": event.addrs}
            case events.Loading():
                change = {"blocks": event.blocks, "state": "loading"}
            case events.Ready():
                state = "introducing" if event.blocks is None else "serving"
                change = {"peer_id": event.peer_id, "model": event.model, "blocks": event.blocks}
                change |= {"addrs": event.addrs, "state": state}
            case events.Reached():
                change = {"reached": event.description, "addrs": event.addrs}
            case events.SessionOpened():
                change, done = {"sessions": event.sessions}, {"sessions": 1}
            case events.SessionClosed():
                change, done = {"sessions": event.sessions}, {"tokens": event.tokens}
            case events.SessionRefused():
                done = {"refused": 1}
            case events.Verified():
                done = {"audits": event.audits}
            case events.NodeLeaving():
                change = {"state": "leaving"}
            case events.Stopped():
                change = {"state": "stopped", "sessions": 0}
            case _:
                return
        today = _of_day(self.status.today, self._clock())
        added = {name: getattr(today, name) + amount for name, amount in done.items()}
        change["today"] = msgspec.structs.replace(today, **added)
        self.status = msgspec.structs.replace(self.status, **change)
        self.is_written = False

    def encoded(self) -> bytes:
        """The status as it stands, for the file."""
        now = self._clock()
        self.status = msgspec.structs.replace(self.status, written=now, today=_of_day(self.status.today, now))
        self.is_written = True
        return msgspec.json.encode(self.status)


def read_status(data_dir: Path) -> NodeStatus | None:
    """Status that a node wrote down there; None if nothing of use is there."""
    with suppress(OSError, msgspec.MsgspecError):
        path = data_dir / FILE
        if path.stat().st_size <= _MOST_BYTES:
            return msgspec.json.decode(path.read_bytes(), type=NodeStatus)
    return None


@asynccontextmanager
async def written_status(data_dir: Path, name: str = "") -> AsyncGenerator[Callable[[Event], None]]:
    """Give what takes a node's events, and write its status down until the block ends.

    A disk that takes nothing costs the status, and not the node.
    """
    import trio

    from p2pinfer.folders import write_private
    from p2pinfer.node.concurrency.nurseries import open_nursery

    board = StatusBoard(await trio.to_thread.run_sync(read_status, data_dir), name=name)

    def write(content: bytes) -> None:
        with suppress(OSError):
            write_private(data_dir / FILE, content)

    async def keep_writing() -> None:
        while True:
            await trio.sleep(EVERY_S)
            if not board.is_written:
                await trio.to_thread.run_sync(write, board.encoded())

    try:
        async with open_nursery() as nursery:
            nursery.start_soon(keep_writing)
            yield board.note
            nursery.cancel_scope.cancel()
    finally:
        if board.status.peer_id:  # else it never was this directory's node
            with trio.move_on_after(LAST_WRITE_S, shield=True):
                await trio.to_thread.run_sync(write, board.encoded(), abandon_on_cancel=True)


@command("status", examples=["p2pinfer node status", "p2pinfer node status --json | jq .today.tokens"])
@DATA_DIR
def status(call: Invocation) -> None:
    """Show what the node of this data directory is doing, and its work of today.

    The exit code is 1 if no node runs there.
    """
    from p2pinfer.config import SharedConfig
    from p2pinfer.node.data_lock import read_holder

    data_dir = call.settings().build(SharedConfig).data_dir
    found, holder = read_status(data_dir), read_holder(data_dir)
    if found is None:
        raise LocalError(
            f"no node has run in {data_dir}; `p2pinfer node` starts one, --data-dir names another"
        )
    now = time.time()
    found = msgspec.structs.replace(found, today=_of_day(found.today, now))
    if holder is None:
        found = msgspec.structs.replace(found, state="stopped", sessions=0)
    if call.json:
        write_out(msgspec.json.encode(found).decode() + "\n")
    else:
        write_out(describe(found, now))
    if holder is None:
        import click

        raise click.exceptions.Exit(1)


def describe(found: NodeStatus, now: float) -> str:
    """A status for people."""
    from p2pinfer.cli.output.plain import printable

    blocks = "" if found.blocks is None else f", blocks {found.blocks[0]}:{found.blocks[1]}"
    age = now - found.since if found.state != "stopped" else None
    today = found.today
    lines = [
        ("node", f"{found.peer_id}, {found.name}" if found.name else found.peer_id),
        ("state", found.state if age is None else f"{found.state}, for {_span(age)}"),
        ("serves", f"{found.model}{blocks}" if found.model else "no blocks: it introduces peers"),
        ("sessions", f"{found.sessions} open"),
        ("reached", found.reached or "not known yet"),
        ("today", f"{today.sessions:,} sessions, {today.tokens:,} tokens, {today.refused:,} refused"),
    ]
    if today.audits:
        lines.append(("", f"{today.audits:,} audits of others"))
    return "".join(f"{name:<9} {printable(said)}\n" for name, said in lines)


def _of_day(totals: DayTotals, now: float) -> DayTotals:
    """These totals, or empty ones where another day has begun."""
    return totals if totals.day == _day(now) else DayTotals(_day(now))


def _day(now: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(now))


def _span(seconds: float) -> str:
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h" if minutes < 48 * 60 else f"{minutes // 1440} days"
