"""Tokens a second of training over node processes on loopback, and by transformers and peft on one machine.

    python benchmarks/training_speed.py [--method lora deep] [--dtype float32 bfloat16]
    python benchmarks/training_speed.py --shape 8b --device cuda --length 512 --dtype bfloat16

Random weights, in one run. Only the time of forward and backward passes counts. Here the one machine has all
cores, or the card; the nodes have them together.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from contest import SHAPES, evenly, report
from learning import connect, prepare, with_deep_prompts
from quotient import compared

import p2pinfer.models
from p2pinfer.hf import DistributedModelForCausalLM
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL

PROMPT_TOKENS = 16
ALL_SHAPES = SHAPES | {"8b-half": {**SHAPES["8b"], "num_hidden_layers": 16}}


@contextmanager
def random_model(shape: str, device: str) -> Iterator[Path]:
    """A llama of random weights in bfloat16. Its vocabulary is small: the blocks are what is measured."""
    library: Any = transformers
    config = library.LlamaConfig(
        **{
            **ALL_SHAPES[shape],
            "vocab_size": 4096,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            library.LlamaForCausalLM(config).save_pretrained(folder)
        torch.set_default_dtype(torch.float32)
        # The client loads a tokenizer, which nobody uses.
        shutil.copy(Path(p2pinfer.models.__path__[0], BUNDLED_MODEL, "tokenizer.json"), folder)
        yield Path(folder)


def seconds_of_passes(model: Any, ids: torch.Tensor, steps: int) -> list[tuple[float, float]]:
    """Seconds of each step forward and backward, after two that warm up."""
    taken: list[tuple[float, float]] = []

    def now() -> float:
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(steps + 2):
        started = now()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        turned = now()
        loss.backward()
        taken.append((turned - started, now() - turned))
        model.zero_grad()
    return taken[2:]


def seconds_of_steps(model: Any, ids: torch.Tensor, steps: int) -> list[float]:
    """Seconds of each step, there and back."""
    return [there + back for there, back in seconds_of_passes(model, ids, steps)]


def measure(folder: Path, shape: str, method: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    library: Any = transformers
    cores = os.cpu_count() or 1
    wide = ALL_SHAPES[shape]
    ids = torch.randint(0, 1024, (options.rows, options.length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(options.device)
    deep = method == "deep"
    spans = tuple(evenly(wide["num_hidden_layers"], options.hops))
    threads = max(1, cores // options.hops)
    with connect(dtype, spans, [], str(folder), device=options.device, threads=threads) as swarm:
        torch.set_num_threads(max(1, cores // (options.hops + 1)))
        ours = DistributedModelForCausalLM.from_pretrained(
            folder, swarm=swarm, dtype=dtype, deep_prompts=PROMPT_TOKENS if deep else 0
        )
        mine = seconds_of_steps(prepare(method, ours.to(options.device)), ids, options.steps)
    torch.set_num_threads(cores)
    theirs = library.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    theirs = theirs.to(options.device)
    if deep:
        theirs.mask = torch.ones(ids.shape, dtype=torch.long, device=options.device)
        size = (wide["num_hidden_layers"], PROMPT_TOKENS, wide["hidden_size"])
        theirs = with_deep_prompts(theirs, torch.zeros(size, device=options.device))
    other = seconds_of_steps(prepare(method, theirs), ids, options.steps)
    tokens = options.rows * options.length
    return {
        "shape": shape,
        "batch": f"{options.rows}x{options.length}",
        "hops": options.hops,
        "method": method,
        "dtype": dtype,
        "tokens/s": round(tokens / statistics.median(mine), 1),
        "best": round(tokens / min(mine), 1),
        "one machine": round(tokens / statistics.median(other), 1),
        "its best": round(tokens / min(other), 1),
        **compared(mine, other),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=ALL_SHAPES, default="1024x16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--hops", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--method", choices=("lora", "prompt", "deep"), nargs="+", default=["lora"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), nargs="+", default=["float32"])
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore", FutureWarning)
    rows: list[dict[str, Any]] = []
    with random_model(options.shape, options.device) as folder:
        for dtype in options.dtype:
            for method in options.method:
                rows.append(measure(folder, options.shape, method, dtype, options))
                print(rows[-1], flush=True)
    report("forward and backward passes of training", rows)


if __name__ == "__main__":
    main()
