from dataclasses import replace
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.errors import ProtocolViolation
from p2pinfer.models.configs.numbers import MAX_NUMBERS, revision_digest
from p2pinfer.models.span import BlockSpan
from p2pinfer.routing.announcement import (
    MAX_ANNOUNCEMENT_BYTES,
    Announcement,
    OfferedAdapter,
    decode_announcement,
    encode_announcement,
)
from p2pinfer.routing.coordinates import Coordinate
from p2pinfer.routing.nesting import MAX_DEPTH

MODEL, START, STOP, TOKENS_PER_S, COORDINATE, TTL_S, NAME = 2, 4, 5, 7, 12, 13, 23

REVISION = "0123456789abcdef" * 2
WEIGHTS, NUMBERS = "1" * 32, '{"model_type":"llama"}'
PLAIN = Announcement(
    peer_id="12D3KooWPeer",
    model="tiny-stories",
    revision=REVISION,
    span=BlockSpan(2, 6),
    dtype="bfloat16",
    tokens_per_s=41.5,
    free_cache_tokens=4096,
    sequence=1_700_000_000_000,
    reachability="public",
    addrs=("/ip4/192.0.2.1/tcp/4001", "/dns4/node.example/tcp/4001/p2p/12D3KooWPeer"),
    coordinate=Coordinate(1.0, -2.5, 0.0, 3.0, 0.25),
)

printable = st.text(st.characters(codec="utf-8").filter(str.isprintable), min_size=1, max_size=256)
visible = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1)
axis = st.floats(-10_000, 10_000)
announcements = st.builds(
    Announcement,
    peer_id=visible.map(lambda text: text[:128]),
    model=printable,
    revision=st.text("0123456789abcdef", min_size=32, max_size=32),
    span=st.tuples(st.integers(0, 4095), st.integers(1, 4096))
    .map(lambda ab: BlockSpan(min(ab), max(ab) + (ab[0] == ab[1])))
    .filter(lambda span: span.stop <= 4096),
    dtype=st.text("abcdefghijklmnopqrstuvwxyz0123456789_", min_size=1, max_size=16),
    tokens_per_s=st.floats(1e-6, 1e6),
    free_cache_tokens=st.integers(0, 1 << 40),
    sequence=st.integers(0, (1 << 63) - 1),
    reachability=st.sampled_from(["public", "mapped", "private", "unknown"]),
    addrs=st.lists(visible.map(lambda text: f"/{text[:255]}"), max_size=16).map(tuple),
    coordinate=st.none() | st.builds(Coordinate, axis, axis, axis, st.floats(0, 10_000), st.floats(0, 1)),
    ttl_s=st.floats(5, 300),
    leaving=st.booleans(),
    instance=st.binary(max_size=8),
    uptime_s=st.floats(0, 1e10),
    twin=st.binary(max_size=8),
    name=st.just("") | printable.map(lambda text: text[:32]),
    adapters=st.lists(
        st.builds(
            OfferedAdapter,
            digest=st.binary(min_size=32, max_size=32),
            name=printable.map(lambda name: name[:64]),
            size=st.integers(1, 1 << 30),
        ),
        max_size=4,
        unique_by=lambda each: each.digest,
    ).map(tuple),
)


def fields_of(encoded: bytes) -> list[Any]:
    return cast(list[Any], msgspec.msgpack.decode(encoded))


def with_field(index: int, value: object) -> bytes:
    fields = fields_of(encode_announcement(PLAIN))
    fields[index] = value
    return msgspec.msgpack.encode(fields)


@given(announcements)
def test_what_is_encoded_is_what_is_decoded(announcement: Announcement) -> None:
    assert decode_announcement(encode_announcement(announcement)) == announcement


