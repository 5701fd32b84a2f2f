"""View of a model's swarm at one moment, for people and as JSON."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias

import trio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from p2pinfer.errors import PeerError
from p2pinfer.models.span import BlockSpan, uncovered
from p2pinfer.node.swarm.membership import SwarmMember
from p2pinfer.routing.announcement import Announcement
from p2pinfer.served import served_models

from .fitted_table import Column, FittedTable
from .plain import short_peers
from .terminal import print_out, write_out

State: TypeAlias = Literal["answers", "refuses", "unknown"]

CALL_S = 3.0  # how long those announced have to let themselves be reached, routers in between included
PING_S = 2.0  # how long connected peers have to answer a ping
MAX_MODELS = 32  # that are looked at where none was asked about
REFRESH_S = 2.0  # between looks at a swarm that is watched
_BAR_CELLS = 32  # a model with more blocks than this is drawn to scale
_STATES: Final[dict[State, str]] = {
    "answers": "answers",
    "refuses": "refuses us",
    "unknown": "not heard",
}


@dataclass(frozen=True, slots=True)
class PeerSeen:
    """A peer's announcement, and what was found out about the way to it.

    Attributes:
        state: Whether the peer answered just now. An announcement outlives its peer by up to two minutes, so
            of one that did not answer nobody knows whether it serves anything.
    """

    announcement: Announcement
    connection: str | None  # None: not connected
    rtt_ms: float | None
    state: State = "unknown"

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
            "state": self.state,
        }


class Model(Protocol):
    """Description of a model that is looked at; its files need not be here."""

    @property
    def model(self) -> str: ...

    @property
    def revision(self) -> str: ...

    @property
    def num_blocks(self) -> int: ...


@dataclass(frozen=True, slots=True)
class SwarmView:
    """Peers that serve a model."""

    spec: Model
    peers: tuple[PeerSeen, ...]

    @property
    def missing(self) -> list[BlockSpan]:
        """The blocks that nobody serves, as far as anybody confirmed it."""
        return uncovered(self._confirmed, self.spec.num_blocks)

    @property
    def unknown(self) -> list[BlockSpan]:
        """Those of them that are announced, by peers that do not answer."""
        return uncovered([*self._confirmed, *self._unannounced], self.spec.num_blocks)

    @property
    def _unannounced(self) -> list[BlockSpan]:
        return uncovered([peer.announcement.span for peer in self.peers], self.spec.num_blocks)

    @property
    def _confirmed(self) -> list[BlockSpan]:
        return [peer.announcement.span for peer in self.peers if peer.state != "unknown"]

    def to_dict(self) -> dict[str, object]:
        """The view as `--json` prints it."""
        return {
            "model": self.spec.model,
            "revision": self.spec.revision,
            "num_blocks": self.spec.num_blocks,
            "missing": [[gap.start, gap.stop] for gap in self.missing],
            "unknown": [[gap.start, gap.stop] for gap in self.unknown],
            "peers": [peer.to_dict() for peer in self.peers],
        }

    def __rich__(self) -> RenderableType:
        headline = Text(f"{self.spec.model}  ", style="bold")
        announced = [peer.announcement.span for peer in self.peers]
        headline.append(blocks_bar(self._confirmed, self.spec.num_blocks, announced))
        headline.append(f"  {self._coverage()}", style="not bold")
        return Group(headline, Text(), self._table()) if self.peers else headline

    def _coverage(self) -> str:
        total, nobody, unknown = self.spec.num_blocks, self._unannounced, self.unknown
        if not self.missing:
            return f"all {total} blocks are served"
        said = f"nobody serves {_listed(nobody)} of its {total} blocks" if nobody else ""
        if unknown:
            of = "" if nobody else f" of its {total} blocks"
            said += "; " * bool(said) + f"who announced {_listed(unknown)}{of} does not answer"
        return said

    def _table(self) -> FittedTable:
        peers = sorted(self.peers, key=lambda peer: peer.announcement.span)
        said = [peer.announcement for peer in peers]
        names = short_peers(each.peer_id for each in said)
        bars = [blocks_bar([each.span], self.spec.num_blocks) for each in said]
        rtts = ["-" if peer.rtt_ms is None else f"{peer.rtt_ms:.1f} ms" for peer in peers]
        return FittedTable(
            [
                Column("peer", [names[each.peer_id] for each in said]),
                Column("blocks", bars, rank=5),
                Column("", [str(each.span) for each in said]),
                Column("state", [_STATES[peer.state] for peer in peers]),
                Column("tok/s", [f"{each.tokens_per_s:,.0f}" for each in said], rank=1, right=True),
                Column("free cache", [f"{each.free_cache_tokens:,}" for each in said], rank=4, right=True),
                Column("dtype", [each.dtype for each in said], rank=6),
                Column("connection", [peer.connection or "-" for peer in peers], rank=3),
                Column("rtt", rtts, rank=2, right=True),
            ]
        )


@dataclass(frozen=True, slots=True)
class AllModels:
    """Models that are served, with their peers, where none was asked about.

    Attributes:
        usual: The model that commands take without being told, served or not.
        served: Those that somebody announces.
    """

    usual: SwarmView
    served: tuple[SwarmView, ...]

    def to_dict(self) -> dict[str, object]:
        """The usual model as if it had been asked about, and all that are served."""
        return {**self.usual.to_dict(), "models": [each.to_dict() for each in self.served]}

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = []
        for each in self.served or (self.usual,):
            parts += [*([Text()] if parts else []), each]
        return Group(*parts)


async def look_at_all(member: SwarmMember, usual: Model) -> AllModels:
    """List all served models: one peer of every model is asked for the others of it."""
    revisions = list(member.models())[:MAX_MODELS]
    async with trio.open_nursery() as nursery:
        for revision in revisions:
            nursery.start_soon(member.look_into, revision)
    announced = {revision: peers for revision, peers in member.models().items() if revision in revisions}
    views = {each.revision: await look_at(member, each) for each in served_models(announced)}
    shown = views.get(usual.revision) or SwarmView(usual, ())
    return AllModels(shown, tuple(views.values()))


async def look_at(member: SwarmMember, spec: Model) -> SwarmView:
    """List the announcements of a model, which of their peers answer, and how far they are."""
    await member.presence.call(member.announcements(spec.revision), CALL_S)
    rtts_ms: dict[str, float] = {}

    async def ping(peer_id: str) -> None:
        with suppress(PeerError):  # then there is no number for it
            rtts_ms[peer_id] = await member.host.ping(peer_id) * 1e3

    with trio.move_on_after(PING_S):
        async with trio.open_nursery() as nursery:
            for peer_id in member.host.connected_peers():
                nursery.start_soon(ping, peer_id)

    def state(peer_id: str) -> State:
        if peer_id in rtts_ms:
            return "answers"
        return "refuses" if member.presence.refuses_us(peer_id) else "unknown"

    return SwarmView(
        spec,
        tuple(
            PeerSeen(
                said,
                member.host.connection_kind(said.peer_id),
                rtts_ms.get(said.peer_id),
                state(said.peer_id),
            )
            for said in member.announcements(spec.revision)
        ),
    )


async def watch_swarm(look: Callable[[], Awaitable[SwarmView | AllModels]], *, as_json: bool) -> None:
    """Show the swarm again and again: in place on a terminal, one view below the other elsewhere."""
    console = Console()
    if as_json or not console.is_terminal:
        while True:
            print_view(await look(), as_json=as_json)
            await trio.sleep(REFRESH_S)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(await look(), refresh=True)
            await trio.sleep(REFRESH_S)


def print_view(view: SwarmView | AllModels, *, as_json: bool) -> None:
    """Print a view as a result."""
    if as_json:
        write_out(json.dumps(view.to_dict()) + "\n")
    else:
        print_out(view)


def blocks_bar(spans: Sequence[BlockSpan], num_blocks: int, announced: Sequence[BlockSpan] = ()) -> str:
    """Bar of the model's blocks: a filled cell for every block that is held, a shaded one for others.

    A cell that stands for several blocks is filled only if all of them are held, so that no gap is hidden.

    Args:
        announced: Held by somebody's word only: shaded.
    """
    cells = min(num_blocks, _BAR_CELLS)
    held, said = _blocks(spans, num_blocks), _blocks([*spans, *announced], num_blocks)
    bar = ""
    for cell in range(cells):
        part = range(cell * num_blocks // cells, (cell + 1) * num_blocks // cells)
        bar += "█" if held.issuperset(part) else "░" if said.issuperset(part) else "·"
    return bar


def _blocks(spans: Sequence[BlockSpan], num_blocks: int) -> set[int]:
    return {block for span in spans for block in range(span.start, min(span.stop, num_blocks))}


def _listed(spans: Sequence[BlockSpan]) -> str:
    return ", ".join(map(str, spans))
