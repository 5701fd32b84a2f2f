"""`quantization_config` of published checkpoints: the formats that are read, and the names of all others.

Their definitions: GPTQ as AutoGPTQ and GPTQModel write it, AWQ as AutoAWQ's "gemm", bitsandbytes' 4 and 8
bits, FP8 as DeepSeek-V3 published it, compressed-tensors as llm-compressor writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn, cast

from p2pinfer.errors import CheckpointError

KEY: Final = "published"  # of a complete config: `Published` as text
_LARGEST_BLOCK: Final = 1 << 16
_COMPRESSED: Final = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True, slots=True)
class Published:
    """Format in which a checkpoint's weights are stored.

    Attributes:
        method: "gptq", "awq", "fp8", "bitsandbytes" or "compressed-tensors".
        bits: Of a weight; 0 where the tensors say.
        block: Rows and columns that have one scale, of FP8; None otherwise.
        adds_one: A zero point is stored less one.
        zeros: Tensors of integers have zero points.
    """

    method: str
    bits: int = 0
    block: tuple[int, int] | None = None
    adds_one: bool = False
    zeros: bool = False

    def __str__(self) -> str:
        """Text that is equal where the same tensors mean the same weights."""
        return json.dumps([self.method, self.bits, self.block, self.adds_one, self.zeros])


def published_of(complete: Mapping[str, Any]) -> Published | None:
    """The format in a complete config, see `complete_config`."""
    if KEY not in complete:
        return None
    method, bits, block, adds_one, zeros = json.loads(complete[KEY])
    return Published(method, bits, None if block is None else tuple(block), adds_one, zeros)


def parse_quantization(model: str, config: Mapping[str, Any]) -> Published | None:
    """The format that a config names; None where weights are stored as they are, or in gpt-oss's MXFP4.

    Raises:
        CheckpointError: It names one that is not read; the sentence says which.
    """
    stored: Any = config.get("quantization_config")
    if stored is None:
        return None
    said = cast("dict[str, Any]", stored) if isinstance(stored, dict) else {}
    method = said.get("quant_method")
    if method == "mxfp4" and config.get("model_type") == "gpt_oss":
        return None  # each of whose numbers a bfloat16 holds (compute/fused_experts.py)
    match method:
        case "gptq":
            return _gptq(model, said)
        case "awq":
            return _awq(model, said)
        case "fp8":
            return _fp8(model, said)
        case "bitsandbytes":
            return Published("bitsandbytes")
        case "compressed-tensors":
            return _compressed(model, said)
        case _:
            return _refuse(model, f"the method {_shown(method)}")


def _gptq(model: str, said: Mapping[str, Any]) -> Published:
    bits, kind = said.get("bits"), said.get("checkpoint_format", "gptq")
    if bits not in (2, 4, 8) or kind not in ("gptq", "gptq_v2"):
        _refuse(model, f"GPTQ of {_shown(bits)} bits in the format {_shown(kind)}")
    return Published("gptq", bits, adds_one=kind == "gptq")


def _awq(model: str, said: Mapping[str, Any]) -> Published:
    bits, version = said.get("bits", said.get("w_bit")), said.get("version", "gemm")
    if bits != 4 or str(version).lower() != "gemm":
        _refuse(model, f"AWQ of {_shown(bits)} bits in the version {_shown(version)}")
    return Published("awq", 4)


def _fp8(model: str, said: Mapping[str, Any]) -> Published:
    match said.get("weight_block_size"):
        case [int(rows), int(columns)] if 0 < rows <= _LARGEST_BLOCK and 0 < columns <= _LARGEST_BLOCK:
            return Published("fp8", 8, (rows, columns))
        case block:
            return _refuse(model, f"FP8 with blocks of {_shown(block)}")


def _compressed(model: str, said: Mapping[str, Any]) -> Published:
    kind, groups = said.get("format"), said.get("config_groups")
    if kind not in _COMPRESSED or said.get("sparsity_config") or not isinstance(groups, dict) or not groups:
        _refuse(model, f"compressed-tensors in the format {_shown(kind)}")
    schemes: set[tuple[Any, Any, Any]] = set()
    for group in cast("dict[str, Any]", groups).values():
        of_group = cast("dict[str, Any]", group) if isinstance(group, dict) else {}
        if not isinstance(of_group.get("weights"), dict):
            _refuse(model, "compressed-tensors without a scheme for weights")
        scheme = cast("dict[str, Any]", of_group["weights"])
        schemes.add((scheme.get("num_bits"), scheme.get("type", "int"), scheme.get("symmetric", True)))
    if len(schemes) != 1:
        _refuse(model, "compressed-tensors of several schemes")
    bits, of, symmetric = schemes.pop()
    if (bits, of) not in ((4, "int"), (8, "int"), (8, "float")) or type(symmetric) is not bool:
        _refuse(model, f"compressed-tensors of {_shown(bits)} bits of the type {_shown(of)}")
    return Published("compressed-tensors", bits, zeros=not symmetric)


def _refuse(model: str, what: str) -> NoReturn:
    raise CheckpointError(
        f"the weights of {model} are quantised by {what}, which p2pinfer does not read; "
        "docs/models.md lists what it does, and any checkpoint in 16 bits"
    )


def _shown(value: object) -> str:
    return f"{value!r:.60}"
