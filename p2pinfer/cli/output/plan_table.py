"""A plan for a swarm on the terminal and as JSON: a row for each number of peers, and what it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.numerics import Numerics
from p2pinfer.planning.forecast import Forecast

from .fitted_table import Column, FittedTable


def draw_plan(
    spec: ModelSpec,
    numerics: Numerics,
    found: Sequence[Forecast],
    room_bytes: float | None = None,
    least_peers: int | None = None,
) -> RenderableType:
    """All that is said to people.

    Args:
        room_bytes: Free memory of each peer, where it is known.
        least_peers: Number of peers that hold the model in it; None if not even one block fits.
    """
    headline = Text(spec.model, style="bold")
    sizes = (
        f"{spec.num_blocks} blocks of {_size(spec.block_bytes(numerics))} in {numerics}, "
        f"{_size(spec.num_blocks * spec.block_bytes(numerics))} in all"
    )
    told = map(Text, (sizes, _assumptions(spec, found[0]), ""))
    lines: list[RenderableType] = [headline, *told, _table(found, room_bytes), Text()]
    return Group(*lines, *map(Text, _remarks(found[0], room_bytes, least_peers)))


def plan_document(
    spec: ModelSpec,
    numerics: Numerics,
    found: Sequence[Forecast],
    room_bytes: float | None = None,
    least_peers: int | None = None,
) -> dict[str, Any]:
    """The same as one object; sizes are bytes, times seconds."""
    assumed = found[0].assumed
    return {
        "model": spec.model,
        "num_blocks": spec.num_blocks,
        "dtype": str(numerics),
        "block_bytes": spec.block_bytes(numerics),
        "assumed": {
            "block_s": assumed.block_s,
            "up_bytes_per_s": assumed.up_bytes_per_s,
            "rtt_ms": assumed.rtt_ms,
            "context_tokens": assumed.context_tokens,
            "prompt_tokens": assumed.prompt_tokens,
            "memory_bytes": room_bytes,
        },
        "fewest_peers": least_peers,
        "head_bytes": found[0].head_bytes,
        "plans": [_plan(each, room_bytes) for each in found],
    }


def _plan(each: Forecast, room_bytes: float | None) -> dict[str, Any]:
    return {
        "peers": each.assumed.peers,
        "hops": len(each.route.hops),
        "blocks": each.blocks,
        "weights_bytes": each.weights_bytes,
        "cache_bytes": each.cache_bytes,
        "memory_bytes": each.memory_bytes,
        "fits": None if room_bytes is None else each.memory_bytes <= room_bytes,
        "up_bytes_per_token": each.hidden_bytes,
        "tokens_per_s": each.tokens_per_s,
        "trip_s": each.trip_s,
        "compute_s": each.compute_s,
        "head_s": each.head_s,
        "prompt_lines_s": each.prompt_lines_s,
    }


def _table(found: Sequence[Forecast], room_bytes: float | None) -> FittedTable:
    def column(heading: str, cells: Sequence[str], rank: int = 0) -> Column:
        return Column(heading, cells, rank, right=True)

    columns = [
        column("peers", [f"{each.assumed.peers}" for each in found]),
        column("hops", [f"{len(each.route.hops)}" for each in found], 5),
        column("blocks each", [f"{each.blocks}" for each in found], 4),
        column("weights each", [_size(each.weights_bytes) for each in found]),
        column("free memory each", [_size(each.memory_bytes) for each in found], 1),
        column("compute", [_ms(each.compute_s + each.head_s) for each in found], 3),
        column("lines", [_ms(each.trip_s - each.compute_s) for each in found], 2),
        column("tok/s", [f"{_rate(each.tokens_per_s)}" for each in found]),
        column("prompt", [f"{each.prompt_lines_s:.1f} s" for each in found], 1),
    ]
    if room_bytes is not None:
        fits = ["yes" if each.memory_bytes <= room_bytes else "no" for each in found]
        columns.append(Column("fits", fits))
    return FittedTable(columns)


def _assumptions(spec: ModelSpec, first: Forecast) -> str:
    assumed = first.assumed
    rate = spec.block_bytes(assumed.numerics) / assumed.block_s / 1e9
    up = assumed.up_bytes_per_s * 8 / 1e6
    return f"each peer: {up:,.4g} Mbit/s up, {assumed.rtt_ms:,.4g} ms to any other, reads {rate:,.3g} GB/s"


def _remarks(first: Forecast, room_bytes: float | None, least_peers: int | None) -> list[str]:
    assumed = first.assumed
    cached = _size(first.cache_bytes / first.blocks)
    said = [
        f"Each peer sends {_size(first.hidden_bytes)} for each token of a text, and keeps",
        f"{cached} for each block of one of {assumed.context_tokens:,} tokens.",
        f"A client holds {_size(first.head_bytes)} for the head, or none of it with --thin.",
        f"prompt: {assumed.prompt_tokens:,} tokens on the lines alone; computing them comes on top.",
        "tok/s: one text without guesses, where no hop fails.",
    ]
    if room_bytes is not None and least_peers is None:
        said.append(f"Not one block fits into {_size(room_bytes)} beside the cache.")
    elif room_bytes is not None:
        said.append(f"With {_size(room_bytes)} of free memory each, {least_peers} peers are the fewest.")
    return said


def _size(amount: float) -> str:
    """Bytes for people, in units of 1024."""
    for unit in ("bytes", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:,.3g} {unit}"
        amount /= 1024
    return f"{amount:,.1f} GiB"


def _rate(amount: float) -> str:
    return f"{amount:,.0f}" if amount >= 10 else f"{amount:.1f}" if amount >= 1 else f"{amount:.2f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms"
