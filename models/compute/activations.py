"""Activation functions of feed-forward layers, by their names in transformers (ACT2FN).

Those of its names are here that are a function of a number alone. Names for one and the same function share
an entry: transformers keeps several spellings of the tanh approximation, which differ in the last bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

_gelu_tanh = partial(functional.gelu, approximate="tanh")


def _gelu_10(rows: Tensor) -> Tensor:
    return functional.gelu(rows).clamp_(-10, 10)


def _laplace(rows: Tensor) -> Tensor:
    """The Laplace distribution's integral with Mega's constants (arXiv 2209.10655, 3.4)."""
    return torch.erf((rows - 0.707107) / (0.282095 * math.sqrt(2))).add_(1).mul_(0.5)


def _quick_gelu(rows: Tensor) -> Tensor:
    return (1.702 * rows).sigmoid_() * rows  # a gradient needs what sigmoid gave


def _relu2(rows: Tensor) -> Tensor:
    return functional.relu(rows).square()  # a gradient needs what relu gave


def _sqrtsoftplus(rows: Tensor) -> Tensor:
    return functional.softplus(rows).sqrt_()


def _linear(rows: Tensor) -> Tensor:
    return rows.clone()  # the caller writes to what it gets


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_10": _gelu_10,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": functional.gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": functional.hardswish,
    "laplace": _laplace,
    "leaky_relu": functional.leaky_relu,
    "linear": _linear,
    "mish": functional.mish,
    "quick_gelu": _quick_gelu,
    "relu": functional.relu,
    "relu2": _relu2,
    "relu6": functional.relu6,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "sqrtsoftplus": _sqrtsoftplus,
    "swish": functional.silu,
    "tanh": torch.tanh,
}
