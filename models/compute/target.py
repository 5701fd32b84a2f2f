"""Device and numerics of loaded weights, as a `ComputeConfig` asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pinfer.errors import ConfigError
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.machine.memory import free_on
from p2pinfer.models.numerics import FLOAT32, Numerics, plain

from .layers import can_pack

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

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the computation."""
        return DTYPES[self.numerics.compute]

    def place(self, stored: Tensor) -> Tensor:
        """The tensor as this target wants it; the same one if it is so already."""
        return stored.to(self.device, self.dtype)

    def cache_budget(self) -> int:
        """The bytes that an automatic KV cache may take, the weights being in place."""
        free = free_on(self.device).bytes
        if self.device.type == "cuda":
            return int(free * _CUDA_CACHE_SHARE)
        return min(int(free * _CPU_CACHE_SHARE), _CPU_CACHE_CAP)


def choose_target(config: ComputeConfig, stored: str) -> Target:
    """The target for a checkpoint whose weights are `stored` as that dtype.

    Raises:
        ConfigError: The config asks for a device or a dtype that is not to be had.
    """
    device = _device(config.device)
    if config.dtype != "auto":
        return Target(device, plain(config.dtype))
    # A CPU without kernels for a dtype would emulate it, slower than float32 by far.
    slow = device.type == "cpu" and not can_pack(device, DTYPES[stored])
    return Target(device, FLOAT32 if slow else plain(stored))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"there is no device {name}: this computer has {torch.cuda.device_count()} CUDA devices"
        )
    return device