@given(st.binary(max_size=400))
def test_garbage_is_a_protocol_violation(garbage: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        decode_announcement(garbage)


@given(announcements, st.data())
def test_a_mutated_announcement_is_refused_or_still_within_bounds(
    announcement: Announcement, data: st.DataObject
) -> None:
    encoded = bytearray(encode_announcement(announcement))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    del encoded[data.draw(st.integers(0, len(encoded))) :]
    try:
        decoded = decode_announcement(bytes(encoded))
    except ProtocolViolation:
        return
    assert encode_announcement(decoded)


@given(
    st.integers(0, 14),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.floats()),
)
def test_a_field_of_any_value_is_refused_or_still_within_bounds(index: int, value: object) -> None:
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        return
    try:
        decoded = decode_announcement(with_field(index, value))
    except ProtocolViolation:
        return
    assert encode_announcement(decoded)


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0, 2),
        (1, ""),
        (1, "peer\n"),
        (1, "p" * 129),
        (MODEL, ""),
        (MODEL, "m" * 257),
        (MODEL, "\x1b[2J"),
        (3, REVISION.upper()),
        (3, REVISION + "\n"),
        (START, -1),
        (START, 6),
        (STOP, 4097),
        (6, "bfloat16; rm"),
        (TOKENS_PER_S, 0.0),
        (TOKENS_PER_S, float("nan")),
        (TOKENS_PER_S, float("inf")),
        (8, -1),
        (9, 1 << 63),
        (10, "everywhere"),
        (11, ["/ip4/192.0.2.1/tcp/1"] * 17),
        (11, ["/" + "a" * 256]),
        (11, ["/ip4/192.0.2.1/tcp/1\n"]),
        (COORDINATE, [0.0] * 4),
        (COORDINATE, [0.0] * 6),
        (COORDINATE, [0.0, float("nan"), 0.0, 0.0, 0.0]),
        (COORDINATE, [0.0, 0.0, 0.0, -1.0, 0.0]),
        (TTL_S, 4.9),
        (TTL_S, 301.0),
        (TTL_S, float("nan")),
        (14, 1),
        (18, -1),
        (18, 1),  # fewer blocks than it serves
        (19, bytes(9)),
        (19, "text"),
        (20, -1.0),
        (20, float("inf")),
        (21, bytes(9)),
        (NAME, "n" * 33),
        (NAME, "\x1b[2J"),
        (NAME, "nam\u202ee"),  # turns the rest of the line around
        (NAME, b"name"),
    ],
)
def test_a_field_out_of_its_bounds_is_refused(index: int, value: object) -> None:
    with pytest.raises(ProtocolViolation):
        decode_announcement(with_field(index, value))


def test_fields_that_a_later_version_appends_are_skipped() -> None:
    later = [*fields_of(encode_announcement(PLAIN)), {"region": "eu"}, [1, 2]]
    assert decode_announcement(msgspec.msgpack.encode(later)) == PLAIN


def test_a_missing_field_is_refused() -> None:
    with pytest.raises(ProtocolViolation):
        decode_announcement(msgspec.msgpack.encode(fields_of(encode_announcement(PLAIN))[:14]))


def test_a_peer_of_before_does_not_say_what_later_ones_do() -> None:
    said = replace(
        PLAIN, nat="none", num_blocks=8, instance=b"instance", uptime_s=1.5, twin=b"another", name="attic"
    )
    fields = fields_of(encode_announcement(said))
    earliest = decode_announcement(msgspec.msgpack.encode(fields[:15]))
    assert earliest == replace(
        said, nat="unknown", num_blocks=0, instance=b"", uptime_s=0.0, twin=b"", name=""
    )
    assert decode_announcement(msgspec.msgpack.encode(fields[:19])).num_blocks == 8


def test_blocks_that_the_model_has_not_are_refused() -> None:
    assert decode_announcement(encode_announcement(replace(PLAIN, num_blocks=PLAIN.span.stop)))
    with pytest.raises(ValueError, match="of a model that has"):
        encode_announcement(replace(PLAIN, num_blocks=PLAIN.span.stop - 1))


def test_an_oversized_announcement_is_refused_before_it_is_read() -> None:
    padding = b"\x00" * MAX_ANNOUNCEMENT_BYTES
    with pytest.raises(ProtocolViolation, match="bytes"):
        decode_announcement(msgspec.msgpack.encode([*fields_of(encode_announcement(PLAIN)), padding]))


