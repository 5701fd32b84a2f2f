"""Perplexity of SmolLM2-135M-Instruct on a text of this repository, by format of the blocks' weights.

    python benchmarks/perplexity.py --windows 8

Ours are what a node computes with `--weights`, in bfloat16. Beside them are the same products after another
library has quantised and laid them out again: `Q8_0` and `Q4_0` are llama.cpp's formats of 8.5 and 4.5 bits,
by its package `gguf`; `bitsandbytes nf4` is that library's own, if it is installed. The model's weights were
Q4_1 before they were bfloat16, so formats of four bits lose on them what two roundings to different grids do.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import torch
from contest import model_folder, report
from torch import Tensor

from p2pinfer.models.checkpoint.checkpoint import Checkpoint, block_of, open_checkpoint
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.compute.runner import Chunk, open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.numerics import QUANTISED
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.text.text import load_tokenizer

TEXT = Path(__file__).parents[1] / "docs" / "threat-model.md"
WINDOW = 512
BITS = {"int8": 8.0, "int4": 4.5, "nf4": 4.5}


class Through:
    """A checkpoint whose products another library has quantised and laid out again."""

    def __init__(self, checkpoint: Checkpoint, through: Callable[[Tensor], Tensor]) -> None:
        self._checkpoint = checkpoint
        self._through = through

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def read(self, name: str) -> Tensor:
        tensor = self._checkpoint.read(name)
        # Embedding and head are the client's, and whole: only products of blocks are compared.
        is_product = block_of(name) is not None and tensor.dim() == 2
        return self._through(tensor.float()) if is_product else tensor


def by_gguf(kind: str) -> Callable[[Tensor], Tensor]:
    """Through one of llama.cpp's formats."""
    chosen = gguf.GGMLQuantizationType[kind]

    def through(tensor: Tensor) -> Tensor:
        packed = gguf.quants.quantize(tensor.numpy(), chosen)
        return torch.from_numpy(gguf.quants.dequantize(packed, chosen))

    return through


def by_bitsandbytes(kind: str) -> Callable[[Tensor], Tensor]:
    """Through int8 or nf4, by bitsandbytes' own kernels."""
    return _int8 if kind == "int8" else _nf4


def _int8(tensor: Tensor) -> Tensor:
    from bitsandbytes import functional

    codes, largest, _ = functional.int8_vectorwise_quant(tensor.half().contiguous())
    laid_out: Tensor = functional.int8_vectorwise_dequant(codes, largest)
    return laid_out


def _nf4(tensor: Tensor) -> Tensor:
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(tensor.contiguous(), quant_type="nf4", blocksize=64)
    laid_out: Tensor = functional.dequantize_4bit(packed, state)
    return laid_out


def perplexity(checkpoint: Any, weights: str, dtype: str, windows: list[list[int]]) -> float:
    """Of the tokens of each window but its first."""
    config = ComputeConfig(device="cpu", dtype=dtype, weights=weights, cache_bytes=1 << 28)
    runner = open_runner(checkpoint, BlockSpan(0, checkpoint.spec.num_blocks), config)
    ends = load_embedding_and_head(checkpoint, ComputeConfig(device="cpu", dtype="float32"))
    lost, count = 0.0, 0
    for ids in windows:
        lease = runner.cache.reserve(len(ids))
        hidden = runner.run([Chunk(lease, 0, ends.embed(ids))])[0]
        lease.release()
        odds = ends.logits(hidden[:-1].float()).log_softmax(-1)
        lost -= float(odds[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].double().sum())
        count += len(ids) - 1
    return math.exp(lost / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--windows", type=int, default=4, help=f"of {WINDOW} tokens each")
    parser.add_argument("--only", nargs="+", help="these rows, beside bfloat16")
    options = parser.parse_args()
    with model_folder("smollm2") as folder:
        checkpoint = open_checkpoint(folder, "smollm2")
        ids = load_tokenizer(folder).encode(TEXT.read_text())[: WINDOW * options.windows]
        windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
        ways: list[tuple[str, float, Any, str, str]] = [
            ("float32", 32, checkpoint, "auto", "float32"),
            ("bfloat16", 16, checkpoint, "auto", "bfloat16"),
            *((each, BITS[each], checkpoint, each, "bfloat16") for each in QUANTISED),
            ("llama.cpp Q8_0", 8.5, Through(checkpoint, by_gguf("Q8_0")), "auto", "bfloat16"),
            ("llama.cpp Q4_0", 4.5, Through(checkpoint, by_gguf("Q4_0")), "auto", "bfloat16"),
        ]
        if find_spec("bitsandbytes") is not None:
            ways += [
                (f"bitsandbytes {kind}", bits, Through(checkpoint, by_bitsandbytes(kind)), "auto", "bfloat16")
                for kind, bits in (("int8", 8.0), ("nf4", 4.5))
            ]
        ways = [way for way in ways if way[0] in ("bfloat16", *(options.only or [way[0]]))]
        rows: list[dict[str, Any]] = []
        for name, bits, opened, weights, dtype in ways:
            found = perplexity(opened, weights, dtype, windows)
            rows.append({"weights": name, "bits": bits, "perplexity": round(found, 3)})
            print(rows[-1], file=sys.stderr, flush=True)
        plain = next(row["perplexity"] for row in rows if row["weights"] == "bfloat16")
        for row in rows:
            row["over bfloat16"] = f"{row['perplexity'] / plain - 1:+.2%}"
        report(f"perplexity of {len(ids)} tokens of {TEXT.name}", rows)


if __name__ == "__main__":
    main()
