"""Bytes read and memory taken while a span of a checkpoint of 30 shards is loaded.

    python benchmarks/shards.py

Each row is a process of its own. Bytes are those of all read calls (`rchar` of /proc/self/io) from the
opening of the model to the span in memory. Memory is the peak above what the process had before. A folder is
hashed as a whole once, since its revision is a hash of all of it; that is remembered. A model of the hub or
from peers has published hashes, so only the shards that the span needs are there at all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

BLOCKS, SPAN = 30, (10, 14)
SIZES = {
    **{"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4},
    **{"intermediate_size": 2816, "vocab_size": 32000, "num_hidden_layers": BLOCKS},
}


def write_model(folder: Path) -> None:
    """A Llama of random weights, a block in each shard."""
    import torch
    from safetensors.torch import save_file

    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    kv = hidden // SIZES["num_attention_heads"] * SIZES["num_key_value_heads"]
    shapes = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
    shapes |= {"o_proj": (hidden, hidden)}
    weight_map: dict[str, str] = {}
    for index in range(BLOCKS):
        at = f"model.layers.{index}"
        tensors = {
            f"{at}.self_attn.{name}.weight": torch.randn(shape) * 0.02 for name, shape in shapes.items()
        }
        for name, shape in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
            tensors[f"{at}.mlp.{name}_proj.weight"] = torch.randn(shape) * 0.02
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{name}.weight"] = torch.ones(hidden)
        if index == 0:
            tensors["model.embed_tokens.weight"] = torch.randn(SIZES["vocab_size"], hidden) * 0.02
        if index == BLOCKS - 1:
            tensors |= {"model.norm.weight": torch.ones(hidden)}
            tensors["lm_head.weight"] = torch.randn(SIZES["vocab_size"], hidden) * 0.02
        shard = f"model-{index + 1:05}-of-{BLOCKS:05}.safetensors"
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "llama", **SIZES, "max_position_embeddings": 4096, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))


def bring_from_peers(folder: Path, cache: Path) -> str:
    """What a download from peers of this span leaves in `cache`; returns the model's name."""
    from p2pinfer.models.checkpoint.model_source import FolderSource
    from p2pinfer.models.checkpoint.stored_model import open_stored, remember_manifest
    from p2pinfer.models.pieces.manifest import SwarmName
    from p2pinfer.models.span import BlockSpan

    manifest = FolderSource(folder, cache_dir=cache / "of-giver").holdings().manifest
    there = remember_manifest(manifest, cache)
    for name in ("config.json", "model.safetensors.index.json"):
        (there / name).write_bytes((folder / name).read_bytes())
    source = open_stored(SwarmName(manifest.revision), cache)
    for file in source.missing(BlockSpan(*SPAN), embedding_and_head=False).files:
        (there / file.name).write_bytes((folder / file.name).read_bytes())
    return str(SwarmName(manifest.revision))


def read_bytes() -> int:
    """Bytes that this process has read so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def load(model: str, cache: Path, weights: str) -> None:
    """Load the span, and print what that took."""
    import psutil
    import torch

    from p2pinfer.models.checkpoint.source import resolve_model
    from p2pinfer.models.compute.runner import Chunk, open_runner
    from p2pinfer.models.config import ComputeConfig
    from p2pinfer.models.span import BlockSpan

    torch.set_num_threads(1)
    process = psutil.Process()
    before, read_before, peak, ended = process.memory_info().rss, read_bytes(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    watching = threading.Thread(target=watch)
    watching.start()
    began = time.perf_counter()
    source = resolve_model(model, cache_dir=cache)
    opened_s = time.perf_counter() - began
    checkpoint = source.fetch(BlockSpan(*SPAN), embedding_and_head=False)
    config = ComputeConfig(device="cpu", dtype="bfloat16", weights=weights, threads=1, cache_bytes=1 << 22)
    runner = open_runner(checkpoint, BlockSpan(*SPAN), config)
    seconds = time.perf_counter() - began
    # /proc has another file to read for each look at the memory, which is no part of the model.
    read = read_bytes() - read_before
    ended.set()
    watching.join()
    runner.run([Chunk(runner.cache.reserve(1), 0, torch.zeros(1, SIZES["hidden_size"]))])
    names = {name for index in range(*SPAN) for name in checkpoint.block_names(index)}
    print(
        json.dumps(
            {
                "span MB": round(checkpoint.bytes_of(names) / 1e6, 1),
                "read MB": round(read / 1e6, 1),
                "peak MB": round(peak[0] / 1e6, 1),
                "opened s": round(opened_s, 2),
                "loaded s": round(seconds, 2),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        model, cache, weights = options.load
        load(model, Path(cache), weights)
        return
    from contest import report

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "model")
        folder.mkdir()
        write_model(folder)
        total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        peers = bring_from_peers(folder, Path(name, "peers"))
        rows: list[dict[str, Any]] = []
        for what, model, cache, weights in (
            ("a folder, for the first time", str(folder), "cache", "auto"),
            ("a folder, hashed before", str(folder), "cache", "auto"),
            ("from the hub or peers, for the first time", peers, "peers", "auto"),
            ("from the hub or peers, hashed before", peers, "peers", "auto"),
            ("the same in int8", peers, "peers", "int8"),
            ("the same in int4", peers, "peers", "int4"),
        ):
            command = [sys.executable, __file__, "--load", model, str(Path(name, cache)), weights]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
            rows.append({"model": what, **json.loads(said.stdout)})
    report(f"blocks {SPAN[0]}:{SPAN[1]} of {BLOCKS}, {BLOCKS} shards, {total / 1e6:.0f} MB", rows)


if __name__ == "__main__":
    main()
