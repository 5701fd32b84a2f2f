"""Adapters that a node offers: what it pins for whoever fetches one, and how one is fetched.

They travel as evidence does, by digest, over `/p2pinfer/evidence/1.0.0`. The digest that is announced is that
of a description: the model, the layout, and the digests of the pieces of the values. So every byte is checked
before it is used, nobody is sent more than was asked for, and whoever knows the digest may have it from any
peer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final

import msgspec
import torch
import trio
from torch import Tensor

from p2pinfer.errors import ConfigError, PeerVanished, ProtocolViolation, WrongOutput
from p2pinfer.folders import expand
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.compute.architecture import Architecture
from p2pinfer.models.learning.adapter import Adapter
from p2pinfer.models.learning.brought import BroughtAdapter
from p2pinfer.models.learning.peft_lora import Lora, read_lora
from p2pinfer.models.learning.span_passes import SpanPasses
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.evidence.store import MAX_CONTENT_BYTES, EvidenceStore, due_s, fetch_evidence
from p2pinfer.node.host.network import Network
from p2pinfer.node.protocol.messages import printable
from p2pinfer.node.protocol.span_adapter import part_of
from p2pinfer.node.protocol.train_messages import Digest, Updates
from p2pinfer.node.protocol.train_tensors import decode_vector, layout_of
from p2pinfer.node.serve.forward import ServedSpan
from p2pinfer.reputation.receipt import Payload, digest_of
from p2pinfer.routing.announcement import MAX_ADAPTER_BYTES, MAX_ADAPTER_NAME, MAX_OFFERED, OfferedAdapter

VERSION: Final = 1
PIECE_BYTES: Final = 4 << 20  # of the values; the last piece may be smaller
_AT_ONCE: Final = MAX_CONTENT_BYTES // PIECE_BYTES  # pieces in one answer
_MAX_PIECES: Final = MAX_ADAPTER_BYTES // PIECE_BYTES
_MAX_DESCRIPTION_BYTES: Final = 1 << 20


class AdapterDescription(msgspec.Struct, frozen=True, array_like=True):
    """Description of an offered adapter, whose digest is the adapter's."""

    version: Annotated[int, msgspec.Meta(ge=VERSION, le=VERSION)]
    revision: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
    updates: Updates
    pieces: Annotated[tuple[Digest, ...], msgspec.Meta(min_length=1, max_length=_MAX_PIECES)]


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(AdapterDescription)


class Offer:
    """One adapter that this node offers.

    Attributes:
        announced: As the swarm hears of it.
        contents: What is handed out, by digest.
    """

    def __init__(self, name: str, lora: Lora, spec: ModelSpec) -> None:
        """An offer of low-rank updates of a whole model.

        Raises:
            ConfigError: It is too large.
        """
        self._lora = lora
        part = part_of(BlockSpan(0, spec.num_blocks), lora.updates, lora.factors)
        assert part is not None
        if len(part.payload) > MAX_ADAPTER_BYTES:
            raise ConfigError(
                f"{name} has {len(part.payload)} bytes in float32; {MAX_ADAPTER_BYTES} can be offered"
            )
        whole = memoryview(part.payload)
        pieces: list[Payload] = [whole[at : at + PIECE_BYTES] for at in range(0, len(whole), PIECE_BYTES)]
        digests = tuple(digest_of(each) for each in pieces)
        described = _encoder.encode(AdapterDescription(VERSION, spec.revision, part.updates, digests))
        digest = digest_of(described)
        self.announced = OfferedAdapter(digest, printable(name)[:MAX_ADAPTER_NAME] or "?", len(whole))
        self.contents: dict[bytes, Payload] = dict(zip(digests, pieces, strict=True))
        self.contents[digest] = described

    def put_on_shelf(self, served: ServedSpan) -> None:
        """Have it applied for every client whose session asks for it, in all blocks that are served here."""
        span, passes = served.runner.span, SpanPasses(*served.runner.parts)
        part = part_of(span, self._lora.updates, self._lora.factors)
        if part is None:
            return
        architecture, device = passes.blocks.architecture, passes.blocks.device
        values = torch.frombuffer(bytearray(part.payload), dtype=torch.float32).to(device)
        adapter = Adapter(layout_of(part.updates, 0), values, architecture, span)
        brought = BroughtAdapter(adapter, architecture, span, passes.device_of)
        served.adapters.offer(part.digest, brought)


