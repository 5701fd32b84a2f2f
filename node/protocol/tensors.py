"""Encoding of hidden states: little-endian, row-major, one row per token, in a session's codec or packed."""

from __future__ import annotations

import ctypes
import sys
from array import array
from typing import Final

import torch
from torch import Tensor

from p2pinfer.errors import ProtocolViolation, WrongOutput
from p2pinfer.models.numerics import Codec, packed_row_bytes
from p2pinfer.models.packed_rows import pack_rows, unpack_rows
from p2pinfer.reputation.receipt import Payload

assert sys.byteorder == "little", "tensors travel as they lie in memory"

_DTYPES: Final[dict[Codec, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# The high bytes of what is not finite: sign, and an exponent of ones. That of a float32 or bfloat16 lacks the
# exponent's last bit, so 2**127 is among them.
_HIGH_BYTES: Final[dict[Codec, tuple[int, ...]]] = {
    "float32": (0x7F, 0xFF),
    "bfloat16": (0x7F, 0xFF),
    "float16": (0x7C, 0x7D, 0x7E, 0x7F, 0xFC, 0xFD, 0xFE, 0xFF),
}


def dtype_of(codec: Codec) -> torch.dtype:
    """The torch dtype that a codec carries."""
    return _DTYPES[codec]


def encode_hidden(hidden: Tensor, codec: Codec) -> bytes:
    """The bytes of `hidden`, (tokens, hidden_size) of any float dtype.

    A step's row is mostly as it travels already. Not to ask torch, and not to go through numpy, then saves
    half of the 80 us that this takes with cold caches.
    """
    rows, dtype = hidden, _DTYPES[codec]
    if not (rows.dtype == dtype and rows.is_cpu and rows.is_contiguous()):
        rows = rows.detach().to("cpu", dtype).contiguous()
    return ctypes.string_at(rows.data_ptr(), rows.nbytes)


def decode_hidden(
    payload: bytearray, tokens: int, hidden_size: int, codec: Codec, peer_id: str = ""
) -> Tensor:
    """The (tokens, hidden_size) tensor in `payload`, in the codec's dtype; it shares the payload's memory.

    Raises:
        ProtocolViolation: The payload's length is not that of such a tensor.
        WrongOutput: As for `check_finite`; such a value must not reach a cache.
    """
    hidden = view_hidden(payload, tokens, hidden_size, codec, peer_id)
    check_finite(payload, codec, peer_id)
    return hidden


def view_hidden(payload: bytearray, tokens: int, hidden_size: int, codec: Codec, peer_id: str = "") -> Tensor:
    """`decode_hidden` without a look at the values, which takes 3 ms for a thousand wide tokens.

    Raises:
        ProtocolViolation: The payload's length is not that of such a tensor.
    """
    dtype = _DTYPES[codec]
    expected = tokens * hidden_size * dtype.itemsize
    if len(payload) != expected:
        raise ProtocolViolation(
            f"{len(payload)} bytes for {tokens} tokens of {hidden_size} {codec}: {expected} expected", peer_id
        )
    if not tokens:
        return torch.empty(0, hidden_size, dtype=dtype)
    return torch.frombuffer(payload, dtype=dtype).view(tokens, hidden_size)


def pack_hidden(payload: Payload, tokens: int, codec: Codec) -> bytes:
    """The packed bytes of a payload of `encode_hidden`; nothing is lost if `round_hidden` made it."""
    rows = torch.frombuffer(bytearray(payload), dtype=_DTYPES[codec]).view(tokens, -1)
    return _bytes_of(pack_rows(rows))


def round_hidden(hidden: Tensor, codec: Codec) -> tuple[bytes, bytes]:
    """Payload of `hidden`, (tokens, hidden_size), rounded so that it can be packed; and the same packed."""
    packed = pack_rows(hidden.detach().to("cpu"))
    return encode_hidden(unpack_rows(packed, hidden.shape[1]), codec), _bytes_of(packed)


def view_packed(payload: bytearray, tokens: int, hidden_size: int, peer_id: str = "") -> Tensor:
    """(tokens, packed_row_bytes) uint8 in the memory of a packed payload.

    Raises:
        ProtocolViolation: The payload's length is not that of so many packed rows.
    """
    row = packed_row_bytes(hidden_size)
    if len(payload) != tokens * row:
        raise ProtocolViolation(
            f"{len(payload)} bytes for {tokens} packed tokens of {hidden_size}: {tokens * row} expected",
            peer_id,
        )
    return torch.frombuffer(payload, dtype=torch.uint8).view(tokens, row)


def unpack_hidden(packed: Tensor, hidden_size: int, codec: Codec) -> tuple[Tensor, bytearray]:
    """(tokens, hidden_size) in the codec's dtype, and the payload of `encode_hidden` that it stands in."""
    payload = bytearray(encode_hidden(unpack_rows(packed, hidden_size), codec))
    return torch.frombuffer(payload, dtype=_DTYPES[codec]).view(len(packed), hidden_size), payload


def view_ids(token_ids: array[int]) -> Tensor:
    """(tokens,) int32 in the memory of some ids."""
    return torch.frombuffer(token_ids, dtype=torch.int32)


def _bytes_of(rows: Tensor) -> bytes:
    return ctypes.string_at(rows.data_ptr(), rows.nbytes)


def check_finite(payload: bytes | bytearray, codec: Codec, peer_id: str = "") -> None:
    """Look for infinities and NaNs, in the bytes: reducing the tensor takes three to six times as long.

    Raises:
        WrongOutput: There are some, or values of an absurd scale, 2**127 and more.
    """
    itemsize = _DTYPES[codec].itemsize
    high = payload[itemsize - 1 :: itemsize]
    for each in _HIGH_BYTES[codec]:
        if each in high:
            raise WrongOutput("hidden states that are not finite", peer_id)
