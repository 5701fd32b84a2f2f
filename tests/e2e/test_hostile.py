"""Hostile bytes against a live node in a process of its own, with an honest session beside them.

Whatever comes, the node closes that session and nothing else: the honest text is what it would have been, the
node says nothing on standard error, and gives everything back.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import p2pinfer
from p2pinfer.errors import PeerError, PeerVanished
from p2pinfer.generation.generation import Token
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL
from p2pinfer.node.host.host import Host, HostConfig, open_host
from p2pinfer.node.protocol.frames import FrameStream, encode_header
from p2pinfer.node.protocol.messages import (
    CHAIN_PROTOCOL,
    SESSION_PROTOCOL,
    Attach,
    Attached,
    End,
    Message,
    Open,
    Opened,
    Refused,
    Result,
    Step,
    Successor,
)
from p2pinfer.node.swarm.snapshot import SNAPSHOT_PROTOCOL
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.node.transport.peer_stream import PeerStream

from .support import NodeProcess

pytestmark = pytest.mark.slow

SESSION = bytes(range(16))
ROW = bytes(4 * 320)  # one token in float32
ANSWER_S = 15.0  # how long a node may take to hang up: a handshake's time, for a word that may be under way
PROTOCOLS = (SESSION_PROTOCOL, CHAIN_PROTOCOL, SNAPSHOT_PROTOCOL, "/meshsub/1.2.0", "/ipfs/id/1.0.0")


@dataclass(frozen=True)
class Victim:
    """The node, and what it needs to be told to take an opening for a real one."""

    node: NodeProcess
    peer_id: str
    address: str
    revision: str

    def opening(self, **changes: Any) -> Open:
        opening = Open(SESSION, self.revision, 0, 8, 64, "float32")
        return msgspec.structs.replace(opening, **changes)


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """A node that ends with everything given back, and with nothing to complain about."""
    home = tmp_path_factory.mktemp("victim")
    flags = ("--blocks", "0:8", "--dtype", "float32", "--set", "serve.handshake_timeout_s=3")
    # A hundred attackers come from this one address: how often they may is for tests/network/test_floods.py.
    unslowed = ("--set", "host.loop_share=1", "--set", "host.loop_share_at_work=1")
    node = NodeProcess(home, *flags, *unslowed, "--set", f"cache_dir={home}")
    ready = node.wait_for("ready")
    yield Victim(node, ready["peer_id"], ready["addrs"][0], ready["revision"])
    assert node.end() == 0
    assert node.said_at_last == ""


class Honest:
    """Generates the same text again and again, and knows what it is when nobody disturbs."""

    def __init__(self, connected: p2pinfer.BlockingClient) -> None:
        self._connected = connected
        self._expected = [token.id for token in self._generate()]
        self._generation = self._generate()
        self._position = 0

    def _generate(self) -> Iterator[Token]:
        return iter(self._connected.generate("Once", temperature=1.0, seed=3))

    def step(self) -> None:
        """One token more must be the one that was to be expected."""
        if self._position == len(self._expected):
            self._generation, self._position = self._generate(), 0
        assert next(self._generation).id == self._expected[self._position]
        self._position += 1

    def finish(self) -> None:
        """So must all that are left."""
        assert [token.id for token in self._generation] == self._expected[self._position :]


@pytest.fixture(scope="module")
def long_text(victim: Victim, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Honest]:
    home = tmp_path_factory.mktemp("honest")
    options: dict[str, Any] = {"cache_dir": home, "data_dir": home}
    with p2pinfer.connect(model=BUNDLED_MODEL, bootstrap=[victim.address], **options) as connected:
        honest = Honest(connected)
        yield honest
        honest.finish()


@pytest.fixture
def honest(long_text: Honest) -> Iterator[Honest]:
    """An honest session on the victim, which goes on whatever happens in the test."""
    long_text.step()
    yield long_text
    long_text.step()


def frame(message: Message, payload: bytes = b"") -> bytes:
    return encode_header(message, len(payload)) + payload


def attack(victim: Victim, use: Callable[[Host], Any]) -> Any:
    """What `use` gives, with a host that is connected to the victim."""

    async def run() -> Any:
        with trio.fail_after(120):
            async with open_host(new_identity(), HostConfig(listen=())) as host:
                await host.connect(victim.peer_id, [victim.address])
                return await use(host)

    return trio.run(run)


async def answers(stream: PeerStream) -> list[Message]:
    """All that the victim has to say until it hangs up, which must be soon."""
    frames = FrameStream(stream, max_payload_bytes=1 << 22)
    messages: list[Message] = []
    with trio.fail_after(ANSWER_S):
        try:
            while True:
                messages.append((await frames.receive())[0])
        except PeerVanished:
            return messages


def tell(victim: Victim, protocol: str, *parts: bytes) -> list[Message]:
    """Send bytes on a stream of their own; returns the answers."""

    async def use(host: Host) -> list[Message]:
        stream = await host.open_stream(victim.peer_id, protocol)
        with suppress(PeerVanished):
            for part in parts:
                await stream.send_all(part)
        return await answers(stream)

    messages: list[Message] = attack(victim, use)
    return messages


HUGE = struct.pack(">II", 1 << 31, 0)
HUGE_PAYLOAD = struct.pack(">II", 4, 1 << 31)
NO_HEADER = struct.pack(">II", 0, 0)


@pytest.mark.parametrize("protocol", [SESSION_PROTOCOL, CHAIN_PROTOCOL])
@pytest.mark.parametrize(
    "first",
    [
        HUGE,
        HUGE_PAYLOAD,
        NO_HEADER,
        struct.pack(">II", 4, 0) + b"\xc1\xc1\xc1\xc1",
        struct.pack(">II", 3, 0) + msgspec.msgpack.encode([]) + b"\0\0",
        frame(End()),
        frame(Opened("float32")),
        frame(Attached()),
        frame(Refused("busy", "no, you")),
        frame(Step(0, 0, 0, 1, 1), ROW),
        frame(Result(0, 0, 1), ROW),
        b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n",
    ],
    ids=range(12),
)
def test_a_stream_that_begins_wrongly_is_dropped_without_a_word(
    protocol: str, first: bytes, victim: Victim, honest: Honest
) -> None:
    assert tell(victim, protocol, first) == []


def test_a_stream_meant_for_another_protocol_is_dropped(victim: Victim, honest: Honest) -> None:
    assert tell(victim, CHAIN_PROTOCOL, frame(victim.opening())) == []
    assert tell(victim, SESSION_PROTOCOL, frame(Attach(SESSION))) == []


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"revision": "0" * 32}, "wrong_model"),
        ({"stop": 9}, "wrong_span"),
        ({"max_tokens": (1 << 24) - 1}, "cache_full"),
        ({"successor": Successor("nobody")}, "successor_unreachable"),
        (
            {"successor": Successor("12D3KooWHRDh3yL8gix9dCiwmrLZahcKY8Ae7ovYj3Tb1iAg6gpz", ("/tcp",))},
            "successor_unreachable",
        ),
        ({"successor": Successor("\N{SNOWMAN}" * 9, ("/ip4/" * 200,) * 16)}, "successor_unreachable"),
    ],
    ids=range(6),
)
def test_an_opening_that_asks_too_much_is_refused(
    changes: dict[str, Any], code: str, victim: Victim, honest: Honest
) -> None:
    refused, end = tell(victim, SESSION_PROTOCOL, frame(victim.opening(**changes)))
    assert isinstance(refused, Refused)
    assert (refused.code, end) == (code, End())


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ([frame(Step(0, 0, 5, 1, 1), ROW)], "protocol"),  # a gap
        ([frame(Step(0, 0, 0, 65, 1), ROW * 65)], "protocol"),  # past the reservation
        ([frame(Step(0, 0, 0, 1, 2), ROW)], "protocol"),  # more back than there is
        ([frame(Step(0, 0, 0, 2, 1), ROW)], "protocol"),  # half a tensor
        ([frame(Step(0, 0, 0, 1, 1), b"\0\0\xc0\x7f" * 320)], "wrong_input"),  # not a number
        (
            [frame(Step(0, 5, 0, 1, 1), ROW), frame(Step(1, 4, 1, 1, 1), ROW)],
            "protocol",
        ),  # an epoch that falls
        ([frame(Step(0, 0, 0, 1, 1), ROW)] * 3 + [HUGE], "protocol"),
        ([frame(Step(0, 0, 0, 1, 1), ROW), frame(Attach(SESSION))], "protocol"),
        ([frame(Open(SESSION, "", 0, 1, 1, "float32"))], "protocol"),
        ([frame(Opened("float32"))], "protocol"),
        ([frame(Result(0, 0, 1), ROW)], "protocol"),
        ([b"\xff" * 100], "protocol"),
    ],
    ids=range(12),
)
def test_a_session_that_goes_wrong_is_told_why_and_closed(
    parts: list[bytes], code: str, victim: Victim, honest: Honest
) -> None:
    *before, refused, end = tell(victim, SESSION_PROTOCOL, frame(victim.opening()), *parts)
    assert all(isinstance(message, Opened | Result) for message in before)
    assert isinstance(refused, Refused)
    assert (refused.code, end) == (code, End())


def test_a_client_that_hangs_up_in_the_middle_of_a_frame_leaves_nothing(
    victim: Victim, honest: Honest
) -> None:
    async def use(host: Host) -> str:
        for reset in (False, True):
            stream = await host.open_stream(victim.peer_id, SESSION_PROTOCOL)
            frames = FrameStream(stream, max_payload_bytes=1 << 20)
            await frames.send(victim.opening(session=bytes([reset]) * 16))
            assert isinstance((await frames.receive())[0], Opened)
            await stream.send_all(frame(Step(0, 0, 0, 2, 1), ROW * 2)[:-7])
            await (stream.reset() if reset else stream.aclose())
        return host.peer_id

    peer_id = attack(victim, use)
    closed = [closing_of(victim, peer_id), closing_of(victim, peer_id)]
    assert {event["reason"] for event in closed} == {"the client vanished"}
    assert closed[-1]["sessions"] <= 1  # the honest one


def closing_of(victim: Victim, peer_id: str) -> dict[str, Any]:
    """The next report that a session of that client is closed."""
    while True:
        event = victim.node.wait_for("session_closed")
        if event["peer_id"] == peer_id:
            return event


def test_a_stranger_can_neither_feed_nor_take_over_a_session(victim: Victim, honest: Honest) -> None:
    async def use(host: Host) -> None:
        control = FrameStream(
            await host.open_stream(victim.peer_id, SESSION_PROTOCOL), max_payload_bytes=1 << 20
        )
        await control.send(victim.opening(predecessor="somebody else"))
        assert isinstance((await control.receive())[0], Opened)
        chain = await host.open_stream(victim.peer_id, CHAIN_PROTOCOL)
        await chain.send_all(frame(Attach(SESSION)))
        refused, end = await answers(chain)
        assert isinstance(refused, Refused)
        assert (refused.code, end) == ("no_session", End())
        again = await host.open_stream(victim.peer_id, SESSION_PROTOCOL)
        await again.send_all(frame(victim.opening()))
        refused, end = await answers(again)
        assert isinstance(refused, Refused)
        assert (refused.code, end) == ("busy", End())
        await control.end()

    attack(victim, use)


@dataclass(frozen=True)
class Said:
    """What is sent on one stream. Shown without the zeros, of which a row of a step has thousands."""

    protocol: str
    content: bytes

    def __repr__(self) -> str:
        shown = re.sub(rb"\0{9,}", _count, self.content)
        return f"{self.protocol} {shown!r}"


def _count(zeros: re.Match[bytes]) -> bytes:
    return b"(%d zeros)" % len(zeros[0])


@st.composite
def conversations(draw: st.DrawFn, frames: Sequence[bytes]) -> list[Said]:
    """Streams of frames in any order, some of them bitten."""
    protocol = st.sampled_from(PROTOCOLS)
    parts = st.lists(st.sampled_from(frames) | st.binary(max_size=200), min_size=1, max_size=6)
    streams: list[Said] = []
    for _ in range(draw(st.integers(1, 3))):
        content = bytearray(b"".join(draw(parts)))
        for _ in range(draw(st.integers(0, 4))):
            if content:
                content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
        cut = draw(st.integers(0, len(content)))
        streams.append(Said(draw(protocol), bytes(content[:cut] if draw(st.booleans()) else content)))
    return streams


def test_nothing_that_can_be_sent_disturbs_anybody_else(victim: Victim, honest: Honest) -> None:
    """Several streams of an attacker at once, over every protocol that the node speaks."""
    frames = [
        frame(victim.opening()),
        frame(victim.opening(session=b"b" * 16, start=2, stop=5, codec="bfloat16")),
        frame(victim.opening(session=b"c" * 16, successor=Successor(victim.peer_id, (victim.address,)))),
        frame(Attach(SESSION)),
        frame(Step(0, 0, 0, 1, 1), ROW),
        frame(Step(1, 0, 1, 4, 4), ROW * 4),
        frame(Step(2, 3, 0, 3, 0), ROW * 3),
        frame(Result(0, 0, 1), ROW),
        frame(Refused("busy", "no")),
        frame(End()),
    ]

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(conversations(frames))
    def converse(streams: Sequence[Said]) -> None:
        async def use(host: Host) -> None:
            async with trio.open_nursery() as nursery:
                for stream in streams:
                    nursery.start_soon(say, host, victim.peer_id, stream)

        attack(victim, use)
        honest.step()

    converse()

    async def leave(host: Host) -> str:
        stream = await host.open_stream(victim.peer_id, SESSION_PROTOCOL)
        await stream.send_all(frame(victim.opening()) + frame(End()))
        assert End() in await answers(stream)
        return host.peer_id

    assert closing_of(victim, attack(victim, leave))["sessions"] <= 1  # the honest one


async def say(host: Host, peer_id: str, said: Said) -> None:
    """Send it, listen for a moment, hang up."""
    with suppress(PeerError):
        stream = await host.open_stream(peer_id, said.protocol)
        try:
            await stream.send_all(said.content)
            with trio.move_on_after(0.02):
                while await stream.receive_some():
                    pass
        finally:
            await stream.aclose()
