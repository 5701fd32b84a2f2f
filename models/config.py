"""Settings of the computing layer: device, dtype, threads, memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from p2pinfer.errors import ConfigError

from .numerics import QUANTISED

DTYPES: Final = ("auto", "float32", "bfloat16", "float16")
WEIGHTS: Final = ("auto", *QUANTISED)
DEVICES: Final = ("auto", "cpu", "cuda")  # a card among several is cuda:1
_DEVICE: Final = r"(?:cpu|cuda(?::\d{1,3})?)"
_ONE_DEVICE: Final = re.compile(f"auto|{_DEVICE}")
_DEVICE_LIST: Final = re.compile(f"auto|{_DEVICE}(?:,{_DEVICE})*")


@dataclass(frozen=True, slots=True)
class ComputeConfig:
    """Settings of the computation of a span."""

    # "cpu", "cuda", "cuda:1", or several that share the blocks: "cuda:0,cuda:1"; auto: the first GPU if any
    device: str = "auto"
    # "float32", "bfloat16", "float16"; auto: the checkpoint's, if the device is quick at it
    dtype: str = "auto"
    # format of weights in memory: "int8", "int4", "nf4"; auto: the dtype of the computation
    weights: str = "auto"
    threads: int = 0  # torch threads on a CPU; 0: a node measures the fastest number, a client uses all cores
    # KV cache of the whole span; 0: a quarter of free memory up to 4 GiB, 0.8 of a GPU's
    cache_bytes: int = 0
    page_tokens: int = 64  # tokens per page of the KV cache

    def __post_init__(self) -> None:
        check_target(self.dtype, self.device, several=True)
        if self.weights not in WEIGHTS:
            raise ConfigError(f"unknown weights {self.weights!r}; choose one of {', '.join(WEIGHTS)}")
        for name, least in (("threads", 0), ("cache_bytes", 0), ("page_tokens", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} is {value}; it must be {least} or more")


def check_target(dtype: str, device: str, *, several: bool = False) -> None:
    """Nothing, if these are names of a dtype and a device; whether the device is here shows when it is used.

    Args:
        several: Whether names of devices may be joined by commas.

    Raises:
        ConfigError: One of them is not.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    if (_DEVICE_LIST if several else _ONE_DEVICE).fullmatch(device) is None:
        raise ConfigError(f"unknown device {device!r}; choose one of {', '.join(DEVICES)}")
