"""A swarm's view on the terminal: a bar of every model's blocks, and a table of its peers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from p2pinfer.json_documents import all_models_document, swarm_document, to_json
from p2pinfer.models.span import BlockSpan
from p2pinfer.swarm_view import AllModels, State, SwarmView

from .fitted_table import Column, FittedTable
from .plain import short_peers
from .terminal import print_out, write_out

REFRESH_S = 2.0  # between looks at a swarm that is watched
_BAR_CELLS = 32  # a model with more blocks than this is drawn to scale
_STATES: Final[dict[State, str]] = {
    "answers": "answers",
    "refuses": "refuses us",
    "unknown": "no answer",
}


async def watch_swarm(look: Callable[[], Awaitable[SwarmView | AllModels]], *, as_json: bool) -> None:
    """Show the swarm again and again: in place on a terminal, one view below the other elsewhere."""
    console = Console()
    if as_json or not console.is_terminal:
        while True:
            print_view(await look(), as_json=as_json)
            await trio.sleep(REFRESH_S)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(draw(await look()), refresh=True)
            await trio.sleep(REFRESH_S)


def print_view(view: SwarmView | AllModels, *, as_json: bool) -> None:
    """Print a view as a result."""
    if as_json:
        write_out(_to_json(view) + "\n")
    else:
        print_out(draw(view))


def draw(view: SwarmView | AllModels) -> RenderableType:
    """All that is shown of one model, or of every model that is served."""
    if isinstance(view, SwarmView):
        return draw_model(view)
    parts: list[RenderableType] = []
    for each in view.served or (view.usual,):
        parts += [*([Text()] if parts else []), draw_model(each)]
    return Group(*parts)


def draw_model(view: SwarmView) -> RenderableType:
    """Bar of the model's blocks, and a table of its peers."""
    headline = Text(f"{view.spec.model}  ", style="bold")
    headline.append(blocks_bar(view.confirmed, view.spec.num_blocks, view.announced))
    headline.append(f"  {_coverage(view)}", style="not bold")
    return Group(headline, Text(), _table(view)) if view.peers else headline


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


def _to_json(view: SwarmView | AllModels) -> str:
    return to_json(swarm_document(view) if isinstance(view, SwarmView) else all_models_document(view))


def _coverage(view: SwarmView) -> str:
    total, nobody, unknown = view.spec.num_blocks, view.unannounced, view.unknown
    if not view.missing:
        return f"all {total} blocks are served"
    said = f"nobody serves {_listed(nobody)} of its {total} blocks" if nobody else ""
    if unknown:
        of = "" if nobody else f" of its {total} blocks"
        said += "; " * bool(said) + f"the peers that announced {_listed(unknown)}{of} do not answer"
    return said


def _table(view: SwarmView) -> FittedTable:
    peers = sorted(view.peers, key=lambda peer: peer.announcement.span)
    said = [peer.announcement for peer in peers]
    names = short_peers(each.peer_id for each in said)
    bars = [blocks_bar([each.span], view.spec.num_blocks) for each in said]
    called = [Column("name", [each.name for each in said], rank=7)] if any(each.name for each in said) else []
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
            *called,
        ]
    )


def _blocks(spans: Sequence[BlockSpan], num_blocks: int) -> set[int]:
    return {block for span in spans for block in range(span.start, min(span.stop, num_blocks))}


def _listed(spans: Sequence[BlockSpan]) -> str:
    return ", ".join(map(str, spans))
