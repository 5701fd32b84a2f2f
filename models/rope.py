"""Rotary position embeddings, for tokens at any positions of any sequences."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """The angles of a batch: for each token a cosine and a sine, the sine's first half negated."""

    cos: Tensor  # (tokens, 1, head_dim)
    sin: Tensor  # (tokens, 1, head_dim)


class Rope:
    """The frequencies of a model's rotary embedding."""

    def __init__(self, config: Any, device: torch.device) -> None:
        # 2 s to import, and families.py, which the tests of a table need, shall not pay them.
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        # Every family of ours computes frequencies as Llama does, scaled by the same registry of rope types.
        rotary: Any = LlamaRotaryEmbedding(config)
        frequencies: Tensor = rotary.inv_freq.to(device=device, dtype=torch.float32)
        self._frequencies = torch.cat((frequencies, frequencies))
        self._scale: float = rotary.attention_scaling
        half = frequencies.numel()
        self._sign = torch.cat((-torch.ones(half), torch.ones(half))).to(device)

    def at(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """The rotation of tokens at `positions`, a tensor of whole numbers (tokens,)."""
        angles = positions[:, None, None] * self._frequencies
        cos, sin = angles.cos() * self._scale, angles.sin() * (self._sign * self._scale)
        return Rotation(cos.to(dtype), sin.to(dtype))


def rotate(heads: Tensor, rotation: Rotation) -> None:
    """Turn `heads`, (tokens, any number of heads, head_dim), in place."""
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    heads.mul_(rotation.cos).addcmul_(swapped, rotation.sin)
