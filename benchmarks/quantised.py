"""Spans with quantised weights on one device: products, steps, whole tokens, memory while loading.

    python benchmarks/quantised.py --shape 8b                      # what the parts below say, in one run
    python benchmarks/quantised.py --part products --tiles         # each candidate of the kernels' tiles
    python benchmarks/quantised.py --part tokens --beside          # and transformers, eager and compiled
    python benchmarks/quantised.py --shape 70b --weights int4
    python benchmarks/quantised.py --part loading --shape 8b --blocks 8 --device cpu

Weights are random and made as they are asked for, so nothing is written to disk. Of several rounds the
median counts; everything that is compared runs in one process.
"""

from __future__ import annotations

import argparse
import gc
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any
from zlib import crc32

import psutil
import torch
from contest import SHAPES, report
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.checkpoint.spec import model_spec
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.compute.layers import Linear
from p2pinfer.models.compute.runner import Chunk, SpanRunner, open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.configs.defaults import complete_config
from p2pinfer.models.quantised.formats import FORMATS, quantise
from p2pinfer.models.quantised.products import choose_product
from p2pinfer.models.span import BlockSpan

PARTS = ("products", "steps", "prefill", "tokens", "loading")
CONTEXTS = (32, 1000, 3900)
STEPS, PROMPT, TOKENS = 32, 32, 64
LARGE: dict[str, Any] = {
    **{"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64},
    **{"num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256},
}


class RandomWeights:
    """A file of a Llama's tensors that are cut from one pool of random numbers."""

    sha256 = "0" * 64
    stored_dtype = "bfloat16"

    def __init__(self, config: Mapping[str, Any], device: str) -> None:
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
        block = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        self._shapes: dict[str, tuple[int, ...]] = {
            f"model.layers.{index}.{name}.weight": shape
            for index in range(config["num_hidden_layers"])
            for name, shape in block.items()
        }
        ends = {"model.embed_tokens": (config["vocab_size"], hidden), "model.norm": (hidden,)}
        ends["lm_head"] = ends["model.embed_tokens"]
        self._shapes |= {f"{name}.weight": shape for name, shape in ends.items()}
        self.names = frozenset(self._shapes)
        generator = torch.Generator(device).manual_seed(0)
        self._pool = torch.empty((1 << 16) + hidden * inner, dtype=torch.bfloat16, device=device)
        self._pool.normal_(0, 0.02, generator=generator)

    def bytes_of(self, name: str) -> int:
        return 2 * _numbers(self._shapes[name])

    def read(self, name: str) -> Tensor:
        shape = self._shapes[name]
        start, count = crc32(name.encode()) % (1 << 15) * 2, _numbers(shape)
        pool = self._pool[start:]
        numbers = pool.repeat(-(-count // len(pool)))[:count] if count > len(pool) else pool[:count].clone()
        return numbers.view(shape) if len(shape) > 1 else 1 + numbers


def random_checkpoint(shape: str, device: str, blocks: int | None = None) -> Checkpoint:
    """A checkpoint of such a shape, whose tensors come from `device`."""
    sizes = LARGE if shape == "70b" else SHAPES[shape]
    plain = LlamaConfig(
        **{"vocab_size": 32000, "max_position_embeddings": 8192, "tie_word_embeddings": False, **sizes}
    )
    config = {**plain.to_dict(), "dtype": "bfloat16", "num_hidden_layers": blocks or plain.num_hidden_layers}
    file = RandomWeights(config, device)
    spec = model_spec(shape, config, {"model.safetensors": file.sha256})
    return Checkpoint(Path("/nowhere"), spec, {"model.safetensors": file}, complete_config(shape, config))


class Clock:
    """Times calls on a device."""

    def __init__(self, device: str) -> None:
        self._device = device

    def now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def milliseconds(self, call: Callable[[], Any], times: int = 5) -> float:
        call()
        taken: list[float] = []
        for _ in range(times):
            started = self.now()
            call()
            taken.append(self.now() - started)
        return round(median(taken) * 1e3, 3)


def products(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One product of each shape in a block, cold caches, in microseconds."""
    sizes = LARGE if options.shape == "70b" else SHAPES[options.shape]
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    kv = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    rows: list[dict[str, Any]] = []
    for outputs, inputs in (
        (hidden + 2 * kv, hidden),
        (hidden, hidden),
        (2 * inner, hidden),
        (hidden, inner),
    ):
        weight = torch.randn(outputs, inputs, device=options.device).mul_(0.02).bfloat16()
        layers: dict[str, Any] = {"auto": Linear(weight)}
        for name in options.weights:
            if name != "auto":
                layers[name] = choose_product(quantise(weight, FORMATS[name]), torch.bfloat16)
        for count in (1, 2, 8, 16, 24, 32, 64, 512):
            given = torch.randn(count, inputs, device=options.device).bfloat16()
            exact = functional.linear(given, weight)
            row: dict[str, Any] = {"outputs": outputs, "inputs": inputs, "rows": count}
            for name, layer in layers.items():
                row[f"{name} us"] = _cold_us(lambda layer=layer, given=given: layer(given), options.device)
                row[f"{name} off"] = round(float((layer(given) - exact).norm() / exact.norm()), 4)
            rows.append(row)
        if options.tiles:
            _report_tiles(weight, options)
    return rows


def _cold_us(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        from triton.testing import do_bench

        return round(do_bench(call, warmup=5, rep=30, return_mode="median") * 1e3, 1)
    return round(Clock(device).milliseconds(call) * 1e3, 1)


def _report_tiles(weight: Tensor, options: argparse.Namespace) -> None:
    from p2pinfer.models.quantised import gpu_products

    for name in options.weights:
        if name == "auto":
            continue
        packed = quantise(weight, FORMATS[name])
        product = gpu_products.OnGpu(packed, {})
        found: list[dict[str, Any]] = []
        for rows in (1, 16, 32):
            given = torch.randn(rows, packed.inputs, device="cuda").bfloat16()
            for tile in gpu_products.candidates(packed, rows):
                ms = gpu_products.milliseconds(product, given, tile)
                found.append({"rows": rows, "tile": str(tuple(tile)), "us": round(ms * 1e3, 1)})
        report(f"tiles: {name}, {tuple(weight.shape)}", found)


def opened(options: argparse.Namespace, checkpoint: Checkpoint, weights: str) -> SpanRunner:
    """A runner of the whole checkpoint."""
    config = ComputeConfig(
        device=options.device,
        dtype="bfloat16",
        weights=weights,
        threads=options.threads,
        cache_bytes=options.cache_gib << 30,
    )
    gc.collect()
    return open_runner(checkpoint, BlockSpan(0, checkpoint.spec.num_blocks), config)


def filled(runner: SpanRunner, tokens: int, room: int) -> Any:
    """A session that has `tokens` cached, and room for some more."""
    lease = runner.cache.reserve(tokens + room)
    for start in range(0, tokens, 512):
        count = min(512, tokens - start)
        runner.run([Chunk(lease, start, torch.randn(count, runner.spec.hidden_size))])
    return lease


def step_ms(runner: SpanRunner, clock: Clock, tokens: int, sessions: int = 1) -> float:
    """Median time of a step of one token in each of some sessions."""
    leases = [filled(runner, tokens, STEPS + 2) for _ in range(sessions)]
    rows = torch.randn(1, runner.spec.hidden_size)
    taken: list[float] = []
    for step in range(STEPS):
        chunks = [Chunk(lease, tokens + step, rows) for lease in leases]
        started = clock.now()
        runner.run(chunks)
        taken.append((clock.now() - started) * 1e3)
    for lease in leases:
        lease.release()
    return round(median(taken[4:]), 3)


def spans(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Steps at several lengths, 24 sessions together, a prompt, and whole tokens; a row per format."""
    clock = Clock(options.device)
    checkpoint = random_checkpoint(options.shape, options.device, options.blocks)
    ends: Any = None
    rows: list[dict[str, Any]] = []
    if options.beside:
        report(f"transformers, {options.shape}", transformers_rows(options, clock))
    if "tokens" in options.part:
        ends = load_embedding_and_head(checkpoint, ComputeConfig(device=options.device, dtype="bfloat16"))
    for weights in options.weights:
        started = clock.now()
        runner = opened(options, checkpoint, weights)
        row: dict[str, Any] = {"weights": weights, "load s": round(clock.now() - started, 1)}
        if options.device == "cuda":
            row["GiB"] = round(torch.cuda.memory_allocated() / 2**30 - options.cache_gib, 1)
        if "steps" in options.part:
            row |= {f"{tokens} ms": step_ms(runner, clock, tokens) for tokens in options.contexts}
            row["24 together ms"] = step_ms(runner, clock, 128, 24)
        if "prefill" in options.part:
            row["2047 s"] = prefill_s(runner, clock)
        if "tokens" in options.part:
            row["tok/s"] = tokens_per_s(runner, ends, clock)
        rows.append(row)
        del runner
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return rows


def prefill_s(runner: SpanRunner, clock: Clock) -> float:
    """Time of a prompt of 2,047 tokens in chunks of 512."""
    hidden = torch.randn(2047, runner.spec.hidden_size)
    taken: list[float] = []
    for _ in range(3):
        lease = runner.cache.reserve(2048)
        started = clock.now()
        for start in range(0, 2047, 512):
            runner.run([Chunk(lease, start, hidden[start : start + 512])])
        taken.append(clock.now() - started)
        lease.release()
    return round(median(taken), 3)


def tokens_per_s(runner: SpanRunner, ends: Any, clock: Clock) -> float:
    """Greedy tokens a second, embedding and head included, no network."""
    ids = list(range(5, 5 + PROMPT))
    lease = runner.cache.reserve(PROMPT + TOKENS + 1)
    hidden = runner.run([Chunk(lease, 0, ends.embed(ids))])[0]
    times: list[float] = []
    for position in range(PROMPT, PROMPT + TOKENS):
        token = int(ends.logits(hidden[-1:])[-1].argmax())
        times.append(clock.now())
        hidden = runner.run([Chunk(lease, position, ends.embed([token]))])[0]
    lease.release()
    return round((TOKENS - 9) / (times[-1] - times[8]), 1)


def transformers_rows(options: argparse.Namespace, clock: Clock) -> list[dict[str, Any]]:
    """transformers, whole model: eager, and with a static cache that its own generate compiles for."""
    config = LlamaConfig(
        **{"max_position_embeddings": 8192, "tie_word_embeddings": False, **SHAPES[options.shape]}
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(options.device):
        model: Any = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    prompt = torch.arange(5, 5 + PROMPT, device=options.device)[None]

    def generate(count: int, **how: Any) -> None:
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            pad_token_id=0,
            **how,
        )

    rows: list[dict[str, Any]] = []
    for name, how in (("eager", {}), ("static, compiled", {"cache_implementation": "static"})):
        if name != "eager" and options.device != "cuda":
            continue
        generate(TOKENS, **how)
        generate(TOKENS, **how)
        times: dict[int, float] = {}
        for count in (8, TOKENS):
            times[count] = clock.milliseconds(lambda count=count, how=how: generate(count, **how), 3)
        rows.append(
            {
                "weights": f"transformers {name}",
                "tok/s": round((TOKENS - 8) * 1e3 / (times[TOKENS] - times[8]), 1),
            }
        )
    model = None
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
    return rows


def loading(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak of memory while a span is loaded over what it takes when it is."""
    rows: list[dict[str, Any]] = []
    for weights in options.weights:
        checkpoint = random_checkpoint(options.shape, "cpu", options.blocks)
        small = ComputeConfig(device=options.device, dtype="bfloat16", weights=weights, cache_bytes=1 << 24)
        gc.collect()
        with Peak(options.device) as peak:
            started = time.perf_counter()
            runner = open_runner(checkpoint, BlockSpan(0, checkpoint.spec.num_blocks), small)
            seconds = time.perf_counter() - started
        held = sum(map(bytes_of, blocks_of_runner(runner)))
        rows.append(
            {
                "weights": weights,
                "GiB held": round(held / 2**30, 3),
                "peak GiB": round(peak.bytes / 2**30, 3),
                "peak / held": round(peak.bytes / held, 3),
                "sizing GiB": round(
                    checkpoint.spec.num_blocks * checkpoint.spec.block_bytes(runner.numerics) / 2**30, 3
                ),
                "s": round(seconds, 1),
            }
        )
        del runner
    return rows


def blocks_of_runner(runner: SpanRunner) -> list[Any]:
    """All products of its blocks."""
    layers = [blocks.layers(index) for blocks in runner.parts for index in range(len(blocks.span))]
    return [part for each in layers for part in (each.qkv, each.output, each.mlp.gate_up, each.mlp.down)]


def bytes_of(layer: Any) -> int:
    """Bytes that a product's weight takes."""
    return int(layer.dense().nbytes if isinstance(layer, Linear) else layer.nbytes)


class Peak:
    """The most memory taken while the block runs, above what was taken before."""

    def __init__(self, device: str) -> None:
        self.bytes = 0
        self._device = device
        self._ended = threading.Event()
        self._process = psutil.Process()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Peak:
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._before = self._process.memory_info().rss
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self._before
            return
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            self.bytes = max(self.bytes, self._process.memory_info().rss - self._before)


def _numbers(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--part", nargs="+", choices=PARTS, default=["products", "steps", "prefill", "tokens"]
    )
    parser.add_argument("--shape", default="8b", choices=[*SHAPES, "70b"])
    parser.add_argument("--blocks", type=int, help="fewer than the shape has")
    parser.add_argument("--weights", nargs="+", default=["auto", "int8", "int4", "nf4"])
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cache-gib", type=int, default=4)
    parser.add_argument("--tiles", action="store_true", help="time each candidate of the kernels' tiles")
    parser.add_argument("--beside", action="store_true", help="transformers in the same run")
    options = parser.parse_args()
    if options.device == "cuda":
        print(torch.cuda.get_device_name(), torch.__version__, file=sys.stderr)
    if "products" in options.part:
        report(f"products, {options.shape}", products(options))
    if {"steps", "prefill", "tokens"} & set(options.part):
        report(f"spans, {options.shape}", spans(options))
    if "loading" in options.part:
        report(f"loading, {options.shape}", loading(options))


if __name__ == "__main__":
    main()
