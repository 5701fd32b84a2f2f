"""On an NVIDIA GPU: the ids in bfloat16, then a Llama-3.1-8B shape over 1, 2 and 4 processes on one card.

    python benchmarks/gpu.py                          # all of it, about ten minutes
    python benchmarks/gpu.py --part ids --model tiny-stories

Random weights, bfloat16, local transformers (eager) in the same run. The nodes share the card, so hops cost
software and no network; the figures are a starting line for work on graphs and kernels.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from typing import Any

import agree
import clients
import decode
import prefill
import torch
import trio
from contest import Local, blocks_of, evenly, model_folder, open_swarm, report

PARTS = ("ids", "speed", "clients")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--model", nargs="+", default=["tiny-stories", "smollm2"], help="for the ids")
    parser.add_argument("--hops", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--weights", nargs="+", default=["auto"], help="auto, int8, int4, nf4")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU here; benchmarks/decode.py measures on the CPU")
    print(torch.cuda.get_device_name(), file=sys.stderr)
    if "ids" in options.part:
        rows: list[dict[str, Any]] = []
        for name in options.model:
            with model_folder(name) as folder:
                rows += await agree.measure(name, folder, "bfloat16", (1, 2, 3, 4), 0.05, "cuda")
        report("greedy ids where the margin exceeds 0.05", rows)
    if {"speed", "clients"} & set(options.part):
        with model_folder("8b") as folder:
            if "speed" in options.part:
                local = Local(folder, "bfloat16", "cuda")
                decoding: list[dict[str, Any]] = []
                prefilling: list[dict[str, Any]] = []
                for hops, weights in product(options.hops, options.weights):
                    spans = evenly(blocks_of(folder), hops)
                    async with open_swarm(folder, spans, "bfloat16", "cuda", weights=weights) as client:
                        row = await decode.contest(client, local, options.rounds, hops)
                        decoding.append({"weights": weights, **row})
                        row = await prefill.contest(client, local, options.rounds, hops, 2047)
                        prefilling.append({"weights": weights, **row})
                report("decode, Llama-3.1-8B shape", decoding)
                report("prefill, Llama-3.1-8B shape", prefilling)
                del local
                torch.cuda.empty_cache()
            if "clients" in options.part:
                rows = await clients.measure("8b", folder, "bfloat16", "cuda", (1, 8), 64)
                report("clients at once on one node, Llama-3.1-8B shape", rows)


if __name__ == "__main__":
    trio.run(main)
