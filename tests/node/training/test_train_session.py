"""A node's side of training, frame by frame, against clients that break every rule."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.errors import PeerError, PeerVanished, ProtocolViolation
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.learning.adapter import AdapterLayout, LowRank
from p2pinfer.models.learning.rows import Rows
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.protocol.messages import MALFORMED, encode_message
from p2pinfer.node.protocol.train_messages import (
    TRAIN_PROTOCOL,
    Adapt,
    Adapted,
    Backward,
    Backwarded,
    Begin,
    Begun,
    Declined,
    Forward,
    Forwarded,
    TrainMessage,
    Update,
    decode_train_message,
)
from p2pinfer.node.protocol.train_stream import TrainStream
from p2pinfer.node.protocol.train_tensors import (
    decode_inputs,
    decode_vector,
    digest_of_adapter,
    encode_inputs,
    encode_vector,
    layout_of,
    updates_of,
)

from ..memory_swarm import MemorySwarm, open_memory_swarm

SESSION = b"s" * 16
HIDDEN = 320
UPDATES = (Update(3, "self_attn.q_proj", 2, 0.5),)
VALUES = torch.ones(2 * (HIDDEN + HIDDEN)) * 0.01


@asynccontextmanager
async def open_node(checkpoint: Checkpoint, **limits: Any) -> AsyncGenerator[MemorySwarm]:
    """A node that serves blocks 3:5."""
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a", 3, 5, config=replace(ServeConfig(), **limits))
        yield swarm


async def connect(swarm: MemorySwarm, name: str = "client") -> TrainStream:
    host = swarm.network.hosts.get(name) or swarm.network.host(name)
    stream = await host.open_stream("a", TRAIN_PROTOCOL)
    return TrainStream(stream, max_payload_bytes=1 << 24, peer_id="a")


async def begin(swarm: MemorySwarm, name: str = "client", **changes: Any) -> tuple[TrainStream, TrainMessage]:
    frames = await connect(swarm, name)
    opening = Begin(SESSION, swarm.spec.revision, 3, 5, "float32")
    await frames.send(msgspec.structs.replace(opening, **changes))
    return frames, (await frames.receive())[0]


def microbatch(*lengths: int) -> bytes:
    order = torch.cat([torch.arange(length) for length in lengths])
    return encode_inputs(Rows(lengths, order, order), torch.randn(len(order), HIDDEN), "float32")


def adapt(number: int = 1, values: torch.Tensor = VALUES, **changes: Any) -> tuple[Adapt, bytes]:
    payload = encode_vector(values)
    message = Adapt(number, digest_of_adapter(UPDATES, 0, payload), UPDATES)
    return msgspec.structs.replace(message, **changes), payload


async def ask(frames: TrainStream, message: TrainMessage, *payload: bytes) -> TrainMessage:
    await frames.send(message, *payload)
    return (await frames.receive())[0]


async def test_a_client_is_told_the_limits_and_its_passes_are_answered(checkpoint: Checkpoint) -> None:
    async with open_node(checkpoint, train_tokens=77, max_adapter_rank=9) as swarm:
        frames, begun = await begin(swarm)
        assert begun == Begun("float32", 77, 4, ServeConfig().client_adapter_bytes, 9)
        assert isinstance(await ask(frames, *adapt()), Adapted)
        inputs = microbatch(3, 2)
        digest = adapt()[0].digest
        assert isinstance(await ask(frames, Forward(2, 3, 5, (3, 2), digest), inputs), Forwarded)
        back = Backward(3, 2, 3, 5, (3, 2), digest)
        answer = await ask(frames, back, bytes(5 * HIDDEN * 4))
        assert isinstance(answer, Backwarded)
        assert swarm.served["a"].training.sessions == 1
        await frames.finish()


@pytest.mark.parametrize(
    "changes, code",
    [
        ({"revision": "f" * 32}, "wrong_model"),
        ({"start": 2}, "wrong_span"),
        ({"stop": 6}, "wrong_span"),
        ({"start": 5, "stop": 3}, "wrong_span"),
    ],
)
async def test_who_asks_for_something_else_is_declined(
    checkpoint: Checkpoint, changes: dict[str, Any], code: str
) -> None:
    async with open_node(checkpoint) as swarm:
        _, answer = await begin(swarm, **changes)
        assert isinstance(answer, Declined)
        assert (answer.code, answer.number) == (code, None)


async def test_places_are_bounded_and_free_again(checkpoint: Checkpoint) -> None:
    limits = {"max_train_sessions": 3, "max_train_sessions_per_client": 2}
    async with open_node(checkpoint, **limits) as swarm:
        first, _ = await begin(swarm, "one")
        await begin(swarm, "one")
        _, answer = await begin(swarm, "one")
        assert isinstance(answer, Declined) and answer.code == "busy"
        await begin(swarm, "two")
        _, answer = await begin(swarm, "three")
        assert isinstance(answer, Declined) and answer.code == "busy"
        await first.finish()
        while swarm.served["a"].training.sessions > 2:
            await trio.lowlevel.checkpoint()
        _, answer = await begin(swarm, "three")
        assert isinstance(answer, Begun)


@pytest.mark.parametrize(
    "message, payload, code",
    [
        (Forward(7, 3, 5, (3,), b"d" * 32), microbatch(3), "adapter_gone"),
        (Forward(7, 2, 5, (3,)), microbatch(3), "wrong_span"),
        (Forward(7, 5, 3, (3,)), microbatch(3), "wrong_span"),
        (Forward(7, 3, 5, (40, 30)), microbatch(40, 30), "too_large"),
        (Forward(7, 3, 5, (3,)), microbatch(4), "wrong_input"),
        (Forward(7, 3, 5, (3,)), b"", "wrong_input"),
        (Forward(7, 3, 5, (2,)), b"\xff" * (2 * 8 + 2 * HIDDEN * 4), "wrong_input"),
        (Backward(7, 1, 3, 5, (3,)), bytes(3 * HIDDEN * 4), "inputs_gone"),
        (Backward(7, 1, 3, 5, (3,), sends_inputs=True), microbatch(3), "wrong_input"),
        (adapt(7, digest=b"d" * 32)[0], encode_vector(VALUES), "wrong_adapter"),
        (adapt(7)[0], encode_vector(VALUES[:-1]), "wrong_adapter"),
        (adapt(7, VALUES * float("inf"))[0], encode_vector(VALUES * float("inf")), "wrong_adapter"),
        (adapt(7, updates=(Update(5, "self_attn.q_proj", 2, 0.5),))[0], b"", "wrong_adapter"),
        (adapt(7, updates=(Update(3, "lm_head", 2, 0.5),))[0], b"", "wrong_adapter"),
        (adapt(7, updates=(Update(3, "self_attn.q_proj", 60000, 0.5),))[0], b"", "too_large"),
        (adapt(7, prompt_tokens=1000000)[0], b"", "wrong_adapter"),
        (adapt(7)[0], bytes(120_000), "too_large"),
    ],
)
async def test_a_request_that_cannot_be_done_is_declined_and_the_session_goes_on(
    checkpoint: Checkpoint, message: TrainMessage, payload: bytes, code: str
) -> None:
    async with open_node(checkpoint, train_tokens=60, client_adapter_bytes=100_000) as swarm:
        frames, _ = await begin(swarm)
        answer = await ask(frames, message, payload)
        assert isinstance(answer, Declined)
        assert (answer.code, answer.number) == (code, 7)
        assert isinstance(await ask(frames, Forward(8, 3, 5, (3,)), microbatch(3)), Forwarded)
        assert swarm.served["a"].training.kept_bytes >= 2 * 3 * HIDDEN * 4


@pytest.mark.parametrize(
    "message, payload",
    [
        (Begun("float32", 1, 1, 1, 1), b""),
        (Begin(SESSION, "r", 3, 5, "float32"), b""),
        (Adapted(1), b""),
        (Forwarded(1, b""), b"payload"),
        (Declined("busy", "no", 1), b""),
    ],
)
async def test_a_message_that_no_client_sends_ends_the_session(
    checkpoint: Checkpoint, message: TrainMessage, payload: bytes
) -> None:
    async with open_node(checkpoint) as swarm:
        frames, _ = await begin(swarm)
        with pytest.raises(PeerVanished):
            await ask(frames, message, payload)
        while swarm.served["a"].training.sessions:
            await trio.lowlevel.checkpoint()


async def test_more_requests_than_were_granted_end_the_session(checkpoint: Checkpoint) -> None:
    async with open_node(checkpoint, train_in_flight=2) as swarm:
        frames, _ = await begin(swarm)
        with pytest.raises(PeerError):
            for number in range(50):
                await frames.send(Forward(number, 3, 5, (60,) * 30), microbatch(*(60,) * 30))
            while True:
                await frames.receive()


async def test_a_stranger_cannot_have_memory_taken_before_it_is_let_in(checkpoint: Checkpoint) -> None:
    async with open_node(checkpoint) as swarm:
        frames = await connect(swarm)
        with pytest.raises(PeerVanished):
            await ask(frames, Forward(1, 3, 5, (3,)), microbatch(3))


async def test_who_says_nothing_is_not_waited_for(
    checkpoint: Checkpoint, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_node(checkpoint, lease_s=20.0) as swarm:
        frames, _ = await begin(swarm)
        answer, _ = await frames.receive()
        assert isinstance(answer, Declined) and answer.code == "idle"


async def test_what_is_kept_for_a_client_goes_with_it(checkpoint: Checkpoint) -> None:
    async with open_node(checkpoint) as swarm:
        frames, _ = await begin(swarm)
        await ask(frames, Forward(1, 3, 5, (3,)), microbatch(3))
        training = swarm.served["a"].training
        assert training.kept_bytes
        await frames.aclose()
        while training.sessions:
            await trio.lowlevel.checkpoint()
        assert not training.kept_bytes


# ------------------------------------------------------------------ decoders

MESSAGES: tuple[TrainMessage, ...] = (
    Begin(SESSION, "r", 3, 5, "float32"),
    adapt()[0],
    Forward(1, 3, 5, (3, 4), b"d" * 32, 7),
    Backward(1, 2, 3, 5, (3, 4), None, 7, True, False),
    Declined("busy", "no", None),
)


@given(st.sampled_from(MESSAGES), st.data())
def test_garbage_is_no_message_or_another_valid_one(message: TrainMessage, data: st.DataObject) -> None:
    encoded = bytearray(encode_message(message))
    assert decode_train_message(bytes(encoded)) == message
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] = data.draw(st.integers(0, 255))
    cut = bytes(encoded[: data.draw(st.integers(0, len(encoded)))])
    for attempt in (bytes(encoded), cut):
        try:
            decoded = decode_train_message(attempt)
        except MALFORMED:
            continue
        assert decode_train_message(encode_message(decoded)) == decoded


@given(st.binary(max_size=400), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_garbage_is_no_microbatch(payload: bytes, lengths: list[int]) -> None:
    try:
        rows, hidden = decode_inputs(bytearray(payload), lengths, 4, "float32")
    except PeerError:
        return
    assert rows.tokens == len(hidden) == sum(lengths)
    assert bool(torch.isfinite(hidden).all())


@given(st.binary(max_size=64), st.integers(0, 9))
def test_garbage_is_no_adapter(payload: bytes, size: int) -> None:
    try:
        assert len(decode_vector(bytearray(payload), size)) == size
    except PeerError:
        return


def test_layouts_come_back_as_they_were() -> None:
    layout = AdapterLayout((LowRank(3, "mlp.up_proj", 4, 0.25, 0.1),), 5)
    assert layout_of(updates_of(layout), 5) == layout


async def test_an_oversized_frame_is_refused_before_memory_is_taken() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    frames = TrainStream(theirs, max_payload_bytes=1000, peer_id="mallory")
    await ours.send_all((4).to_bytes(4, "big") + (1 << 30).to_bytes(4, "big"))
    with pytest.raises(ProtocolViolation, match="at most") as caught:
        await frames.receive()
    assert caught.value.peer_id == "mallory"
