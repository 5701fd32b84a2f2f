"""Forward and backward passes of training over real distances, against what the lines and the hops allow.

    python benchmarks/training_line.py                               # five minutes
    python benchmarks/training_line.py --delay 0 25 --mbit 20 100 --dtype bfloat16

Hosts, lines and nodes are those of distance.py: public, one torch thread each, in the lab (so Linux, and root
or user namespaces). The client is a model of transformers and peft over the swarm, with LoRA of all products
and random weights; only the time of its passes counts, as in training_speed.py.

`bound` is what a pipeline takes, in both directions: the rows as they travel over an uplink once or, where
that takes longer, compute over hops, and (hops + 1) delays. Compute is what transformers and peft take for
the same pass with one thread; hops that share this machine's processors have no more of them together, and
hide each other's delays. `star` is the same for rows that go over the client's uplink once for every hop, and
to each hop and back, as they do here. `of bound` and `of star` are the median step's time over them; 1 is
best. `line` and `compute` are seconds of `bound`, there and back together. `load` is the machine's before the
first step. Gradients of the adapter are in none of the bounds: each microbatch's come back from each hop.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the lab, which belongs to the tests
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

from collections.abc import Iterator, Sequence
from itertools import product
from statistics import median
from typing import Any, Final

import torch
import transformers
from contest import report
from distance import Chain
from learning import prepare
from pipeline import bounds_s
from training_speed import ALL_SHAPES, random_model, seconds_of_passes

from p2pinfer.client_config import AuditConfig, ClientConfig
from p2pinfer.hf import DistributedModelForCausalLM
from tests.lab.commands import open_commands
from tests.lab.lab import open_lab
from tests.lab.namespaces import why_not
from tests.lab.pairs import leave
from tests.lab.pinned import POLICY
from tests.lab.scenario import Scenario, Site

PATIENCE_S: Final = 60.0  # for one step

Passes = list[tuple[float, float]]  # seconds of each step, forward and backward


def tokens_of(options: argparse.Namespace) -> torch.Tensor:
    """(rows, length) token ids, the same every time."""
    return torch.randint(0, 1024, (options.rows, options.length), generator=torch.Generator().manual_seed(0))


def train_inside(folder: str, bootstrap: str, options: argparse.Namespace) -> Passes:
    """What the client measures in its own host."""
    (dtype,) = options.dtype
    model = DistributedModelForCausalLM.from_pretrained(
        folder,
        bootstrap=[bootstrap],
        dtype=dtype,
        policy=POLICY,
        config=ClientConfig(dtype=dtype, find_timeout_s=60.0),
        audit=AuditConfig(rate=0.0),
    )
    try:
        return seconds_of_passes(prepare("lora", model), tokens_of(options), options.steps)
    finally:
        model.close()


def train_alone(folder: Path, dtype: str, options: argparse.Namespace) -> Passes:
    """The same by transformers and peft, with one thread."""
    library: Any = transformers
    model = library.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return seconds_of_passes(prepare("lora", model), tokens_of(options), options.steps)


def measure(options: argparse.Namespace, dtype: str) -> Iterator[dict[str, Any]]:
    """The rows of one dtype."""
    hops: int = options.hops
    scenario = Scenario(
        "training", "public hosts", tuple(Site(host) for host in (*(f"n{n}" for n in range(hops)), "me"))
    )
    shape = ALL_SHAPES[options.shape]
    with (
        random_model(options.shape, "cpu") as folder,
        open_lab(scenario) as lab,
        open_commands(lab) as commands,
    ):
        alone = train_alone(folder, dtype, options)
        forward_s, backward_s = (median(each) for each in zip(*alone, strict=True))
        chain = Chain(commands, folder, dtype, hops)
        tokens = options.rows * options.length
        row_bytes = shape["hidden_size"] * getattr(torch, dtype).itemsize
        try:
            for delay_ms, mbit in product(options.delay, options.mbit):
                chain.set_lines(delay_ms, mbit)
                load = os.getloadavg()[0]
                sizes = ("--rows", str(options.rows), "--length", str(options.length))
                words = ("--inside", str(folder), chain.bootstrap, "--dtype", dtype, *sizes)
                steps = ("--steps", str(options.steps))
                patience_s = PATIENCE_S * (options.steps + 2)
                passes: Passes = chain.ask_inside(__file__, *words, *steps, patience_s=patience_s)
                line_s = tokens * row_bytes * 8 / (mbit * 1e6)
                bound, star, compute_s = bounds_s(
                    (forward_s, backward_s), line_s, delay_ms / 1e3, hops, min(hops, os.cpu_count() or 1)
                )
                step_s = median(map(sum, passes))
                yield {
                    "shape": options.shape,
                    "batch": f"{options.rows}x{options.length}",
                    "dtype": dtype,
                    "hops": hops,
                    "delay": delay_ms,
                    "mbit": mbit,
                    "load": round(load, 1),
                    "line": round(2 * line_s, 2),
                    "compute": round(compute_s, 2),
                    "bound": round(bound, 2),
                    "star": round(star, 2),
                    "forward s": round(median(there for there, _ in passes), 2),
                    "backward s": round(median(back for _, back in passes), 2),
                    "step s": round(step_s, 2),
                    "of bound": round(step_s / bound, 2),
                    "of star": round(step_s / star, 2),
                }
        finally:
            leave(chain.nodes)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=ALL_SHAPES, default="1024x16")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), nargs="+", default=["float32"])
    parser.add_argument("--hops", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--delay", nargs="+", type=float, default=[25.0], help="ms, one way")
    parser.add_argument("--mbit", nargs="+", type=float, default=[100.0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    if options.inside:
        print(json.dumps(train_inside(*options.inside, options)))
        return
    if lacking := why_not():
        sys.exit(lacking)
    started, rows = time.monotonic(), list[dict[str, Any]]()
    for dtype in options.dtype:
        for row in measure(options, dtype):
            rows.append(row)
            print(*(f"{key} {value}" for key, value in row.items()), file=sys.stderr, sep="  ")
    report(f"training over lines, {time.monotonic() - started:.0f} s in all", rows)


if __name__ == "__main__":
    main()
