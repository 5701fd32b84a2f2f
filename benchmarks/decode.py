"""Decode speed over 1, 2 and 4 hops against transformers.generate, taking turns in one run.

    python benchmarks/decode.py                      # 512x8, 1024x16 and SmolLM2, float32 and bfloat16
    python benchmarks/decode.py --model 1024x16 --dtype bfloat16 --hops 4 --rounds 9

Every process has one torch thread. `ratio` is the local median over the swarm's, `rounds` the least and the
greatest quotient of a single round (see quotient.py). `hop ms` is what a hop costs beyond its compute.
The bill is ms over all hops: `compute` in the blocks, `queue` before them, `serve`
the rest of a hop's software (decode the frame, hand over, encode), `wire` what is left between the processes
(write, encrypt, socket, decrypt, wake up, the return included), `ends` embedding, head and argmax.
"""

from __future__ import annotations

import argparse
import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")  # oneDNN reads it once, here and in the nodes

import time
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import trio
from contest import (
    MODELS,
    Local,
    Walk,
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

PROMPT, TOKENS = 32, 64


async def contest(client: Client, local: Local, rounds: int, hops: int) -> dict[str, Any]:
    """One row of the table."""
    ids = prompt_ids(PROMPT)
    ours: list[float] = []
    theirs: list[float] = []
    same = True
    bills: list[dict[str, float]] = []
    for round_number in range(rounds + 1):
        expected, local_times = await trio.to_thread.run_sync(local.generate, ids, TOKENS + 1)
        async with open_walk(client, PROMPT + TOKENS + 1) as walk:
            got, times = await walk.generate(ids, TOKENS + 1)
            if not round_number:
                continue  # warm-up
            bills.append(bill_of(walk, times))
        same = same and got == expected
        ours.append(token_ms(times))
        theirs.append(token_ms(local_times))
    overhead = [bill["queue"] + bill["serve"] + bill["wire"] for bill in bills]
    return {
        "hops": hops,
        "ours ms": rounded(ours),
        "local ms": rounded(theirs),
        **compared(ours, theirs),
        "hop ms": round(median(overhead) / hops, 2),
        "same ids": same,
        **{part: rounded([bill[part] for bill in bills]) for part in bills[0]},
    }


def token_ms(times: list[float]) -> float:
    """The median time between tokens."""
    return median(after - before for before, after in pairwise(times)) * 1e3


def bill_of(walk: Walk, times: list[float]) -> dict[str, float]:
    """Where a token's time went, in ms."""
    steps = walk.session.timings
    compute = median(sum(bill.compute_us for bill in step.bills) for step in steps) / 1e3
    queue = median(sum(bill.queue_us for bill in step.bills) for step in steps) / 1e3
    serve = median(sum(bill.serve_us for bill in step.bills) for step in steps) / 1e3
    step = median(step.seconds for step in steps) * 1e3
    return {
        "compute": compute,
        "queue": queue,
        "serve": serve - compute - queue,
        "wire": step - serve,
        "ends": token_ms(times) - step,
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", nargs="+", default=MODELS)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--hops", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    started = time.monotonic()
    for name in options.model:
        with model_folder(name) as folder:
            for dtype in options.dtype:
                local = Local(folder, dtype)
                for hops in options.hops:
                    async with open_swarm(folder, evenly(blocks_of(folder), hops), dtype) as client:
                        row = await contest(client, local, options.rounds, hops)
                    rows.append({"model": name, "dtype": dtype, **row})
    report(f"decode, {PROMPT} + {TOKENS} tokens, {time.monotonic() - started:.0f} s in all", rows)


if __name__ == "__main__":
    trio.run(main)
