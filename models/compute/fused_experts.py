"""Experts that are stored as one tensor each of all gates and ups, and of all downs, as gpt-oss has them.

Rows of gate and up take turns. The matrices lie transposed, (experts, in, out); or, as published, in MXFP4:
`_blocks`, (experts, out, in / 32, 16), with two 4-bit numbers to a byte, the lower half first, and `_scales`,
(experts, out, in / 32), whose bytes are exponents (OCP Microscaling Formats 1.0, 5.3.3 and 6.3). A bfloat16
holds each of those products exactly, so nothing is lost where they are laid out as such.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from .architecture import Architecture
from .families import ExpertNames
from .layers import AnyLinear
from .weights import Weights

_GROUP: Final = 32  # numbers of one scale
_BIAS: Final = 127
_E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def read_fused(
    architecture: Architecture, weights: Weights, names: ExpertNames
) -> Iterator[tuple[AnyLinear, AnyLinear]]:
    """Each expert's product of gate and up, side by side, and that of down, one expert after the other."""
    count, hidden, inner = architecture.num_experts, architecture.hidden_size, architecture.expert_size
    both = _Stack(weights, f"{names.expert}.{names.gate}", count, hidden, 2 * inner)
    down = _Stack(weights, f"{names.expert}.{names.down}", count, inner, hidden)
    turns = torch.cat((torch.arange(0, 2 * inner, 2), torch.arange(1, 2 * inner, 2)))
    for index in range(count):
        yield (
            weights.placed(both.weight(index)[turns], both.bias[index][turns]),
            weights.placed(down.weight(index), down.bias[index]),
        )


class _Stack:
    """One product of all experts."""

    def __init__(self, weights: Weights, name: str, count: int, inputs: int, outputs: int) -> None:
        self.bias = weights.stored(f"{name}_bias", count, outputs)
        self._whole: Tensor | None = None
        if weights.has(f"{name}_blocks"):
            groups = inputs // _GROUP
            self._blocks = weights.stored(f"{name}_blocks", count, outputs, groups, _GROUP // 2)
            self._scales = weights.stored(f"{name}_scales", count, outputs, groups)
        else:
            self._whole = weights.stored(name, count, inputs, outputs)

    def weight(self, index: int) -> Tensor:
        """(outputs, inputs) of one expert."""
        if self._whole is not None:
            return self._whole[index].t().contiguous()
        return from_mxfp4(self._blocks[index], self._scales[index])


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """(rows, groups, 16) and (rows, groups) bytes as (rows, 32 * groups) bfloat16."""
    numbers = torch.tensor([*_E2M1, *(-each for each in _E2M1)], dtype=torch.bfloat16)
    halves = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).int()
    values = torch.ldexp(numbers[halves].float(), (scales.int() - _BIAS)[..., None])
    return values.to(torch.bfloat16).flatten(-2)
