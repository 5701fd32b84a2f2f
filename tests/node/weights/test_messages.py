"""What peers say about weights, and what is not taken for it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.errors import ProtocolViolation
from p2pinfer.models.configs.numbers import revision_digest, weights_digest
from p2pinfer.models.pieces.chunks import CHUNK_BYTES
from p2pinfer.node.weights.messages import (
    MAX_RUN,
    Chunks,
    Denied,
    Door,
    Find,
    Found,
    Get,
    Knock,
    Listed,
    Sending,
    Small,
    Weight,
    Words,
    chunks_of,
    decode_answer,
    decode_request,
    encode,
    manifest_of,
)

FOUND = Found(
    "m", "{}", (Weight("a.safetensors", 3, b"a" * 32, True),), (Words("config.json", 2, b"c" * 32),)
)
REVISION = revision_digest(weights_digest({"a.safetensors": (b"a" * 32).hex()}), "{}")


@pytest.mark.parametrize(
    "message", [Find("a" * 32), Chunks(bytes(32)), Get(bytes(32), 7, MAX_RUN), Small(bytes(32)), Knock()]
)
def test_requests_come_back_as_they_were(message: Any) -> None:
    assert decode_request(encode(message)[4:]) == message
    with pytest.raises(ProtocolViolation):
        decode_answer(encode(message)[4:])


@pytest.mark.parametrize(
    "message", [FOUND, Listed(5, bytes(32)), Sending(0), Door(4001, bytes(32)), Denied("later", 1.0)]
)
def test_answers_come_back_as_they_were(message: Any) -> None:
    assert decode_answer(encode(message)[4:]) == message


@pytest.mark.parametrize(
    "wrong",
    [
        ["get", bytes(32), 0, MAX_RUN + 1],
        ["get", bytes(32), -1, 1],
        ["get", bytes(31), 0, 1],
        ["get", bytes(32), 0],
        ["chunks", b""],
        ["find", "short"],
        ["nonsense"],
        [],
        {},
    ],
)
def test_requests_out_of_bounds_are_refused(wrong: Any) -> None:
    with pytest.raises(ProtocolViolation):
        decode_request(msgspec.msgpack.encode(wrong))


@given(st.binary(max_size=200))
def test_garbage_is_a_violation(content: bytes) -> None:
    for decode in (decode_request, decode_answer):
        try:
            decode(content)
        except ProtocolViolation:
            continue


def test_a_model_is_taken_only_for_the_revision_that_it_makes() -> None:
    manifest = manifest_of(FOUND, REVISION)
    assert (manifest.model, manifest.revision) == ("m", REVISION)
    others = [
        msgspec.structs.replace(FOUND, numbers="[]"),
        msgspec.structs.replace(FOUND, weights=(Weight("a.safetensors", 3, b"b" * 32, True),)),
        msgspec.structs.replace(FOUND, weights=(Weight("b.safetensors", 3, b"a" * 32, True),)),
        msgspec.structs.replace(FOUND, weights=(Weight("../a.safetensors", 3, b"a" * 32, True),)),
        msgspec.structs.replace(FOUND, texts=(Words("../config.json", 2, b"c" * 32),)),
    ]
    for other in others:
        with pytest.raises(ProtocolViolation):
            manifest_of(other, REVISION)


def test_a_name_that_would_move_the_cursor_is_shown_without_that() -> None:
    assert manifest_of(msgspec.structs.replace(FOUND, model="a\x1b[2Jb"), REVISION).model == "a?[2Jb"


@pytest.mark.parametrize(("size", "digests"), [(1, 0), (1, 2), (CHUNK_BYTES, 2), (CHUNK_BYTES + 1, 1)])
def test_a_list_has_a_digest_for_each_chunk(size: int, digests: int) -> None:
    with pytest.raises(ProtocolViolation):
        chunks_of(Listed(size, bytes(32 * digests)))
    with pytest.raises(ProtocolViolation):
        chunks_of(Listed(size, bytes(33)))
