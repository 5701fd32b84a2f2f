"""Rotary position embeddings, for tokens at any positions of any sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pinfer.models.configs.rope_config import rotary_size

from .architecture import Architecture


class Rotation(NamedTuple):
    """The angles of a batch: for each token a cosine and a sine, that of a pair's first number negated."""

    cos: Tensor  # (tokens, 1, numbers of a head that are rotated)
    sin: Tensor
    neighbours: bool = False  # whether a pair's numbers lie side by side, and not half of them apart


class Ropes:
    """The rotary embeddings of a model's blocks.

    Attributes:
        by_kind: Each of them; the only one of a model has the kind "".
    """

    def __init__(self, config: Mapping[str, Any], architecture: Architecture, device: torch.device) -> None:
        settings = config["rope_parameters"]
        kinds = {"": settings} if "rope_type" in settings else settings
        self._kinds = architecture.rope_kinds
        self._blocks = len(architecture.windows)
        self.by_kind = {
            kind: Rope(rope, architecture.head_dim, device, neighbours=architecture.family.neighbours)
            for kind, rope in kinds.items()
            if rope["rope_type"] != "none"
        }

    def at(self, positions: Tensor, dtype: torch.dtype) -> Sequence[Rotation | None]:
        """The rotation of tokens at `positions` in each block; None where nothing is rotated.

        Args:
            positions: (tokens,) whole numbers.
        """
        found: dict[str | None, Rotation | None] = {
            kind: rope.at(positions, dtype) for kind, rope in self.by_kind.items()
        }
        if not self._kinds:
            return [found[""]] * self._blocks
        return [found.get(kind) for kind in self._kinds]


