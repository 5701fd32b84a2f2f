"""Rotary position embeddings, for tokens at any positions of any sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """The angles of a batch: for each token a cosine and a sine, the sine's first half negated."""

    cos: Tensor  # (tokens, 1, head_dim)
    sin: Tensor  # (tokens, 1, head_dim)


class Rope:
    """The frequencies of a model's rotary embedding, by its config as `complete_config` gives it."""

    def __init__(self, config: Mapping[str, Any], device: torch.device) -> None:
        rope = config["rope_parameters"]
        frequencies = _frequencies(rope, config["head_dim"]).to(device)
        self._frequencies = torch.cat((frequencies, frequencies))
        self._scale = _scale_of_yarn(rope) if rope["rope_type"] == "yarn" else 1.0
        half = frequencies.numel()
        self._sign = torch.cat((-torch.ones(half), torch.ones(half))).to(device)

    def at(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """The rotation of tokens at `positions`, a tensor of whole numbers (tokens,)."""
        angles = positions[:, None, None] * self._frequencies
        cos, sin = angles.cos() * self._scale, angles.sin() * (self._sign * self._scale)
        return Rotation(cos.to(dtype), sin.to(dtype))


def rotate(heads: Tensor, rotation: Rotation, *, stepwise: bool = False) -> None:
    """Turn `heads`, (tokens, any number of heads, head_dim), in place; see `Blocks.stepwise`."""
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    if stepwise:
        heads.mul_(rotation.cos).add_(swapped * rotation.sin)
        return
    heads.mul_(rotation.cos).addcmul_(swapped, rotation.sin)


def _frequencies(rope: Mapping[str, Any], size: int) -> Tensor:
    """Radians a position for each pair of a head, (size / 2,).

    A scaled type divides them by a factor, all (position interpolation, arXiv 2306.15595) or the lower ones:
    what turns often within the original context is kept, and in between the two are mixed.
    """
    frequencies = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    match rope["rope_type"]:
        case "linear":
            kept = torch.zeros_like(frequencies)
        case "llama3":
            kept = _kept_by_llama3(rope, frequencies)
        case "yarn":
            kept = _kept_by_yarn(rope, size)
        case _:
            return frequencies
    return torch.lerp(frequencies / rope["factor"], frequencies, kept.clamp(0, 1))


def _kept_by_llama3(rope: Mapping[str, Any], frequencies: Tensor) -> Tensor:
    """How much of each frequency is kept: a ramp over its turns, as in Llama 3.1 (llama-models, model.py)."""
    turns = frequencies * float(rope["original_max_position_embeddings"]) / (2 * math.pi)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    return (turns - low) / (high - low)


def _kept_by_yarn(rope: Mapping[str, Any], size: int) -> Tensor:
    """How much of each frequency is kept: a ramp over its number (YaRN, arXiv 2309.00071, 3.2 and A.2)."""

    def number_of(turns: float) -> float:
        radians = turns * 2 * math.pi / rope["original_max_position_embeddings"]
        return -size * math.log(radians) / (2 * math.log(rope["rope_theta"]))

    first, last = number_of(rope["beta_fast"]), number_of(rope["beta_slow"])
    if rope["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    return 1 - (torch.arange(size // 2) - first) / ((last - first) or 0.001)


def _scale_of_yarn(rope: Mapping[str, Any]) -> float:
    """What YaRN multiplies queries and keys by (3.4); DeepSeek weighs the logarithm."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(max(rope["factor"], 1)) + 1

    if rope["attention_factor"] is not None:
        return float(rope["attention_factor"])
    if rope["mscale"] and rope["mscale_all_dim"]:
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1)
