"""Lies too small for one audit: the next-likeliest token, int8 for some tokens, int8 KV caches.

Each is what a node with little to lose might do: it saves memory or time, or steers a text, and stays within
the limits of a single chunk. `lying_node.py` mounts them on a node, `detect_cheats.py` on spans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from cheats import WEIGHTS, AlteredCheckpoint
from torch import Tensor

from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.cache import CacheLease
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.compute.runner import Chunk, SpanRunner, open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan

LEAD = 0.095  # below which the likeliest token is replaced by the next one
PERIOD, INT8_OF_PERIOD = 32, 15  # of so many tokens so many are computed in int8

Run = Callable[[Sequence[Chunk], BlockSpan | None], list[Tensor]]


class NextLikeliest:
    """Moves a last hop's outputs until the next-likeliest token leads, where it is close behind anyway."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._head = load_embedding_and_head(checkpoint, ComputeConfig(device="cpu", dtype="float32"))
        name = (
            "model.embed_tokens.weight" if checkpoint.config.get("tie_word_embeddings") else "lm_head.weight"
        )
        self._rows = checkpoint.read(name).float()
        self._gain = checkpoint.read("model.norm.weight").float()

    def __call__(self, run: Run, chunk: Chunk, span: BlockSpan) -> Tensor:
        """The lie; see `lying_node.Lie`."""
        (output,) = run([chunk], span)
        return self.move(output)

    def move(self, output: Tensor) -> Tensor:
        """The outputs, (tokens, hidden_size), with the next-likeliest token ahead where it was close."""
        logits = self._head.logits(output)
        best = logits.topk(2)
        chances = logits.softmax(-1).gather(-1, best.indices)
        close = chances[:, 0] - chances[:, 1] < LEAD
        if not close.any():
            return output
        first, second = best.indices.unbind(-1)
        # The norm divides by a length that hardly changes, so the logits are linear in what is added.
        direction = (self._rows[second] - self._rows[first]) * self._gain
        length = output.float().square().mean(-1).sqrt()
        step = (best.values[:, 0] - best.values[:, 1]) * length / direction.square().sum(-1)
        moved = output.clone()
        for more in (1.05, 1.2, 1.5, 2.0, 3.0):
            still = close & (self._head.logits(moved).argmax(-1) != second)
            if not still.any():
                break
            shifted = output.float() + more * step[:, None] * direction
            moved[still] = shifted[still].to(output.dtype)
        return moved


class PartInt8:
    """Computes some tokens of every `PERIOD` with int8 weights, all of them in one cache."""

    def __init__(self, checkpoint: Checkpoint, span: BlockSpan, cache_bytes: int = 1 << 28) -> None:
        config = ComputeConfig(device="cpu", dtype="bfloat16", cache_bytes=cache_bytes)
        altered = AlteredCheckpoint(checkpoint, WEIGHTS["int8 per row"])
        self._altered = open_runner(altered, span, config)
        self._leases: dict[int, CacheLease] = {}

    def alone(self, honest: Tensor, inputs: Tensor) -> Tensor:
        """The lie for a session by itself, (tokens, hidden_size)."""
        lease = self._altered.cache.reserve(len(inputs))
        (cheap,) = self._altered.run([Chunk(lease, 0, inputs)])
        lease.release()
        return self._mix(honest, cheap, 0)

    def __call__(self, run: Run, chunk: Chunk, span: BlockSpan) -> Tensor:
        """The lie; see `lying_node.Lie`."""
        (output,) = run([chunk], span)
        lease = self._leases.get(id(chunk.lease))
        if lease is None:
            lease = self._leases[id(chunk.lease)] = self._altered.cache.reserve(chunk.lease.max_tokens)
        (cheap,) = self._altered.run([Chunk(lease, chunk.position, chunk.hidden)], span)
        return self._mix(output, cheap, chunk.position)

    @staticmethod
    def _mix(output: Tensor, cheap: Tensor, position: int) -> Tensor:
        positions = torch.arange(position, position + len(output))
        # Evenly spread, so that no chunk has them in its typical token.
        chosen = positions * INT8_OF_PERIOD % PERIOD < INT8_OF_PERIOD
        return torch.where(chosen[:, None], cheap, output)


def keep_cache_in_int8(runner: SpanRunner) -> None:
    """Have a runner's keys and values lose what int8, with one scale for each head and token, loses."""
    for each in runner.cache.pools:
        pool: Any = each
        pool.write = partial(_write_rounded, pool.write)


def _write_rounded(
    write: Callable[[int, Tensor, Tensor], None], block: int, slots: Tensor, heads: Tensor
) -> None:
    scale = heads.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    write(block, slots, ((heads.float() / scale).round() * scale).to(heads.dtype))
