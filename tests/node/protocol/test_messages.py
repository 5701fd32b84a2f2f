from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.node.protocol import messages as wire
from p2pinfer.node.protocol.messages import End, Message, Open, Refused, Result, Step, Successor

counts = st.integers(0, 2**32 - 1)
bills = st.lists(st.builds(wire.Bill, counts, counts, counts, counts), max_size=4).map(tuple)
receipts = st.lists(st.binary(max_size=64), max_size=4).map(tuple)
peers = st.text(min_size=1, max_size=60)
words = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=64)
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        Open,
        st.binary(min_size=16, max_size=16),
        st.text(max_size=64),
        st.integers(0, 2**16),
        st.integers(0, 2**16),
        st.integers(1, 2**24 - 1),
        st.sampled_from(["float32", "bfloat16", "float16"]),
        st.none() | peers,
        st.none() | st.builds(Successor, peers, st.lists(words, max_size=4).map(tuple)),
    ),
    st.builds(wire.Opened, st.text(max_size=16)),
    st.builds(wire.Attach, st.binary(min_size=16, max_size=16)),
    st.just(wire.Attached()),
    st.builds(
        Step, counts, counts, counts, st.integers(1, 2**20 - 1), counts, bills, receipts, st.integers(0, 256)
    ),
    st.builds(wire.Filled, counts),
    st.builds(wire.Expect, peers),
    st.builds(
        wire.Relink,
        counts,
        st.builds(Successor, peers, st.lists(words, max_size=4).map(tuple)),
        counts,
        counts,
        st.integers(1, 256),
        counts,
        st.booleans(),
        st.integers(1, 2**20 - 1),
        st.integers(1, 256),
    ),
    st.builds(wire.Relinked, counts, st.none() | st.sampled_from(["no_replay", "successor_vanished"])),
    st.builds(wire.Probe, counts, st.integers(0, 60_000)),
    st.builds(wire.Alive, counts, st.none() | st.booleans()),
    st.builds(wire.Leaving, st.floats(0, 3600)),
    st.builds(Result, counts, counts, counts, bills, receipts),
    st.builds(Refused, st.sampled_from(["busy", "protocol"]), words, st.text(max_size=128)),
    st.just(End()),
)


@given(messages)
def test_every_message_comes_back_as_it_was_sent(message: Message) -> None:
    assert wire.decode_message(wire.encode_message(message)) == message


@given(st.binary(max_size=200))
def test_garbage_is_malformed_and_nothing_else(garbage: bytes) -> None:
    with suppress(*wire.MALFORMED):
        wire.decode_message(garbage)


@given(messages, st.data())
def test_a_mutated_message_is_a_message_or_malformed(message: Message, data: st.DataObject) -> None:
    header = bytearray(wire.encode_message(message))
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    with suppress(*wire.MALFORMED):
        wire.decode_message(header[: data.draw(st.integers(0, len(header)))])


def test_fields_of_a_later_version_are_skipped() -> None:
    assert wire.decode_message(msgspec.msgpack.encode(["attached", "a field of tomorrow"])) == (
        wire.Attached()
    )


@pytest.mark.parametrize(
    "fields",
    [
        ["open", b"short", "r", 0, 1, 8, "float32"],
        ["open", b"x" * 16, "r", 0, 1, 0, "float32"],
        ["open", b"x" * 16, "r", 0, 1, 8, "int8"],
        ["step", 0, 0, -1, 1, 1],
        ["step", 0, 0, 0, 0, 1],
        ["step", 0, 0, 0, 1, 1, [[0, 0, 0, 0]] * 257],
        ["step", 0, 0, 0, 1, 1, [], [], 257],
        ["relink", 0, ["p"], 0, 0, 0, 0, True],
        ["relink", 0, None, 0, 0, 1, 0, True],
        ["probe", 0, 60_001],
        ["leaving", -1.0],
        ["leaving", float("nan")],
        ["expect", ""],
        ["refused", "because", "no"],
        ["refused", "busy", "a colourful \x1b[31mword"],
        ["nonsense"],
        [],
    ],
)
def test_a_field_out_of_its_range_is_refused(fields: list[object]) -> None:
    with pytest.raises(wire.MALFORMED):
        wire.decode_message(msgspec.msgpack.encode(fields))


@given(st.text(max_size=2000))
def test_whatever_went_wrong_can_be_said_in_a_refusal(text: str) -> None:
    message = Refused("busy", wire.printable(text))
    assert wire.decode_message(wire.encode_message(message)) == message
