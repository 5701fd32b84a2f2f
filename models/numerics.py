"""Numerics of a span: the format of its weights, of what it computes and, from that, of what travels.

The text form goes where announcements, `opened` and receipts have said `dtype` all along: `bfloat16` where
both are the same, else `<weights>_<compute>`, as in `int8_bfloat16`. Every pair has one spelling of at most
16 characters, and whatever else a peer writes there is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, cast, get_args

Codec: TypeAlias = Literal["float32", "bfloat16", "float16"]
CODECS: Final[tuple[Codec, ...]] = get_args(Codec)
LOSSLESS: Final[Codec] = "float32"  # it holds every value of the others
# What a receipt says of an output that was rounded to be packed (`packed_rows`).
PackedCodec: TypeAlias = Literal["float32_int8", "bfloat16_int8", "float16_int8"]
_PACKED: Final[Mapping[Codec, PackedCodec]] = {
    "float32": "float32_int8",
    "bfloat16": "bfloat16_int8",
    "float16": "float16_int8",
}
_UNPACKED: Final[Mapping[str, Codec]] = {packed: codec for codec, packed in _PACKED.items()}
PACKED_BLOCK: Final = 32  # values of a packed row that share an exponent

_CODEC_BYTES: Final[Mapping[Codec, int]] = {"float32": 4, "bfloat16": 2, "float16": 2}
# Formats that a checkpoint of more bits is quantised to; see `p2pinfer.models.quantised.formats`.
QUANTISED: Final = ("int8", "int4", "nf4")
# With their scales. A CPU's kernel wants two numbers for each group of int4 where a card's has one.
_WEIGHT_BYTES: Final[Mapping[str, float]] = {
    **{"float32": 4, "bfloat16": 2, "float16": 2},
    **{"int8": 1, "int4": 0.625, "nf4": 0.5625},
}


@dataclass(frozen=True, slots=True)
class Numerics:
    """Formats in which a peer holds and computes a span.

    Attributes:
        weights: What weights are stored as in memory: a codec's name, or a quantised format's.
        compute: What is computed in, and what the KV cache and the outputs therefore are.

    Raises:
        ValueError: There is no such format.
    """

    weights: str
    compute: Codec

    def __post_init__(self) -> None:
        if self.weights not in _WEIGHT_BYTES or self.compute not in _CODEC_BYTES:
            raise ValueError(f"no numerics are called {self.weights}_{self.compute}")

    def __str__(self) -> str:
        return self.compute if self.weights == self.compute else f"{self.weights}_{self.compute}"

    @property
    def codec(self) -> Codec:
        """Codec in which outputs travel without loss: what is computed in."""
        return self.compute

    @property
    def bytes_per_weight(self) -> float:
        """Bytes of memory that one weight takes."""
        return _WEIGHT_BYTES[self.weights]

    @property
    def is_quantised(self) -> bool:
        """True if weights are held in fewer bits than are computed with."""
        return self.weights in QUANTISED

    @property
    def exact(self) -> Numerics:
        """The same weights, computed with in float32; float32 itself where they are not quantised."""
        return Numerics(self.weights, LOSSLESS) if self.is_quantised else FLOAT32

    @property
    def bytes_per_value(self) -> int:
        """Bytes of one value of a hidden state, a key or a cached value."""
        return _CODEC_BYTES[self.compute]

    def weight_bytes(self, parameters: int) -> int:
        """Bytes of memory that so many weights take."""
        return math.ceil(parameters * self.bytes_per_weight)

    def row_bytes(self, hidden_size: int) -> int:
        """Bytes of one token's hidden state on the wire, between hops of these numerics."""
        return row_bytes(hidden_size, self.codec)


_BY_TEXT: Final[Mapping[str, Numerics]] = {
    str(each): each for each in (Numerics(weights, codec) for weights in _WEIGHT_BYTES for codec in CODECS)
}

FLOAT32: Final = Numerics("float32", "float32")
BFLOAT16: Final = Numerics("bfloat16", "bfloat16")
FLOAT16: Final = Numerics("float16", "float16")

# What an audit rounds in to find out how far from float32 an honest peer may lie. The limits of verdicts are
# in units of bfloat16's rounding and were calibrated with peers of these three (docs/audits.md); a unit of
# float32's own would be the noise of one processor. Quantised weights are a model of their own: an audit
# quantises the same checkpoint in the same way, so that a peer which computes with other bits than it names
# is found. Numerics without a reference cannot be checked here, so a peer that could choose them freely could
# not be caught: no route goes over it.
_REFERENCES: Final[Mapping[Numerics, Numerics]] = {
    FLOAT32: BFLOAT16,
    BFLOAT16: BFLOAT16,
    FLOAT16: BFLOAT16,
    **{Numerics(weights, codec): Numerics(weights, "bfloat16") for weights in QUANTISED for codec in CODECS},
}


def parse_numerics(text: str) -> Numerics | None:
    """Numerics that a peer names; None where this version does not know them."""
    return _BY_TEXT.get(text)


def plain(dtype: str) -> Numerics:
    """Numerics of weights that are stored as what is computed in.

    Raises:
        ValueError: `dtype` is no codec's name.
    """
    if dtype not in CODECS:
        raise ValueError(f"nothing is computed in {dtype:.40}")
    return _BY_TEXT[dtype]


def reference_for(numerics: Numerics | None) -> Numerics | None:
    """Numerics in which an audit of such a peer rounds; None where it cannot be audited here."""
    return None if numerics is None else _REFERENCES.get(numerics)


def are_comparable(one: Numerics | None, other: Numerics | None) -> bool:
    """True if one reference is for both, so that the outputs of one say something of the other."""
    reference = reference_for(one)
    return reference is not None and reference == reference_for(other)


def common_codec(numerics: Iterable[Numerics]) -> Codec:
    """Codec of a session over such hops: their own if they share one, else float32."""
    codecs: set[Codec] = {each.codec for each in numerics}
    return codecs.pop() if len(codecs) == 1 else LOSSLESS


def row_bytes(hidden_size: int, codec: Codec) -> int:
    """Bytes of one token's hidden state on the wire, unless it is packed."""
    return hidden_size * _CODEC_BYTES[codec]


def packed_row_bytes(hidden_size: int) -> int:
    """Bytes of one token's hidden state on the wire where it is packed, see `packed_rows`."""
    return hidden_size + -(-hidden_size // PACKED_BLOCK)


def packed_codec(codec: Codec) -> PackedCodec:
    """Name of a codec whose values were rounded to be packed."""
    return _PACKED[codec]


def is_packed(codec: Codec | PackedCodec) -> bool:
    """True if values were rounded to be packed."""
    return codec in _UNPACKED


def unpacked_codec(codec: Codec | PackedCodec) -> Codec:
    """Codec in which such values stand in memory, in evidence and in digests."""
    return _UNPACKED.get(codec) or cast(Codec, codec)
