"""Prefill of a long prompt over 2 and 4 hops against transformers, taking turns in one run.

    python benchmarks/prefill.py                                       # 2047 tokens, 512x8, 1024x16, SmolLM2
    python benchmarks/prefill.py --model 1024x16 --tokens 512 2047 --hops 1 2 4

Every process has one torch thread. A figure is the time from the prompt's token ids to the first new token;
opening the session is part of it. `ratio` is the local median over the swarm's, `rounds` the least and the
greatest quotient of a single round (see quotient.py).
"""

from __future__ import annotations

import argparse
import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")  # oneDNN reads it once, here and in the nodes

import time
from typing import Any

import torch
import trio
from contest import (
    MODELS,
    Local,
    blocks_of,
    evenly,
    model_folder,
    open_swarm,
    open_walk,
    prompt_ids,
    report,
    rounded,
)
from quotient import compared

from p2pinfer.client import Client


async def contest(client: Client, local: Local, rounds: int, hops: int, tokens: int) -> dict[str, Any]:
    """One row of the table."""
    ids = prompt_ids(tokens)
    ours: list[float] = []
    theirs: list[float] = []
    for round_number in range(rounds + 1):
        started = time.perf_counter()
        await trio.to_thread.run_sync(local.generate, ids, 1)
        local_s = time.perf_counter() - started
        started = time.perf_counter()
        async with open_walk(client, tokens + 1) as walk:
            await walk.generate(ids, 1)
            our_s = time.perf_counter() - started
        if round_number:  # the first is a warm-up
            ours.append(our_s)
            theirs.append(local_s)
    return {
        "tokens": tokens,
        "hops": hops,
        "ours s": rounded(ours, 3),
        "local s": rounded(theirs, 3),
        "ours tok/s": round(tokens / rounded(ours, 6)),
        **compared(ours, theirs),
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", nargs="+", default=MODELS)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--hops", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2047])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in options.model:
        with model_folder(name) as folder:
            for dtype in options.dtype:
                local = Local(folder, dtype)
                for hops in options.hops:
                    async with open_swarm(folder, evenly(blocks_of(folder), hops), dtype) as client:
                        for tokens in options.tokens:
                            row = await contest(client, local, options.rounds, hops, tokens)
                            rows.append({"model": name, "dtype": dtype, **row})
    report("prefill", rows)


if __name__ == "__main__":
    trio.run(main)