def test_deep_nesting_in_a_field_that_is_skipped_is_refused() -> None:
    """By a bound of ours: the interpreter's is 1,000 levels in Python 3.11, and 10,000 in 3.12."""
    fields = encode_announcement(PLAIN)[3:]  # without the header of an array of 26
    array_of_27 = b"\xdc\x00\x1b"
    for levels in (MAX_DEPTH, 500, 5000):  # the announcement itself is one level
        with pytest.raises(ProtocolViolation, match="more than 32 arrays inside each other"):
            decode_announcement(array_of_27 + fields + b"\x91" * levels + b"\xc0")
    assert decode_announcement(array_of_27 + fields + b"\x91" * (MAX_DEPTH - 1) + b"\xc0") == PLAIN


def test_what_a_peer_wrote_is_not_repeated_in_the_error() -> None:
    with pytest.raises(ProtocolViolation) as caught:
        decode_announcement(with_field(10, "\x1b[2Jgotcha"))
    assert "gotcha" not in str(caught.value)


def test_an_announcement_that_peers_would_refuse_is_not_encoded() -> None:
    with pytest.raises(ValueError, match="no peer would accept"):
        encode_announcement(replace(PLAIN, ttl_s=1.0))


def test_the_largest_announcement_fits() -> None:
    largest = replace(
        PLAIN,
        peer_id="p" * 128,
        model="\U0001f600" * 256,
        addrs=("/" + "a" * 255,) * 16,
        name="\U0001f600" * 32,
    )
    numbers = "x" * MAX_NUMBERS
    largest = replace(largest, weights=WEIGHTS, numbers=numbers, revision=revision_digest(WEIGHTS, numbers))
    assert decode_announcement(encode_announcement(largest)) == largest


SAID = replace(PLAIN, weights=WEIGHTS, numbers=NUMBERS, revision=revision_digest(WEIGHTS, NUMBERS))


def test_what_a_revision_is_made_of_comes_along() -> None:
    assert decode_announcement(encode_announcement(SAID)) == SAID


@pytest.mark.parametrize("lie", [{"weights": "2" * 32}, {"numbers": "{}"}, {"revision": REVISION}])
def test_weights_and_numbers_that_are_not_those_of_the_revision_are_refused(lie: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not those of its revision"):
        encode_announcement(replace(SAID, **lie))


@pytest.mark.parametrize("lie", [{"weights": "2" * 31}, {"numbers": "a\x1bb"}, {"numbers": "x" * 2049}])
def test_weights_and_numbers_are_bounded(lie: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="malformed"):
        encode_announcement(replace(SAID, **lie))


def test_a_peer_of_before_says_nothing_of_them() -> None:
    fields = fields_of(encode_announcement(PLAIN))
    older = decode_announcement(msgspec.msgpack.encode(fields[:-2]))
    assert (older.weights, older.numbers) == ("", "")
    assert older == PLAIN


@pytest.mark.parametrize(
    "adapters",
    [
        [[b"d" * 32, "a", 1]] * 2,
        [[bytes([each]) * 32, "a", 1] for each in range(5)],
        [[b"d" * 31, "a", 1]],
        [[b"d" * 32, "", 1]],
        [[b"d" * 32, "a" * 65, 1]],
        [[b"d" * 32, "\x1b[2J", 1]],
        [[b"d" * 32, "a", 0]],
        [[b"d" * 32, "a", (1 << 30) + 1]],
        [[b"d" * 32, "a"]],
        "a",
    ],
)
def test_adapters_that_cannot_be_offered_make_no_announcement(adapters: object) -> None:
    fields = [*fields_of(encode_announcement(PLAIN))[:-1], adapters]
    with pytest.raises(ProtocolViolation):
        decode_announcement(msgspec.msgpack.encode(fields))


def test_an_announcement_of_before_offers_no_adapters() -> None:
    fields = fields_of(encode_announcement(PLAIN))[:-1]
    assert decode_announcement(msgspec.msgpack.encode(fields)) == PLAIN
