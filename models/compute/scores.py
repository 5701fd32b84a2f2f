"""Attention whose scores are held, for what fused kernels do not compute.

Soft caps (Gemma 2), scores that grow with a key's position (ALiBi), and scores of no key at all that take a
part of each head's weights (gpt-oss's sinks) come on top of the products. Those scores are computed in
float32: accurate, and MKL compiles nothing. Fewer are held at once than a long prompt has.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from .architecture import Architecture

# Rows of scores held at once where they are not fused away.
_SCORE_ROWS: Final = 256


class Extras(NamedTuple):
    """Additions to the scores of one block.

    Attributes:
        softcap: Bound of the scores.
        bias: (kv_heads, group, keys) float32, added to them, the same for all tokens.
        sinks: (kv_heads, group) float32, scores of no key.
    """

    softcap: float | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None

    @property
    def are_none(self) -> bool:
        """True if a fused kernel computes all there is."""
        return self.softcap is None and self.bias is None and self.sinks is None


def extras_of(
    architecture: Architecture, sinks: Tensor | None, first_key: int, keys: int, device: torch.device
) -> Extras:
    """Additions to the scores of a block over adjacent keys, by `sinks`, (heads,)."""
    shape = (architecture.kv_heads, architecture.heads // architecture.kv_heads)
    bias = None
    if architecture.alibi:
        positions = torch.arange(first_key, first_key + keys, device=device)
        bias = alibi_bias(architecture, positions).view(*shape, keys)
    return Extras(architecture.attention_softcap, bias, None if sinks is None else sinks.view(shape))


def alibi_bias(architecture: Architecture, positions: Tensor) -> Tensor:
    """Additions to the scores of keys at `positions`, (keys,), by head: (heads, keys) float32.

    It grows with the key's own position: of all keys that a token sees this differs from the distance, which
    the paper has, by one number, and the softmax takes that away. Falcon rounds it to bfloat16 and divides it
    as it does the products.
    """
    slopes = alibi_slopes(architecture.heads, positions.device)[:, None]
    if architecture.family.alibi == "bfloat16":
        rounded = slopes.bfloat16() * positions
        return rounded.float() / math.sqrt(architecture.head_dim)
    return slopes * positions


def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """(heads,): the geometric series of the power of two below, filled up from that of the one above.

    So the paper's authors have it for any number of heads (arXiv 2108.12409). Nothing is copied to the
    device, which a recording would not allow.
    """
    below = 2 ** math.floor(math.log2(heads))

    def powers(exponent: float, stop: int, step: int) -> Tensor:
        base = torch.full((), 2.0**exponent, device=device)
        return torch.pow(base, torch.arange(1, stop, step, device=device))

    return torch.cat((powers(-8 / below, 1 + below, 1), powers(-4 / below, 1 + 2 * (heads - below), 2)))


def attend_by_scores(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    extras: Extras,
    *,
    stepwise: bool = False,
) -> Tensor:
    """Attention of (any, kv_heads, tokens * group, head_dim) -> the same, `mask` added to the scores.

    Args:
        stepwise: Round scores and weights to the rows' dtype, as transformers' eager attention does.
    """
    dtype = rows.dtype if stepwise else torch.float32
    softcap = extras.softcap
    factor = 1.0 if stepwise else scale / (softcap or 1.0)
    keys = keys.to(dtype).transpose(2, 3)
    keys, values = keys if factor == 1 else keys * factor, values.to(dtype)
    outputs: list[Tensor] = []
    for start in range(0, rows.shape[2], _SCORE_ROWS):
        part = slice(start, start + _SCORE_ROWS)
        scores = rows[:, :, part].to(dtype) @ keys
        if stepwise:
            scores = scores * scale if softcap is None else scores * scale / softcap
        if softcap is not None:
            scores = scores.tanh_() * softcap
        heads = torch.arange(start, start + scores.shape[2], device=rows.device)
        if extras.bias is not None:
            scores += extras.bias[:, heads % extras.bias.shape[1]].to(dtype)
        if mask is not None:
            scores += mask[..., part, :]
        weights = _softmax(
            scores, None if extras.sinks is None else extras.sinks[:, heads % extras.sinks.shape[1]]
        )
        outputs.append(weights.to(dtype) @ values)
    return torch.cat(outputs, 2).to(rows.dtype)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Weights in float32; those of `sinks`, (kv_heads, rows), are dropped."""
    if sinks is None:
        return scores.softmax(-1, dtype=torch.float32)
    column = sinks[None, :, :, None].to(scores.dtype).expand(len(scores), -1, -1, -1)
    return torch.cat((scores, column), -1).softmax(-1, dtype=torch.float32)[..., :-1]
