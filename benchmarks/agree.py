"""Greedy ids over uneven splits against transformers.generate, wherever its choice is clear.

    python benchmarks/agree.py                               # bfloat16, the bundled model and SmolLM2
    python benchmarks/agree.py --dtype float32 --margin 0

The swarm is fed transformers' own ids and asked for the next one each time, so one legal difference does not
void what follows. A token counts where the likeliest is `margin` more likely than the second.
"""

from __future__ import annotations

import argparse
import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")  # oneDNN reads it once, here and in the nodes

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import trio
from contest import Local, blocks_of, model_folder, open_swarm, open_walk, prompt_ids, report

from p2pinfer.client import Client
from p2pinfer.models.span import BlockSpan

PROMPTS = (1, 2, 31, 64, 65, 257, 700)
TOKENS = 48


def unevenly(blocks: int, hops: int) -> list[BlockSpan]:
    """Spans of which each is about half of what is left."""
    bounds = [0]
    for hop in range(1, hops):
        bounds.append(bounds[-1] + max(1, (blocks - bounds[-1] - (hops - hop)) // 2))
    return [BlockSpan(start, stop) for start, stop in pairwise([*bounds, blocks])]


async def compare(client: Client, local: Local, margin: float) -> dict[str, int]:
    """How many tokens were compared, how many were too close to call, and how many differ."""
    counts = {"compared": 0, "too close": 0, "differ": 0}
    vocab = client.spec.vocab_size
    for length in PROMPTS:
        ids = prompt_ids(length, vocab)
        expected, _ = await trio.to_thread.run_sync(local.generate, ids, TOKENS)
        for want, got, clear_by in zip(
            expected, await predict(client, ids, expected), local.margins, strict=True
        ):
            counts["compared" if clear_by > margin else "too close"] += 1
            counts["differ"] += clear_by > margin and want != got
    return counts


async def predict(client: Client, ids: Sequence[int], continuation: Sequence[int]) -> list[int]:
    """The swarm's choice at each position of `continuation`, given what precedes it there."""
    ends = client.ends
    async with open_walk(client, len(ids) + len(continuation)) as walk:
        hidden = await walk.session.prefill(ends.embed(ids), 0)
        choices = [int(ends.logits(hidden)[-1].argmax())]
        for offset, token in enumerate(continuation[:-1]):
            hidden = await walk.session.decode(ends.embed([token]), len(ids) + offset)
            choices.append(int(ends.logits(hidden)[-1].argmax()))
    return choices


async def measure(
    name: str, folder: Path, dtype: str, hops: Sequence[int], margin: float, device: str = "cpu"
) -> list[dict[str, Any]]:
    """The rows of one model."""
    local = Local(folder, dtype, device, keep_margins=True)
    rows: list[dict[str, Any]] = []
    for count in hops:
        spans = unevenly(blocks_of(folder), count)
        async with open_swarm(folder, spans, dtype, device) as client:
            counts = await compare(client, local, margin)
        rows.append({"model": name, "dtype": dtype, "spans": " ".join(map(str, spans)), **counts})
    return rows


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tiny-stories", "smollm2"])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--hops", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--margin", type=float, default=0.05)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in options.model:
        with model_folder(name) as folder:
            for dtype in options.dtype:
                rows += await measure(name, folder, dtype, options.hops, options.margin)
    report(f"greedy ids where the margin exceeds {options.margin}", rows)


if __name__ == "__main__":
    trio.run(main)
