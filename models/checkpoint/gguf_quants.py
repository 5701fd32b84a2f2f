"""Numbers of ggml's quantised types: blocks of bytes to float32.

The layouts are those of ggml-quants.c. Each function takes (blocks, bytes of one) uint8 and gives
(blocks, numbers of one) float32, with the operations in ggml's order, so that the results are the same
bits as those of the package `gguf`, which the tests compare with. That one works in numpy with several
copies of all numbers at once; here a tensor is laid out piece by piece, so loading takes the tensor and
little more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Final

import torch
from torch import Tensor

_PIECE_NUMBERS: Final = 1 << 22  # that are laid out at once
_K: Final = 256  # numbers of a block of the k-quants


def dequantise(content: Tensor, kind: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of this shape in float32, of its bytes, (n,) uint8; F16 and BF16 stay as they are.

    Raises:
        KeyError: The type is not read here; see `QUANTISED`.
    """
    if kind in _PLAIN:
        return content.view(_PLAIN[kind]).view(shape)
    size, numbers, lay_out = QUANTISED[kind]
    blocks = content.view(-1, size)
    output = torch.empty(len(blocks), numbers)
    step = _PIECE_NUMBERS // numbers
    for start in range(0, len(blocks), step):
        output[start : start + step] = lay_out(blocks[start : start + step])
    assert output.numel() == prod(shape)
    return output.view(shape)


def _halves(blocks: Tensor, start: int, count: int = 1) -> Tensor:
    """(blocks, count) float32 of float16 numbers that begin at a byte."""
    return blocks[:, start : start + 2 * count].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """(blocks, n) bytes -> (blocks, 2 n): all lower halves, then all upper ones."""
    return torch.cat((packed & 15, packed >> 4), -1)


def _fifth_bits(blocks: Tensor, start: int) -> Tensor:
    """(blocks, 32): the bits of four bytes, times 16."""
    bits = torch.arange(8, dtype=torch.uint8)
    return ((blocks[:, start : start + 4, None] >> bits) & 1).flatten(1) << 4


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float() * _halves(blocks, 0)


def _q4_0(blocks: Tensor) -> Tensor:
    return _halves(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _halves(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _halves(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    numbers = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return _halves(blocks, 0) * (numbers.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    numbers = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return _halves(blocks, 0) * numbers.float() + _halves(blocks, 2)


def _scales_and_mins(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(blocks, 8, 1) each, float32: 6-bit factors of 32 numbers, in twelve bytes, times the block's own."""
    low, middle, high = (blocks[:, start : start + 4] for start in (4, 8, 12))
    scales = torch.cat((low & 63, (high & 15) | ((low >> 6) << 4)), -1)
    mins = torch.cat((middle & 63, (high >> 4) | ((middle >> 6) << 4)), -1)
    return (
        (_halves(blocks, 0) * scales.float())[..., None],
        (_halves(blocks, 2) * mins.float())[..., None],
    )


def _quarters(packed: Tensor) -> Tensor:
    """(blocks, 128) bytes -> (blocks, 8, 32): of each 32 bytes the lower halves, then the upper ones."""
    groups = packed.reshape(len(packed), 4, 1, 32)
    return torch.cat((groups & 15, groups >> 4), 2).flatten(1, 2)


def _q4_k(blocks: Tensor) -> Tensor:
    scales, mins = _scales_and_mins(blocks)
    return (scales * _quarters(blocks[:, 16:]).float() - mins).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, mins = _scales_and_mins(blocks)
    bits = torch.arange(8, dtype=torch.uint8)[:, None]
    fifth = ((blocks[:, None, 16:48] >> bits) & 1) << 4
    return (scales * (_quarters(blocks[:, 48:]) | fifth).float() - mins).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = torch.cat((low & 15, low >> 4), 2).reshape(-1, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    high = ((blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3) << 4
    numbers = (low | high).reshape(-1, 16, 16).float() - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float() * _halves(blocks, 208)
    return (scales[..., None] * numbers).flatten(1)


_PLAIN: Final[Mapping[str, torch.dtype]] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# By type: bytes of a block, numbers of a block, and how to lay it out.
QUANTISED: Final[Mapping[str, tuple[int, int, Callable[[Tensor], Tensor]]]] = {
    "Q4_0": (18, 32, _q4_0),
    "Q4_1": (20, 32, _q4_1),
    "Q5_0": (22, 32, _q5_0),
    "Q5_1": (24, 32, _q5_1),
    "Q8_0": (34, 32, _q8_0),
    "Q4_K": (144, _K, _q4_k),
    "Q5_K": (176, _K, _q5_k),
    "Q6_K": (210, _K, _q6_k),
}