class Rope:
    """The frequencies of one rotary embedding.

    Those of two types depend on how long the text is when a token is computed, which for a token that is
    generated is its position: see `rope_config.prompt_limit`.
    """

    def __init__(
        self, rope: Mapping[str, Any], head_dim: int, device: torch.device, *, neighbours: bool = False
    ) -> None:
        """The embedding of one entry of a complete config's `rope_parameters`."""
        size = rotary_size(rope["rope_type"], rope, head_dim)
        self._size = size
        self._type = rope["rope_type"]
        self._neighbours = neighbours
        self._frequencies = self._twice(_frequencies(rope, size)).to(device)
        self._scale = _scale(rope)
        self._sign = self._twice(torch.ones(size // 2), first=-1).to(device)
        if self._type == "longrope":
            self._beyond = self._twice(_divided(rope, size, "long_factor")).to(device)
        if self._type == "dynamic":
            self._theta, self._factor = float(rope["rope_theta"]), float(rope["factor"])
            self._exponents = self._twice(_exponents(size)).to(device)
        self._original: int = rope.get("original_max_position_embeddings", 0)

    def at(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """The rotation of tokens at `positions`, a tensor of whole numbers (tokens,)."""
        angles = positions[:, None, None] * self._frequencies_at(positions[:, None, None])
        cos, sin = angles.cos() * self._scale, angles.sin() * (self._sign * self._scale)
        return Rotation(cos.to(dtype), sin.to(dtype), self._neighbours)

    def _twice(self, values: Tensor, first: int = 1) -> Tensor:
        """A value for both numbers of each pair, which lie side by side or half of all apart."""
        pair = (values * first, values)
        return torch.stack(pair, -1).flatten() if self._neighbours else torch.cat(pair)

    def _frequencies_at(self, positions: Tensor) -> Tensor:
        """(tokens, 1, 1) -> what broadcasts to (tokens, 1, head_dim); no branch looks at a position."""
        if self._type == "longrope":
            return torch.where(positions >= self._original, self._beyond, self._frequencies)
        if self._type == "dynamic":
            # NTK-aware interpolation for the length so far: a larger theta turns the slow pairs slower.
            growth = self._factor * (positions + 1) / self._original - (self._factor - 1)
            thetas = self._theta * growth.clamp(min=1.0) ** (self._size / (self._size - 2))
            grown = 1.0 / thetas**self._exponents
            return torch.where(positions >= self._original, grown, self._frequencies)
        return self._frequencies


def rotate(heads: Tensor, rotation: Rotation, *, stepwise: bool = False) -> None:
    """Turn `heads`, (tokens, any number of heads, head_dim), in place; see `Blocks.stepwise`.

    Where the rotation is narrower than a head, the first numbers are rotated.
    """
    width = rotation.cos.shape[-1]
    turned = heads if width == heads.shape[-1] else heads[..., :width]
    swapped = swap_pairs(turned, rotation) if rotation.neighbours else turned.roll(width // 2, -1)
    if stepwise:
        turned.mul_(rotation.cos).add_(swapped * rotation.sin)
        return
    turned.mul_(rotation.cos).addcmul_(swapped, rotation.sin)


def swap_pairs(turned: Tensor, rotation: Rotation) -> Tensor:
    """A copy in which the two numbers of each pair have changed places."""
    if rotation.neighbours:
        return turned.reshape(*turned.shape[:-1], -1, 2).flip(-1).flatten(-2)
    return turned.roll(turned.shape[-1] // 2, -1)


def _exponents(size: int) -> Tensor:
    return torch.arange(0, size, 2, dtype=torch.float32) / size


def _frequencies(rope: Mapping[str, Any], size: int) -> Tensor:
    """Radians a position for each pair of a head, (size / 2,).

    A scaled type divides them by a factor, all (position interpolation, arXiv 2306.15595) or the lower ones:
    what turns often within the original context is kept, and in between the two are mixed. LongRoPE (arXiv
    2402.13753) has searched for a divisor of each.
    """
    frequencies = 1.0 / float(rope["rope_theta"]) ** _exponents(size)
    match rope["rope_type"]:
        case "linear":
            kept = torch.zeros_like(frequencies)
        case "llama3":
            kept = _kept_by_llama3(rope, frequencies)
        case "yarn":
            kept = _kept_by_yarn(rope, size)
        case "proportional":
            turned = int(rope["partial_rotary_factor"] * size // 2)
            return torch.where(torch.arange(size // 2) < turned, frequencies / rope["factor"], 0)
        case "longrope":
            return _divided(rope, size, "short_factor")
        case _:
            return frequencies
    return torch.lerp(frequencies / rope["factor"], frequencies, kept.clamp(0, 1))


def _divided(rope: Mapping[str, Any], size: int, divisors: str) -> Tensor:
    return 1.0 / (
        torch.tensor(rope[divisors], dtype=torch.float32) * float(rope["rope_theta"]) ** _exponents(size)
    )


def _kept_by_llama3(rope: Mapping[str, Any], frequencies: Tensor) -> Tensor:
    """Part of each frequency that is kept: a ramp over turns, as in Llama 3.1 (llama-models, model.py)."""
    turns = frequencies * float(rope["original_max_position_embeddings"]) / (2 * math.pi)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    return (turns - low) / (high - low)


def _kept_by_yarn(rope: Mapping[str, Any], size: int) -> Tensor:
    """Part of each frequency that is kept: a ramp over its number (YaRN, arXiv 2309.00071, 3.2 and A.2)."""

    def number_of(turns: float) -> float:
        radians = turns * 2 * math.pi / rope["original_max_position_embeddings"]
        return -size * math.log(radians) / (2 * math.log(rope["rope_theta"]))

    first, last = number_of(rope["beta_fast"]), number_of(rope["beta_slow"])
    if rope["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    return 1 - (torch.arange(size // 2) - first) / ((last - first) or 0.001)


def _scale(rope: Mapping[str, Any]) -> float:
    """Factor on queries and keys, applied through their cosines and sines."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    match rope["rope_type"]:
        case "yarn":
            return _scale_of_yarn(rope)
        case "longrope" if rope["factor"] > 1:
            return math.sqrt(
                1 + math.log(rope["factor"]) / math.log(rope["original_max_position_embeddings"])
            )
        case _:
            return 1.0


def _scale_of_yarn(rope: Mapping[str, Any]) -> float:
    """YaRN's scale (3.4); DeepSeek weighs the logarithm."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(max(rope["factor"], 1)) + 1

    if rope["mscale"] and rope["mscale_all_dim"]:
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1)
