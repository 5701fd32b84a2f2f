"""How fast a span is, without any network: against transformers' own layers, generate, and the bare products.

    python benchmarks/blocks.py                                  # the CPU shapes, one thread
    python benchmarks/blocks.py --device cuda --model 8b         # eight blocks of a Llama-3.1-8B shape
    python benchmarks/blocks.py --model 1024x16 --dtype bfloat16 --prefill 512 2047

All contenders of a row take turns in one process; figures are medians over the rounds, in milliseconds, with
the least and the greatest round behind each in JSON (`NAME rounds`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from quotient import spread
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, logging

import p2pinfer.models
from p2pinfer.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.compute.layers import Linear
from p2pinfer.models.compute.runner import Chunk, open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan

Step = Callable[[], object]

SHAPES: dict[str, dict[str, Any]] = {
    "512x8": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "intermediate_size": 1376,
    },
    "1024x16": {
        "hidden_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 2816,
    },
    "8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    },
}
CONTEXT = 128  # tokens that are cached when decoding begins
STEPS = 16


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    quiet: Any = logging
    quiet.disable_progress_bar()
    rows: list[dict[str, Any]] = []
    for name in options.model:
        with _model_folder(name, options.device) as folder:
            for dtype in options.dtype:
                bench = Bench(open_checkpoint(folder, name), options.device, dtype, options.rounds)
                rows += [{"model": name, "dtype": dtype, **row} for row in bench.decode(options.batch)]
                rows += [{"model": name, "dtype": dtype, **row} for row in bench.prefill(options.prefill)]
                for row in rows[-len(options.batch) - len(options.prefill) :]:
                    print(_line(row), file=sys.stderr, flush=True)
    machine = {"torch": torch.__version__, "threads": options.threads, "load": os.getloadavg()}
    json.dump({"machine": machine, "rows": rows}, sys.stdout, indent=1)


class Bench:
    """One checkpoint in one dtype on one device, ours and transformers'."""

    def __init__(self, checkpoint: Checkpoint, device: str, dtype: str, rounds: int) -> None:
        self.spec = checkpoint.spec
        self.rounds = rounds
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, dtype)
        config = ComputeConfig(device=device, dtype=dtype, cache_bytes=1 << 30)
        self.runner = open_runner(checkpoint, BlockSpan(0, self.spec.num_blocks), config)
        self.ends = load_embedding_and_head(checkpoint, config)
        auto_model: Any = AutoModelForCausalLM
        self.stock = auto_model.from_pretrained(checkpoint.folder, dtype=self.dtype).to(self.device)
        self.config: Any = self.stock.config
        self.products = self._products()

    def decode(self, batches: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Milliseconds a step with so many sequences at once."""
        for batch in batches:
            contenders = {
                "ours": self._ours(batch, with_ends=False),
                "layers": self._layers(batch),
                "products": self._bare(batch, packed=False),
                "packed products": self._bare(batch, packed=True),
                "ours with ends": self._ours(batch, with_ends=True),
            }
            figures = self._take_turns(contenders, STEPS)
            figures["generate"] = self._generate(batch)
            yield {"what": "decode", "tokens": batch, **figures}

    def prefill(self, lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Milliseconds for a prompt of so many tokens, in one piece."""
        for tokens in lengths:
            hidden = self._hidden(tokens)
            lease = self.runner.cache.reserve(tokens)
            contenders: dict[str, Step] = {
                "ours": lambda lease=lease, hidden=hidden: self.runner.run([Chunk(lease, 0, hidden)]),
                "layers": lambda hidden=hidden: self._stock_layers(
                    hidden[None], DynamicCache(config=self.config)
                ),
                "products": lambda hidden=hidden: self._multiply(hidden, packed=False),
                "packed products": lambda hidden=hidden: self._multiply(hidden, packed=True),
            }
            yield {"what": "prefill", "tokens": tokens, **self._take_turns(contenders, 1)}
            lease.release()

    def _ours(self, batch: int, *, with_ends: bool) -> Step:
        leases = [self.runner.cache.reserve(CONTEXT + STEPS * (self.rounds + 1)) for _ in range(batch)]
        self.runner.run([Chunk(lease, 0, self._hidden(CONTEXT).cpu()) for lease in leases])
        rows = [self._hidden(1).cpu() for _ in leases]
        ids = [[7] for _ in leases]

        def step() -> None:
            self.runner.run(
                [Chunk(lease, lease.length, row) for lease, row in zip(leases, rows, strict=True)]
            )

        def step_with_ends() -> None:
            chunks = [
                Chunk(lease, lease.length, self.ends.embed(i)) for lease, i in zip(leases, ids, strict=True)
            ]
            logits = self.ends.logits(torch.cat(self.runner.run(chunks)))
            ids[:] = [[token] for token in logits.argmax(-1).tolist()]

        return step_with_ends if with_ends else step

    def _layers(self, batch: int) -> Step:
        cache = DynamicCache(config=self.config)
        self._stock_layers(self._hidden(CONTEXT).expand(batch, -1, -1), cache)
        row = self._hidden(1).expand(batch, -1, -1)
        return lambda: self._stock_layers(row, cache)

    def _stock_layers(self, hidden: Tensor, cache: DynamicCache) -> Tensor:
        model = self.stock.model
        start = cache.get_seq_length()
        positions = torch.arange(start, start + hidden.shape[1], device=self.device)[None]
        with torch.inference_mode():
            rotary = model.rotary_emb(hidden, positions)
            for layer in model.layers:
                hidden = layer(
                    hidden, position_ids=positions, position_embeddings=rotary, past_key_values=cache
                )
            return hidden.cpu()

    def _bare(self, batch: int, *, packed: bool) -> Step:
        rows = self._hidden(batch)
        return lambda: self._multiply(rows, packed=packed)

    def _multiply(self, rows: Tensor, *, packed: bool) -> None:
        inputs = {weight.shape[1]: rows.new_zeros(len(rows), weight.shape[1]) for weight, _ in self.products}
        with torch.inference_mode():
            for weight, linear in self.products:
                given = inputs[weight.shape[1]]
                product = linear(given) if packed else functional.linear(given, weight)
            product[:1].cpu()

    def _products(self) -> list[tuple[Tensor, Linear]]:
        """What a step must multiply with, queries, keys and values in one, gate and up in one."""
        weights: list[Tensor] = []
        for layer in self.stock.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            heads = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
            weights += [torch.cat(heads).detach(), attention.o_proj.weight.detach()]
            weights += [
                torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)).detach(),
                mlp.down_proj.weight.detach(),
            ]
        return [(weight, Linear(weight)) for weight in weights]

    def _generate(self, batch: int) -> float:
        ids = torch.full((batch, CONTEXT), 7, device=self.device)

        def seconds(tokens: int) -> float:
            start = time.perf_counter()
            self.stock.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
            )
            return time.perf_counter() - start

        seconds(2)
        return statistics.median((seconds(STEPS + 1) - seconds(1)) / STEPS * 1e3 for _ in range(self.rounds))

    def _take_turns(self, contenders: dict[str, Step], steps: int) -> dict[str, float | str]:
        figures: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(self.rounds + 1):
            for name, step in contenders.items():
                start = time.perf_counter()
                for _ in range(steps):
                    step()
                if turn:  # the first one warms up
                    figures[name].append((time.perf_counter() - start) / steps * 1e3)
        return {
            **{name: statistics.median(times) for name, times in figures.items()},
            **{f"{name} rounds": spread(times) for name, times in figures.items()},
        }

    def _hidden(self, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(tokens)
        return torch.randn(tokens, self.spec.hidden_size, generator=generator).to(self.device, self.dtype)


@contextmanager
def _model_folder(name: str, device: str) -> Iterator[Path]:
    if name == "tiny-stories":
        yield Path(p2pinfer.models.__path__[0]) / name
    elif name == "smollm2":
        sys.path.insert(0, str(Path(__file__).parent))
        from smollm2 import smollm2_folder  # beside this script

        yield smollm2_folder()
    else:
        config = LlamaConfig(**{"vocab_size": 32000, "max_position_embeddings": 8192, **SHAPES[name]})
        auto_model: Any = AutoModelForCausalLM
        with tempfile.TemporaryDirectory() as folder:
            with torch.device(device):
                auto_model.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
            yield Path(folder)


def _line(row: dict[str, Any]) -> str:
    figures = "  ".join(f"{name} {value:.2f}" for name, value in row.items() if isinstance(value, float))
    return f"{row['model']:12} {row['dtype']:8} {row['what']:7} {row['tokens']:4}:  {figures}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = ["512x8", "1024x16", "smollm2", "tiny-stories"]
    parser.add_argument("--model", nargs="+", choices=[*models, "8b"], default=models)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prefill", nargs="*", type=int, default=[512])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