def offer_adapters(
    folders: Sequence[str], served: ServedSpan, evidence: EvidenceStore
) -> tuple[OfferedAdapter, ...]:
    """Offer the adapters in some folders, in peft's files, from now on; gives what is to be announced.

    Loads and hashes them, so it is for a thread, before anybody is served.

    Raises:
        ConfigError: One is for another model, of another kind, pickled, damaged or too large, or they are
            too many.
    """
    if len(folders) > MAX_OFFERED:
        raise ConfigError(f"{len(folders)} adapters; a node offers {MAX_OFFERED} at most")
    spec, architecture = served.spec, served.runner.parts[0].architecture
    offers = [
        Offer(folder.resolve().name, read_lora(folder, spec, architecture), spec)
        for folder in map(expand, folders)
    ]
    if len({each.announced.digest for each in offers}) < len(offers):
        raise ConfigError("two of the folders hold the same adapter; name each once")
    for each in offers:
        each.put_on_shelf(served)
    evidence.pin({digest: content for each in offers for digest, content in each.contents.items()})
    return tuple(each.announced for each in offers)


async def fetch_adapter(
    host: Network,
    peer_id: str,
    addrs: Sequence[str],
    digest: bytes,
    spec: ModelSpec,
    architecture: Architecture,
) -> Lora:
    """Low-rank updates that a peer offers, checked in every byte.

    Raises:
        PeerError: It cannot be reached, does not have it, or what it has is no adapter of this model.
    """

    async def fetch(digests: Sequence[bytes], most: int) -> dict[bytes, bytes]:
        found = await fetch_evidence(
            host, peer_id, digests, addrs, max_bytes=most, within_s=due_s(most), hearsay=True
        )
        if missing := {*digests} - found.keys():
            raise PeerVanished(f"peer {peer_id} does not have {len(missing)} parts of the adapter", peer_id)
        return found

    described = (await fetch([digest], _MAX_DESCRIPTION_BYTES))[digest]
    description, size = check_description(described, spec, architecture, peer_id)
    values = bytearray()
    for at in range(0, len(description.pieces), _AT_ONCE):
        digests = description.pieces[at : at + _AT_ONCE]
        found = await fetch([*dict.fromkeys(digests)], MAX_CONTENT_BYTES)
        for each in digests:
            values += found[each]
        if len(values) > size:
            raise ProtocolViolation("more values than the adapter's layout has", peer_id)
    return await trio.to_thread.run_sync(_lora_of, description, values, architecture, spec, peer_id)


def check_description(
    described: bytes, spec: ModelSpec, architecture: Architecture, peer_id: str = ""
) -> tuple[AdapterDescription, int]:
    """The description of an adapter of this model, and the bytes that its values have.

    Raises:
        ProtocolViolation: It is none, of another model, or of another size than its pieces.
    """
    try:
        description = _decoder.decode(described)
        layout = layout_of(description.updates, 0)
        size = 4 * layout.size(architecture, BlockSpan(0, spec.num_blocks))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as exc:
        raise ProtocolViolation(f"no description of an adapter of this model: {exc}", peer_id) from exc
    if description.revision != spec.revision:
        raise ProtocolViolation(
            f"an adapter of another model ({description.revision:.8}, this one is {spec.revision:.8})",
            peer_id,
        )
    names = {(each.block, each.projection) for each in description.updates}
    if not layout.is_low_rank or len(names) < len(description.updates):
        raise ProtocolViolation("an adapter with more than one low-rank update of a product", peer_id)
    if not 0 < size <= MAX_ADAPTER_BYTES or len(description.pieces) != -(-size // PIECE_BYTES):
        raise ProtocolViolation(f"an adapter of {size} bytes in {len(description.pieces)} pieces", peer_id)
    return description, size


def _lora_of(
    description: AdapterDescription,
    values: bytearray,
    architecture: Architecture,
    spec: ModelSpec,
    peer_id: str,
) -> Lora:
    span = BlockSpan(0, spec.num_blocks)
    layout = layout_of(description.updates, 0)
    try:
        vector = decode_vector(values, layout.size(architecture, span), peer_id)
    except WrongOutput as exc:
        raise ProtocolViolation(f"an adapter that cannot be: {exc}", peer_id) from exc
    adapter = Adapter(layout, vector, architecture, span)
    factors: list[Tensor] = []
    of_blocks = {block: adapter.of_block(block) for block in {each.block for each in layout.updates}}
    found = {
        (each.block, each.projection): pair for part in of_blocks.values() for each, pair in part.updates
    }
    for each in layout.updates:
        factors += found[each.block, each.projection]
    return Lora(layout.updates, tuple(factors))
