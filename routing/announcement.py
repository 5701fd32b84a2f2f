"""Announcement of a peer: the blocks it serves, its speed, addresses and lifetime.

On the wire an announcement is one MessagePack array, `[version, peer_id, model, ...]` in the order of
`_Wire`. Fields a later version appends are skipped, so old peers understand new ones. Everything a peer
wrote is bounded here, once, so that the rest of routing can do arithmetic on it and the command line can
print it. Signatures are the business of `node/swarm/signed_records.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, cast

import msgspec

from p2pinfer.errors import ProtocolViolation
from p2pinfer.models.configs.numbers import MAX_NUMBERS, revision_digest
from p2pinfer.models.numerics import Numerics, parse_numerics
from p2pinfer.models.span import BlockSpan

from .coordinates import COORDINATE_LIMIT_MS, MAX_ERROR, Coordinate
from .nesting import MAX_DEPTH, nests_too_deep

VERSION = 1
MAX_ANNOUNCEMENT_BYTES = 8192  # 16 addresses of 256 characters, a long model name, and room to grow
MAX_BLOCKS = 4096
MAX_ADDRS = 16
MAX_NAME = 256  # characters of a model's name
MAX_PUBLIC_NAME = 32  # characters of the name that an operator gives a peer
MAX_OFFERED = 4  # adapters of one peer
MAX_ADAPTER_NAME = 64  # characters
MAX_ADAPTER_BYTES = 1 << 30
INSTANCE_BYTES = 8
MIN_TTL_S = 5.0
MAX_TTL_S = 300.0

Reachability = Literal["public", "mapped", "private", "unknown"]
Nat = Literal["none", "firewall", "port-preserving", "symmetric", "unknown"]


@dataclass(frozen=True, slots=True)
class OfferedAdapter:
    """Adapter of the model that a peer offers to everybody.

    Attributes:
        digest: Of its description, 32 bytes, by which whoever fetches it knows that it is this one.
        name: What the peer's operator calls it; for people, never trusted.
        size: Bytes of its values.
    """

    digest: bytes
    name: str
    size: int

    @property
    def id(self) -> str:
        """The digest as people write it: half of its digits say as much as a revision does."""
        return self.digest.hex()[:32]


@dataclass(frozen=True, slots=True)
class Announcement:
    """One peer's offer for one model revision.

    Attributes:
        model: What the peer's operator calls the model; for people, never compared.
        revision: The model's content address, 32 lower-case hexadecimal digits; what is compared.
        dtype: What the peer holds weights as and computes in, as text: `bfloat16`, or `int8_bfloat16`.
            It may be one that only other versions know; `numerics` has what is known.
        tokens_per_s: Decoded tokens a second, batch 1, through the whole of `span`.
        free_cache_tokens: Tokens of a new session that the peer's KV cache has room for.
        reachability: `public` and `mapped` peers can be dialled, `private` ones need a relay or a punch.
        addrs: Multiaddrs, with or without `/p2p/<peer_id>`, best first.
        coordinate: Where the peer believes to sit; None while it knows nothing.
        sequence: Grows with every announcement of the peer, across restarts too.
        ttl_s: For how long, from when it was made, the announcement may be believed.
        leaving: The peer says goodbye; nothing else of the announcement counts.
        nat: What is between the peer and the internet: between two `symmetric` ones no hole can be punched.
        weights: The content address of the model's weights; empty where the peer does not say.
        numbers: What the model's config says about the forward pass (`models/configs/numbers.py`); empty
            likewise. Weights and numbers together hash to `revision`.
        num_blocks: Blocks of the whole model, for those who do not have it; 0: the peer does not say.
        instance: Drawn anew whenever the peer starts, 8 bytes; empty: the peer does not say.
        uptime_s: For how long that process has run, when the announcement was made.
        twin: The instance of another process that announces under the same identity, if the peer has heard
            of one. Nobody can name an instance before it is there, so its process knows from this that the
            other one lives.
        ends: The peer holds embedding and head as well, for clients that hold no weights.
        name: What its operator wants it to be called; for people, never compared, and anybody may take any.
        adapters: Of the model, which the peer applies for whoever asks, and hands out.
        packs: It takes and gives packed hidden states (`models/packed_rows.py`).
    """

    peer_id: str
    model: str
    revision: str
    span: BlockSpan
    dtype: str
    tokens_per_s: float
    free_cache_tokens: int
    sequence: int
    reachability: Reachability = "unknown"
    addrs: tuple[str, ...] = ()
    coordinate: Coordinate | None = None
    ttl_s: float = 120.0
    leaving: bool = False
    nat: Nat = "unknown"
    weights: str = ""
    numbers: str = ""
    num_blocks: int = 0
    instance: bytes = b""
    uptime_s: float = 0.0
    twin: bytes = b""
    ends: bool = False
    name: str = ""
    adapters: tuple[OfferedAdapter, ...] = ()
    packs: bool = False

    @property
    def numerics(self) -> Numerics | None:
        """Numerics that `dtype` names; None if this version does not know them."""
        return parse_numerics(self.dtype)


# Patterns end in \Z, because $ lets a trailing line feed through to the terminal, and choices are patterns
# too, because msgspec's error for a Literal repeats what the peer sent. A float with a bound is never NaN.
_PeerId = Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{1,128}\Z")]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]
_Revision = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
_Dtype = Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9_]{1,16}\Z")]
_Addr = Annotated[str, msgspec.Meta(pattern=r"\A/[!-~]{1,255}\Z")]
_Addrs = Annotated[tuple[_Addr, ...], msgspec.Meta(max_length=MAX_ADDRS)]
_Block = Annotated[int, msgspec.Meta(ge=0, le=MAX_BLOCKS)]
_Rate = Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)]
_Tokens = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
_Sequence = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Reachability = Annotated[str, msgspec.Meta(pattern=r"\A(public|mapped|private|unknown)\Z")]
_Nat = Annotated[str, msgspec.Meta(pattern=r"\A(none|firewall|port-preserving|symmetric|unknown)\Z")]
_Weights = Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{32})?\Z")]
_Numbers = Annotated[str, msgspec.Meta(max_length=MAX_NUMBERS, pattern=r"\A[ -~]*\Z")]
_Ttl = Annotated[float, msgspec.Meta(ge=MIN_TTL_S, le=MAX_TTL_S)]
_Axis = Annotated[float, msgspec.Meta(ge=-COORDINATE_LIMIT_MS, le=COORDINATE_LIMIT_MS)]
_Height = Annotated[float, msgspec.Meta(ge=0, le=COORDINATE_LIMIT_MS)]
_Error = Annotated[float, msgspec.Meta(ge=0, le=MAX_ERROR)]
_Instance = Annotated[bytes, msgspec.Meta(max_length=INSTANCE_BYTES)]
_PublicName = Annotated[str, msgspec.Meta(max_length=MAX_PUBLIC_NAME)]
_Uptime = Annotated[float, msgspec.Meta(ge=0, le=1e10)]
_AdapterName = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ADAPTER_NAME)]


class _Offer(msgspec.Struct, array_like=True, frozen=True):
    digest: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    name: _AdapterName
    size: Annotated[int, msgspec.Meta(ge=1, le=MAX_ADAPTER_BYTES)]


_Offers = Annotated[tuple[_Offer, ...], msgspec.Meta(max_length=MAX_OFFERED)]


class _Wire(msgspec.Struct, array_like=True, frozen=True):
    version: Annotated[int, msgspec.Meta(ge=VERSION, le=VERSION)]
    peer_id: _PeerId
    model: _Name
    revision: _Revision
    start: _Block
    stop: _Block
    dtype: _Dtype
    tokens_per_s: _Rate
    free_cache_tokens: _Tokens
    sequence: _Sequence
    reachability: _Reachability
    addrs: _Addrs
    coordinate: tuple[_Axis, _Axis, _Axis, _Height, _Error] | None
    ttl_s: _Ttl
    leaving: bool
    nat: _Nat = "unknown"
    weights: _Weights = ""
    numbers: _Numbers = ""
    num_blocks: _Block = 0
    instance: _Instance = b""
    uptime_s: _Uptime = 0.0
    twin: _Instance = b""
    ends: bool = False
    name: _PublicName = ""
    adapters: _Offers = ()
    packs: bool = False


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Wire)


def encode_announcement(announcement: Announcement) -> bytes:
    """The announcement's bytes, without any signature.

    Raises:
        ValueError: A field is out of the bounds that every peer checks.
    """
    encoded = _encoder.encode(
        _Wire(
            VERSION,
            announcement.peer_id,
            announcement.model,
            announcement.revision,
            announcement.span.start,
            announcement.span.stop,
            announcement.dtype,
            announcement.tokens_per_s,
            announcement.free_cache_tokens,
            announcement.sequence,
            announcement.reachability,
            announcement.addrs,
            announcement.coordinate,
            announcement.ttl_s,
            announcement.leaving,
            announcement.nat,
            announcement.weights,
            announcement.numbers,
            announcement.num_blocks,
            announcement.instance,
            announcement.uptime_s,
            announcement.twin,
            announcement.ends,
            announcement.name,
            tuple(_Offer(each.digest, each.name, each.size) for each in announcement.adapters),
            announcement.packs,
        )
    )
    try:
        decode_announcement(encoded)
    except ProtocolViolation as exc:
        raise ValueError(f"no peer would accept this announcement: {exc}") from exc
    return encoded


def decode_announcement(encoded: bytes) -> Announcement:
    """The announcement in `encoded`, with every field within its bounds.

    Raises:
        ProtocolViolation: The bytes are anything else.
    """
    if len(encoded) > MAX_ANNOUNCEMENT_BYTES:
        raise ProtocolViolation(f"announcement of {len(encoded)} bytes; {MAX_ANNOUNCEMENT_BYTES} are allowed")
    if nests_too_deep(encoded):
        raise ProtocolViolation(f"announcement with more than {MAX_DEPTH} arrays inside each other")
    try:
        wire = _decoder.decode(encoded)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ProtocolViolation(f"malformed announcement: {exc}") from exc
    if wire.start >= wire.stop:
        raise ProtocolViolation(f"announcement of no blocks: {wire.start}:{wire.stop}")
    if wire.num_blocks and wire.stop > wire.num_blocks:
        raise ProtocolViolation(
            f"announcement of blocks {wire.start}:{wire.stop} of a model that has {wire.num_blocks}"
        )
    if not wire.model.isprintable():
        raise ProtocolViolation("announcement of a model whose name cannot be printed")
    if not wire.name.isprintable():
        raise ProtocolViolation("announcement of a peer whose name cannot be printed")
    if not all(each.name.isprintable() for each in wire.adapters):
        raise ProtocolViolation("announcement of an adapter whose name cannot be printed")
    if len({each.digest for each in wire.adapters}) < len(wire.adapters):
        raise ProtocolViolation("announcement of an adapter twice")
    if wire.weights and revision_digest(wire.weights, wire.numbers) != wire.revision:
        raise ProtocolViolation("announcement of weights and numbers that are not those of its revision")
    return Announcement(
        peer_id=wire.peer_id,
        model=wire.model,
        revision=wire.revision,
        span=BlockSpan(wire.start, wire.stop),
        dtype=wire.dtype,
        tokens_per_s=wire.tokens_per_s,
        free_cache_tokens=wire.free_cache_tokens,
        sequence=wire.sequence,
        reachability=cast(Reachability, wire.reachability),
        addrs=wire.addrs,
        coordinate=None if wire.coordinate is None else Coordinate(*wire.coordinate),
        ttl_s=wire.ttl_s,
        leaving=wire.leaving,
        nat=cast(Nat, wire.nat),
        weights=wire.weights,
        numbers=wire.numbers,
        num_blocks=wire.num_blocks,
        instance=wire.instance,
        uptime_s=wire.uptime_s,
        twin=wire.twin,
        ends=wire.ends,
        name=wire.name,
        adapters=tuple(OfferedAdapter(each.digest, each.name, each.size) for each in wire.adapters),
        packs=wire.packs,
    )
