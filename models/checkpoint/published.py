"""Weights of published quantised checkpoints, laid out in float32 as each format's own definition says.

A weight is stored as several tensors; here they are one again, under the name that it has in a checkpoint of
16 bits. So a span reads what it needs, tensor by tensor, and nothing behind this knows of the format.
A file may say anything: what does not fit together is refused before it is computed with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from p2pinfer.errors import CheckpointError
from p2pinfer.models.configs.quantization import Published

if TYPE_CHECKING:
    from torch import Tensor

Parts: TypeAlias = Mapping[str, str]  # names of stored tensors, by what follows the product's name
Tensors: TypeAlias = Mapping[str, "Tensor"]

_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)  # column of the n-th 4 bits of a word
# Scales of activations and caches, which are not quantised here; a mark of a layout.
_UNUSED: Final = frozenset({"input_scale", "output_scale", "k_scale", "v_scale", "weight_format"})
_STATE: Final = "weight.quant_state.bitsandbytes__"

# By method: what follows a product's name, in the order in which it is looked for, and what marks one.
_SUFFIXES: Final[Mapping[str, tuple[tuple[str, ...], frozenset[str]]]] = {
    "gptq": (("qweight", "qzeros", "scales", "g_idx"), frozenset({"qweight"})),
    "awq": (("qweight", "qzeros", "scales"), frozenset({"qweight"})),
    "fp8": (("weight_scale_inv", "weight"), frozenset({"weight_scale_inv"})),
    "bitsandbytes": (
        (
            *("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
            *(f"{_STATE}nf4", f"{_STATE}fp4", "SCB", "weight"),
        ),
        frozenset({"weight.absmax", "SCB"}),
    ),
    "compressed-tensors": (
        (
            *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
            "weight",
        ),
        frozenset({"weight_scale"}),
    ),
}


def weights_of(names: Iterable[str], published: Published) -> dict[str, Parts]:
    """Tensors that a checkpoint has once it is laid out, and the parts of each that are stored.

    What is stored as it is has the one part "".
    """
    suffixes, marks = _SUFFIXES[published.method]
    found: dict[str, dict[str, str]] = {}
    whole: dict[str, Parts] = {}
    for name in names:
        suffix = next((each for each in suffixes if name.endswith(f".{each}")), None)
        if suffix is not None:
            found.setdefault(name.removesuffix(f".{suffix}"), {})[suffix] = name
        elif name.rpartition(".")[2] not in _UNUSED:
            whole[name] = {"": name}
    for base, parts in found.items():
        if marks & parts.keys():
            whole[f"{base}.weight"] = parts
        else:
            whole |= {name: {"": name} for name in parts.values()}
    return whole


def lay_out(name: str, tensors: Tensors, published: Published) -> Tensor:
    """The weight, (outputs, inputs) float32, of the tensors that it is stored as.

    Raises:
        CheckpointError: They do not fit together.
    """
    try:
        return _LAYOUTS[published.method](tensors, published)
    except (KeyError, IndexError, ValueError, RuntimeError, TypeError, AttributeError) as exc:
        why = (str(exc) or type(exc).__name__).splitlines()[0]
        raise CheckpointError(
            f"the parts of {name} do not make a weight of {published.method} ({why}); fetch it again"
        ) from exc


def _gptq(tensors: Tensors, published: Published) -> Tensor:
    """(in, out) packed along the inputs, zero points along the outputs; lowest bits first."""
    import torch

    scales = tensors["scales"].float()  # (groups, out)
    codes = _unpacked(tensors["qweight"].t().contiguous(), published.bits).t()  # (in, out)
    zeros = _unpacked(tensors["qzeros"], published.bits) + int(published.adds_one)
    inputs = len(codes)
    if "g_idx" in tensors:
        group = tensors["g_idx"].long()
    else:
        group = torch.arange(inputs) // -(-inputs // len(scales))
    return ((codes - zeros[group]) * scales[group]).t().contiguous()


def _awq(tensors: Tensors, published: Published) -> Tensor:
    """(in, out) packed along the outputs, in the order of the kernel that AWQ was made for."""
    import torch

    def columns(packed: Tensor) -> Tensor:
        codes = _unpacked(packed, published.bits).view(len(packed), -1, 8)
        return codes[..., torch.tensor(_AWQ_ORDER).argsort()].flatten(1)

    scales = tensors["scales"].float()
    codes, zeros = columns(tensors["qweight"]), columns(tensors["qzeros"])
    size = len(codes) // len(scales)
    return ((codes - _repeated(zeros, size, 1)) * _repeated(scales, size, 1)).t().contiguous()


def _fp8(tensors: Tensors, published: Published) -> Tensor:
    """Numbers of 8 bits, times a scale for each block; the last blocks of a side may be smaller."""
    weight, scales = tensors["weight"].float(), _real(tensors["weight_scale_inv"])
    assert published.block is not None
    rows, columns = weight.shape
    tall, wide = published.block
    spread = _repeated(scales, tall, wide)
    expected = (-(-rows // tall), -(-columns // wide))
    if scales.shape != expected:
        raise ValueError(f"{tuple(scales.shape)} scales where {expected} are due")
    return weight.mul_(spread[:rows, :columns])


def _bitsandbytes(tensors: Tensors, _: Published) -> Tensor:
    """4 bits, the upper half of a byte first, times the largest magnitude of a block; or a byte by rows."""
    import torch

    if "SCB" in tensors:
        return tensors["weight"].float() * (tensors["SCB"].float() / 127)[:, None]
    kind = next(each for each in ("nf4", "fp4") if _STATE + each in tensors)
    state: Any = json.loads(bytes(tensors[_STATE + kind].numpy()))
    largest = tensors["weight.absmax"]
    if largest.dtype == torch.uint8:  # quantised themselves
        codes = tensors["weight.nested_quant_map"].float()[largest.int()]
        spread = tensors["weight.nested_absmax"].float().repeat_interleave(int(state["nested_blocksize"]))
        largest = codes * spread[: len(codes)] + float(state["nested_offset"])
    packed = tensors["weight"].flatten()
    numbers = tensors["weight.quant_map"].float()[torch.stack((packed >> 4, packed & 15), -1).flatten().int()]
    rows, columns = (int(side) for side in state["shape"])
    size = int(state["blocksize"])
    blocks = -(-rows * columns // size)
    if len(largest) != blocks:
        raise ValueError(f"{len(largest)} scales where {blocks} are due")
    spread = largest.float().repeat_interleave(size)[: rows * columns]
    return (numbers[: rows * columns] * spread).view(rows, columns)


def _compressed(tensors: Tensors, published: Published) -> Tensor:
    """Integers or FP8, times a scale for each row, group of a row, or block, less a zero point."""
    import torch

    scales = _real(tensors["weight_scale"])
    packed = tensors.get("weight_packed")
    if packed is None:
        codes = tensors["weight"].float()
    else:
        rows, columns = (int(side) for side in tensors["weight_shape"].unbind())
        codes = (_unpacked(packed, published.bits) - 2 ** (published.bits - 1))[:rows, :columns].float()
    rows, columns = codes.shape
    zeros = tensors.get("weight_zero_point")
    if zeros is not None and packed is not None and zeros.dtype == torch.int32:
        zeros = _unpacked(zeros.t().contiguous(), published.bits).t()[:rows] - 2 ** (published.bits - 1)
    if scales.dim() < 2:
        scales = scales.reshape(-1, 1)
    if "weight_g_idx" in tensors and int(tensors["weight_g_idx"].min()) >= 0:
        group = tensors["weight_g_idx"].long()
        spread = [None if each is None else each.float()[:, group] for each in (scales, zeros)]
    else:
        spread = [None if each is None else _over(each.float(), rows, columns) for each in (scales, zeros)]
    scale, zero = spread
    assert scale is not None
    return (codes if zero is None else codes - zero) * scale


_LAYOUTS: Final[Mapping[str, Callable[[Tensors, Published], Tensor]]] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed,
}


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """(n, words) int32 as (n, words * 32 / bits) codes, those of the lowest bits first."""
    import torch

    if words.dtype != torch.int32 or words.dim() != 2:
        raise ValueError(f"{words.dtype} of {words.dim()} dimensions where packed words are due")
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (words[..., None] >> shifts).bitwise_and_(2**bits - 1).flatten(1)


def _real(scales: Tensor) -> Tensor:
    """Scales in float32; bytes are exponents, as in microscaling formats."""
    import torch

    if scales.dtype == torch.uint8:
        return torch.ldexp(torch.ones(scales.shape), scales.int() - 127)
    return scales.float()


def _repeated(each: Tensor, rows: int, columns: int) -> Tensor:
    return each.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def _over(each: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, columns), each number over its share of them: all, a row, or a part of a row or of several."""
    each = each.reshape(-1, 1) if each.dim() < 2 else each
    for side, count in ((rows, each.shape[0]), (columns, each.shape[1])):
        if side % count:
            raise ValueError(f"{tuple(each.shape)} scales of a weight of {rows} x {columns}")
    return _repeated(each, rows // each.shape[0], columns // each.shape[1])
