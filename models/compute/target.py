"""Device and numerics of loaded weights, as a `ComputeConfig` asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pinfer.errors import ConfigError
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.machine.memory import free_on
from p2pinfer.models.numerics import FLOAT32, Codec, Numerics, plain
from p2pinfer.models.quantised.formats import FORMATS, Format, Packed
from p2pinfer.models.quantised.products import QuantisedLinear

from .layers import AnyLinear, Linear, ScaledLinear, can_pack

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# A CPU's memory is shared with everything else that runs there, so its share is smaller, and capped. It is
# address space: a page of the cache takes memory when a session first writes to it.
_CPU_CACHE_SHARE, _CPU_CACHE_CAP = 0.25, 4 << 30
_CUDA_CACHE_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Target:
    """Device, and numerics of the weights there."""

    device: torch.device
    numerics: Numerics
    laid_out: bool = False  # quantised weights are held as what they stand for, as an audit does

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the computation."""
        return DTYPES[self.numerics.compute]

    def place(self, stored: Tensor) -> Tensor:
        """The tensor as this target wants it; the same one if it is so already."""
        return stored.to(self.device, self.dtype)

    @property
    def format(self) -> Format | None:
        """Format that weights are quantised to; None if they are not."""
        return FORMATS.get(self.numerics.weights)

    def linear(self, weight: Tensor | Packed, bias: Tensor | None = None) -> AnyLinear:
        """The layer of a weight that is in place, or packed."""
        if not isinstance(weight, Packed):
            return Linear(weight, bias)
        if self.laid_out:
            matrix, scales = weight.laid_out(self.dtype)
            return Linear(matrix, bias) if scales is None else ScaledLinear(Linear(matrix), scales, bias)
        return QuantisedLinear(weight, self.dtype, bias)

    def cache_budget(self) -> int:
        """The bytes that an automatic KV cache may take, the weights being in place."""
        free = free_on(self.device).bytes
        if self.device.type == "cuda":
            return int(free * _CUDA_CACHE_SHARE)
        return min(int(free * _CPU_CACHE_SHARE), _CPU_CACHE_CAP)


def cache_budget(parts: Sequence[tuple[Target, int]], slot_bytes: int) -> int:
    """Bytes that an automatic KV cache of a whole span may take, the weights being in place.

    Args:
        parts: Targets, and the number of blocks on each.
        slot_bytes: Of one token in one block. Every device caches the same tokens: the fullest one decides.
    """
    devices = [target.device for target, _ in parts]
    tokens = min(
        target.cache_budget() // devices.count(target.device) // (blocks * slot_bytes)
        for target, blocks in parts
    )
    return tokens * slot_bytes * sum(blocks for _, blocks in parts)


def choose_target(config: ComputeConfig, stored: str, *, laid_out: bool = False) -> Target:
    """The target for a checkpoint whose weights are `stored` as that dtype; of several devices the first.

    Args:
        laid_out: Hold quantised weights as what they stand for.

    Raises:
        ConfigError: The config asks for a device or a dtype that is not to be had.
    """
    return choose_targets(config, stored, laid_out=laid_out)[0]


def choose_targets(config: ComputeConfig, stored: str, *, laid_out: bool = False) -> tuple[Target, ...]:
    """A target for each device that the config names; all of them compute in the same numerics.

    Args:
        laid_out: Hold quantised weights as what they stand for.

    Raises:
        ConfigError: The config asks for a device or a dtype that is not to be had.
    """
    devices = [_device(name) for name in config.device.split(",")]
    if config.weights != "auto":
        compute = _beside_quantised(devices) if config.dtype == "auto" else plain(config.dtype).compute
        return tuple(Target(device, Numerics(config.weights, compute), laid_out) for device in devices)
    if config.dtype != "auto":
        numerics = plain(config.dtype)
    else:
        # A CPU without kernels for a dtype would emulate it, slower than float32 by far.
        slow = any(each.type == "cpu" and not can_pack(each, DTYPES[stored]) for each in devices)
        numerics = FLOAT32 if slow else plain(stored)
    return tuple(Target(device, numerics) for device in devices)


def _beside_quantised(devices: Sequence[torch.device]) -> Codec:
    """Dtype of the computation beside quantised weights, whose fast kernels all take bfloat16."""
    if any(each.type == "cpu" and not can_pack(each, torch.bfloat16) for each in devices):
        return "float32"
    cards = any(each.type == "cuda" for each in devices)
    return "float16" if cards and not torch.cuda.is_bf16_supported(including_emulation=False) else "bfloat16"


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"there is no device {name}: this computer has {torch.cuda.device_count()} CUDA devices"
        )
    return device
