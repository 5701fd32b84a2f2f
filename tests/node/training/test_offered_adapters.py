"""Adapters that a node offers: they are what was offered in every value, and hostile ones are refused."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.errors import ConfigError, PeerError, ProtocolViolation
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.architecture import Architecture, describe_architecture
from p2pinfer.models.learning.adapter import LowRank
from p2pinfer.models.learning.peft_lora import Lora
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.node.evidence.store import EvidenceStore, serve_evidence
from p2pinfer.node.training import offered_adapters
from p2pinfer.node.training.offered_adapters import (
    AdapterDescription,
    Offer,
    check_description,
    fetch_adapter,
)
from p2pinfer.reputation.receipt import digest_of

from ..memory import MemoryNetwork

QUERIES = "self_attn.q_proj"


@pytest.fixture(scope="module")
def architecture(checkpoint: Checkpoint) -> Architecture:
    return describe_architecture(checkpoint.config)


def lora_of(architecture: Architecture, *blocks: int) -> Lora:
    inputs, outputs = architecture.projections[QUERIES]
    torch.manual_seed(0)
    updates = tuple(LowRank(block, QUERIES, 2, 0.5) for block in blocks)
    return Lora(updates, tuple(torch.randn(*size) for _ in blocks for size in ((2, inputs), (outputs, 2))))


async def fetched(checkpoint: Checkpoint, digest: bytes, contents: dict[bytes, Any]) -> Lora:
    """What a client gets of a node that hands out some contents."""
    async with open_nursery() as nursery:
        network, store = MemoryNetwork(nursery), EvidenceStore(1 << 20, 900)
        store.pin(contents)
        serve_evidence(network.host("node"), store)
        found = await fetch_adapter(
            network.host("client"),
            "node",
            ("/memory/node",),
            digest,
            checkpoint.spec,
            describe_architecture(checkpoint.config),
        )
        nursery.cancel_scope.cancel()
    return found


async def test_what_is_fetched_is_what_was_offered(
    checkpoint: Checkpoint, architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offered_adapters, "PIECE_BYTES", 1000)
    lora = lora_of(architecture, 0, 3, 7)
    offer = Offer("mine", lora, checkpoint.spec)
    assert len(offer.contents) > 10
    found = await fetched(checkpoint, offer.announced.digest, offer.contents)
    assert found.updates == lora.updates
    assert all(torch.equal(*pair) for pair in zip(found.factors, lora.factors, strict=True))


async def test_parts_that_are_missing_or_not_finite_are_no_adapter(
    checkpoint: Checkpoint, architecture: Architecture
) -> None:
    offer = Offer("mine", lora_of(architecture, 0), checkpoint.spec)
    digest = offer.announced.digest
    with pytest.raises(PeerError):
        await fetched(checkpoint, digest, {})
    with pytest.raises(PeerError, match="does not have 1 parts"):
        await fetched(checkpoint, digest, {digest: offer.contents[digest]})
    piece = torch.full((offer.announced.size // 4,), torch.nan).numpy().tobytes()
    described = msgspec.msgpack.decode(offer.contents[digest], type=AdapterDescription)
    lie = msgspec.msgpack.encode(msgspec.structs.replace(described, pieces=(digest_of(piece),)))
    with pytest.raises(ProtocolViolation, match="an adapter that cannot be"):
        await fetched(checkpoint, digest_of(lie), {digest_of(lie): lie, digest_of(piece): piece})
    short = piece[:-4]
    lie = msgspec.msgpack.encode(msgspec.structs.replace(described, pieces=(digest_of(short),)))
    with pytest.raises(ProtocolViolation, match="values of an adapter"):
        await fetched(checkpoint, digest_of(lie), {digest_of(lie): lie, digest_of(short): short})


def described_by(offer: Offer) -> list[Any]:
    found: list[Any] = msgspec.msgpack.decode(offer.contents[offer.announced.digest])
    return found


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        (1, "0" * 32, "an adapter of another model"),
        (2, [[99, QUERIES, 2, 0.5, 0.0]], "an update of block 99"),
        (2, [[0, "mlp.router", 2, 0.5, 0.0]], "is no product that takes an adapter"),
        (2, [[0, "self_attn.prefix", 2, 1.0, 0.0]], "more than one low-rank update"),
        (2, [[0, QUERIES, 1, 0.5, 0.0]] * 2, "more than one low-rank update"),
        (2, [[0, QUERIES, 65535, 0.5, 0.0]], "pieces"),
        (2, [], "an adapter of 0 bytes"),
        (3, [b"d" * 32] * 2, "in 2 pieces"),
        (3, [b"d" * 31], "no description"),
        (0, 2, "no description"),
    ],
)
def test_a_description_of_no_adapter_of_this_model_is_refused_with_a_sentence(
    checkpoint: Checkpoint, architecture: Architecture, field: int, value: object, said: str
) -> None:
    fields = described_by(Offer("mine", lora_of(architecture, 0), checkpoint.spec))
    fields[field] = value
    with pytest.raises(ProtocolViolation, match=said):
        check_description(msgspec.msgpack.encode(fields), checkpoint.spec, architecture)


@given(st.data())
def test_garbage_is_no_description_or_another_valid_one(
    checkpoint: Checkpoint, architecture: Architecture, data: st.DataObject
) -> None:
    offer = Offer("mine", lora_of(architecture, 0), checkpoint.spec)
    described = bytearray(offer.contents[offer.announced.digest])
    for _ in range(data.draw(st.integers(1, 4))):
        described[data.draw(st.integers(0, len(described) - 1))] = data.draw(st.integers(0, 255))
    described = described[: data.draw(st.integers(0, len(described)))]
    with suppress(ProtocolViolation):
        check_description(bytes(described), checkpoint.spec, architecture)


def test_an_adapter_that_is_too_large_to_be_offered_is_refused_with_a_sentence(
    checkpoint: Checkpoint, architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offered_adapters, "MAX_ADAPTER_BYTES", 100)
    with pytest.raises(ConfigError, match=r"mine has \d+ bytes in float32; 100 can be offered"):
        Offer("mine", lora_of(architecture, 0), checkpoint.spec)


def test_a_name_is_cut_to_what_peers_accept(checkpoint: Checkpoint, architecture: Architecture) -> None:
    offer = Offer("\x1b" + "n" * 99, lora_of(architecture, 0), checkpoint.spec)
    assert len(offer.announced.name) == 64
    assert offer.announced.name.isprintable()
    assert replace(offer.announced, name="x").id == offer.announced.id
