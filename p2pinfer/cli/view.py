"""A model's swarm at one moment, as this computer sees it, for people and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import trio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from p2pinfer.errors import PeerError
from p2pinfer.models.span import BlockSpan, uncovered
from p2pinfer.models.spec import ModelSpec
from p2pinfer.node.swarm import SwarmMember
from p2pinfer.routing.announcement import Announcement

from .plain import short_peer
from .terminal import print_out, write_out

PING_S = 1.0  # how long connected peers have to answer a ping
REFRESH_S = 2.0  # between looks at a swarm that is watched
_BAR_CELLS = 32  # a model with more blocks than this is drawn to scale


@dataclass(frozen=True, slots=True)
class PeerSeen:
    """A peer's announcement, and what was found out about the way to it."""

    announcement: Announcement
    connection: str | None  # None: not connected
    rtt_ms: float | None

    def to_dict(self) -> dict[str, object]:
        """The peer as `--json` prints it."""
        said = self.announcement
        return {
            "peer_id": said.peer_id,
            "blocks": [said.span.start, said.span.stop],
            "dtype": said.dtype,
            "tokens_per_s": said.tokens_per_s,
            "free_cache_tokens": said.free_cache_tokens,
            "reachability": said.reachability,
            "addrs": list(said.addrs),
            "connection": self.connection,
            "rtt_ms": self.rtt_ms,
        }


@dataclass(frozen=True, slots=True)
class SwarmView:
    """Who serves a model."""

    spec: ModelSpec
    peers: tuple[PeerSeen, ...]

    @property
    def missing(self) -> list[BlockSpan]:
        """The blocks that nobody serves."""
        return uncovered([peer.announcement.span for peer in self.peers], self.spec.num_blocks)

    def to_dict(self) -> dict[str, object]:
        """The view as `--json` prints it."""
        return {
            "model": self.spec.model,
            "revision": self.spec.revision,
            "num_blocks": self.spec.num_blocks,
            "missing": [[gap.start, gap.stop] for gap in self.missing],
            "peers": [peer.to_dict() for peer in self.peers],
        }

    def __rich__(self) -> RenderableType:
        headline = Text(f"{self.spec.model}  ", style="bold")
        headline.append(blocks_bar([peer.announcement.span for peer in self.peers], self.spec.num_blocks))
        headline.append(f"  {self._coverage()}", style="not bold")
        return Group(headline, Text(), self._table()) if self.peers else headline

    def _coverage(self) -> str:
        if not self.missing:
            return f"all {self.spec.num_blocks} blocks are served"
        gaps = ", ".join(str(gap) for gap in self.missing)
        return f"nobody serves {gaps} of its {self.spec.num_blocks} blocks"

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("peer")
        table.add_column("blocks", no_wrap=True)
        table.add_column("")
        for heading in ("tok/s", "free cache"):
            table.add_column(heading, justify="right")
        table.add_column("dtype")
        table.add_column("connection")
        table.add_column("rtt", justify="right")
        for peer in sorted(self.peers, key=lambda peer: peer.announcement.span):
            said = peer.announcement
            table.add_row(
                Text(short_peer(said.peer_id)),
                blocks_bar([said.span], self.spec.num_blocks),
                str(said.span),
                f"{said.tokens_per_s:,.0f}",
                f"{said.free_cache_tokens:,}",
                Text(said.dtype),
                peer.connection or "-",
                "-" if peer.rtt_ms is None else f"{peer.rtt_ms:.1f} ms",
            )
        return table


async def look_at(member: SwarmMember, spec: ModelSpec) -> SwarmView:
    """What is announced, and how far those are to whom there is a connection."""
    rtts_ms: dict[str, float] = {}

    async def ping(peer_id: str) -> None:
        with suppress(PeerError):  # then there is no number for it
            rtts_ms[peer_id] = await member.host.ping(peer_id) * 1e3

    with trio.move_on_after(PING_S):
        async with trio.open_nursery() as nursery:
            for peer_id in member.host.connected_peers():
                nursery.start_soon(ping, peer_id)
    return SwarmView(
        spec,
        tuple(
            PeerSeen(said, member.host.connection_kind(said.peer_id), rtts_ms.get(said.peer_id))
            for said in member.announcements(spec.revision)
        ),
    )


async def watch_swarm(member: SwarmMember, spec: ModelSpec, *, as_json: bool) -> None:
    """Show the swarm again and again: in place on a terminal, one view below the other elsewhere."""
    console = Console()
    if as_json or not console.is_terminal:
        while True:
            print_view(await look_at(member, spec), as_json=as_json)
            await trio.sleep(REFRESH_S)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(await look_at(member, spec), refresh=True)
            await trio.sleep(REFRESH_S)


def print_view(view: SwarmView, *, as_json: bool) -> None:
    """Print a view as a result."""
    if as_json:
        write_out(json.dumps(view.to_dict()) + "\n")
    else:
        print_out(view)


def blocks_bar(spans: Sequence[BlockSpan], num_blocks: int) -> str:
    """Where the spans lie in the model: a filled cell for every block that is held.

    A cell that stands for several blocks is filled only if all of them are held, so that no gap is hidden.
    """
    cells = min(num_blocks, _BAR_CELLS)
    held = {block for span in spans for block in range(span.start, min(span.stop, num_blocks))}
    bar = ""
    for cell in range(cells):
        part = range(cell * num_blocks // cells, (cell + 1) * num_blocks // cells)
        bar += "█" if held.issuperset(part) else "·"
    return bar
