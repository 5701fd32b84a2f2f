"""Peers that do not compute what they were asked to: altered weights, other blocks, tampered outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.runner import Chunk, SpanRunner, open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.verify.noise_floor import NoiseFloor

# The quantiles of a normal distribution that QLoRA quantises to (Dettmers et al., 2023, appendix E).
_NF4 = (-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0)
_NF4 += (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)

Alter = Callable[[Tensor, torch.Generator], Tensor]


def int8_rows(weight: Tensor, _: torch.Generator) -> Tensor:
    """Symmetric int8, one scale an output row."""
    return _int8(weight)


def int8_groups(weight: Tensor, _: torch.Generator) -> Tensor:
    """Symmetric int8, one scale for 32 inputs."""
    return _int8(weight.view(len(weight), -1, 32)).view_as(weight)


def fp8(weight: Tensor, _: torch.Generator) -> Tensor:
    """float8_e4m3fn, one scale a matrix."""
    scale = weight.abs().max() / 448
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def nf4(weight: Tensor, _: torch.Generator) -> Tensor:
    """NF4 by groups of 64, or of 32 where 64 does not divide a row."""
    group = 64 if weight.shape[1] % 64 == 0 else 32
    rows = weight.view(-1, group)
    scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-12)
    levels = torch.tensor(_NF4)
    middles = (levels[1:] + levels[:-1]) / 2
    return (levels[torch.bucketize(rows / scale, middles)] * scale).view_as(weight)


def pruned(weight: Tensor, _: torch.Generator) -> Tensor:
    """The smallest tenth is zero."""
    return weight.where(weight.abs() > weight.abs().flatten().kthvalue(weight.numel() // 10).values, 0.0)


def tuned(relative_norm: float) -> Alter:
    """Fine-tuned: a random matrix of rank 8 and that relative norm is added."""

    def alter(weight: Tensor, rng: torch.Generator) -> Tensor:
        rows, columns = weight.shape
        update = torch.randn(rows, 8, generator=rng) @ torch.randn(8, columns, generator=rng)
        return weight + update * (relative_norm * weight.norm() / update.norm())

    return alter


def noisy(relative_std: float) -> Alter:
    """Normal noise of that share of the weights' standard deviation is added."""
    return lambda weight, rng: (
        weight + torch.randn(weight.shape, generator=rng) * (relative_std * weight.std())
    )


WEIGHTS: Mapping[str, Alter] = {
    "int8 per row": int8_rows,
    "int8, groups of 32": int8_groups,
    "fp8": fp8,
    "nf4": nf4,
    "10 % pruned": pruned,
    "another revision (rank 8, 1e-2)": tuned(1e-2),
    "noise of 1 % in the weights": noisy(1e-2),
}
DRIFTS: Mapping[str, Alter] = {
    "drift 3e-3 (rank 8)": tuned(3e-3),
    "drift 1e-3 (rank 8)": tuned(1e-3),
    "weight noise 3e-3": noisy(3e-3),
    "weight noise 1e-3": noisy(1e-3),
}


class AlteredCheckpoint(Checkpoint):
    """A checkpoint whose blocks' matrices are not those that were published."""

    def __init__(self, published: Checkpoint, alter: Alter) -> None:
        super().__init__(published.folder, published.spec, published._shards, published.config)
        self._alter = alter

    def read(self, name: str) -> Tensor:
        """See `Checkpoint`."""
        stored = super().read(name)
        if stored.dim() != 2 or ".layers." not in name:
            return stored
        rng = torch.Generator().manual_seed(sum(name.encode()))
        return self._alter(stored.float(), rng).to(stored.dtype)


def run_altered(
    checkpoint: Checkpoint, span: BlockSpan, alter: Alter, inputs: Sequence[Tensor], dtype: str = "bfloat16"
) -> list[Tensor]:
    """The outputs of a peer with altered weights, by session."""
    config = ComputeConfig(device="cpu", dtype=dtype, cache_bytes=1 << 28)
    runner = open_runner(AlteredCheckpoint(checkpoint, alter), span, config)
    return [run_parts(runner, each, [span]) for each in inputs]


def run_parts(runner: SpanRunner, hidden: Tensor, parts: Sequence[BlockSpan]) -> Tensor:
    """One session through these parts of a runner's span in this order, in one piece."""
    lease = runner.cache.reserve(len(hidden))
    for part in parts:
        (hidden,) = runner.run([Chunk(lease, 0, hidden)], part)
    lease.release()
    return hidden


def skipped(span: BlockSpan) -> list[BlockSpan]:
    """The span without its middle block; it must have more than one."""
    middle = (span.start + span.stop) // 2
    return [BlockSpan(*pair) for pair in ((span.start, middle), (middle + 1, span.stop)) if pair[0] < pair[1]]


def swapped(span: BlockSpan) -> list[BlockSpan]:
    """The span with two middle blocks in the wrong order; it must have more than one."""
    middle = (span.start + span.stop) // 2
    order = [*range(span.start, middle - 1), middle, middle - 1, *range(middle + 1, span.stop)]
    return [BlockSpan(block, block + 1) for block in order]


def tampered(outputs: Tensor, wrong: Tensor, every: int = 32) -> Tensor:
    """Every 32nd token's output, beginning with the sixth, is that of a span run wrongly."""
    changed = outputs.clone()
    changed[5::every] = wrong[5::every]
    return changed


def with_noise(outputs: Tensor, relative_norm: float, seed: int = 0) -> Tensor:
    """A random direction of that share of the token's norm is added to each token."""
    noise = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(seed))
    noise *= relative_norm * outputs.float().norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    return outputs.float() + noise


class Aim:
    """The attack from inside the tolerance: push every token along the gradient that changes its successor.

    The attacker knows the verifier's floor exactly and has the whole model, in transformers' layers.
    """

    def __init__(self, folder: Path, span: BlockSpan) -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model: Any = model.eval().requires_grad_(False)
        self._span = span

    def push(self, floor: NoiseFloor, ratio: float) -> Tensor:
        """The span's exact outputs, each moved until its ratio is `ratio`, all of it to one purpose."""
        step = self._gradient(floor.exact) * floor.scale
        step = step / step.norm(dim=-1, keepdim=True).clamp_min(1e-20)
        radius = ratio * floor.distance.clamp_min(floor.least)
        return floor.exact + radius[:, None] * step * floor.scale

    def _gradient(self, hidden: Tensor) -> Tensor:
        """Of (second logit - first logit), summed over the tokens, with respect to the span's output."""
        inner = self._model.model
        leaf = hidden.clone().detach().requires_grad_(True)
        positions = torch.arange(len(hidden))[None]
        seen = torch.ones(len(hidden), len(hidden), dtype=torch.bool).tril()
        mask = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[None, None]
        state = leaf[None]
        turned = inner.rotary_emb(state, positions)
        for layer in inner.layers[self._span.stop :]:
            output = layer(state, attention_mask=mask, position_ids=positions, position_embeddings=turned)
            state = output[0] if isinstance(output, tuple) else output
        best = self._model.lm_head(inner.norm(state))[0].topk(2).values
        (gradient,) = torch.autograd.grad((best[:, 1] - best[:, 0]).sum(), leaf)
        return gradient


def _int8(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (weight / scale).round() * scale
