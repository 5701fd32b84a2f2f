"""Conversations that a node knows, and frames of them that have gone wrong.

Half of what is bitten is bitten blindly. The other half is rewritten value by value and framed anew, so that
it gets past the length prefix and the decoder's first look.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import msgspec
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.pubsub.pb.rpc_pb2 import RPC
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, PeerId, StopMessage
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch

from p2pinfer.node.protocol.messages import (
    CHAIN_PROTOCOL,
    SESSION_PROTOCOL,
    Attach,
    End,
    Expect,
    Filled,
    Message,
    Move,
    Open,
    Probe,
    Refused,
    Relink,
    Result,
    Step,
    Successor,
)
from p2pinfer.node.swarm.signed_records import seal
from p2pinfer.node.transport.identity import Identity

Framing = Literal["wire", "u32", "varint", "raw"]
ODD_VALUES: Final[tuple[Any, ...]] = (
    *(None, True, -1, 0, 1 << 16, (1 << 32) - 1, (1 << 63) - 1, -(1 << 63), 1e300, float("nan")),
    *("", "\0", "x" * 300, "\N{SNOWMAN}" * 9, b"", b"\xff" * 40, [], [[[[[[]]]]]], {"a": 1}),
)
ODD_LENGTHS: Final = (0, 1, 0x7F, 0x80, 0xFFFF, 0x10000, 0x10001, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@dataclass(frozen=True)
class Frame:
    """One message: what it says, a tensor's bytes perhaps, and how its length is told."""

    framing: Framing
    body: bytes
    payload: bytes = b""

    def encode(self) -> bytes:
        match self.framing:
            case "wire":
                return struct.pack(">II", len(self.body), len(self.payload)) + self.body + self.payload
            case "u32":
                return struct.pack(">I", len(self.body)) + self.body
            case "varint":
                return _varint(len(self.body)) + self.body
            case "raw":
                return self.body


@dataclass(frozen=True)
class Conversation:
    """Frames that follow each other on a stream of `protocol`."""

    protocol: str
    frames: tuple[Frame, ...]


def conversations(
    revision: str, hidden_size: int, num_blocks: int, peer_id: str, address: str, attacker: Identity
) -> list[Conversation]:
    """Something sensible to say on every protocol that takes input."""
    session = bytes(range(16))
    opening = Open(session, revision, 0, num_blocks, 64, "float32")
    row = bytes(4 * hidden_size)
    steps = [Step(number, 0, number, 1, 1) for number in range(3)]
    there = Successor(peer_id, (address,))
    chained = Open(session, revision, 0, 2, 64, "float32", None, there)
    talks: list[tuple[str, list[tuple[Message, bytes]]]] = [
        (SESSION_PROTOCOL, [(opening, b"")]),
        (SESSION_PROTOCOL, [(opening, b""), (steps[0], row)]),
        (SESSION_PROTOCOL, [(opening, b""), (steps[0], row), (steps[1], row), (steps[2], row)]),
        (SESSION_PROTOCOL, [(opening, b""), (Step(0, 0, 0, 4, 4), row * 4), (Step(1, 1, 2, 2, 0), row * 2)]),
        (SESSION_PROTOCOL, [(opening, b""), (End(), b"")]),
        (SESSION_PROTOCOL, [(opening, b""), (Refused("busy", "no, you"), b"")]),
        (SESSION_PROTOCOL, [(chained, b"")]),
        (SESSION_PROTOCOL, [(opening, b""), (steps[0], row), (Expect(peer_id), b"")]),
        (SESSION_PROTOCOL, [(opening, b""), (Probe(0, 100), b""), (Probe(1), b"")]),
        (SESSION_PROTOCOL, [(opening, b""), (Relink(0, there, 0, 1, 1, 1, True), b"")]),
        (SESSION_PROTOCOL, [(opening, b""), (Step(0, 1, 0, 1, 0, replay=1), row)]),
        (SESSION_PROTOCOL, [(Move(session), b""), (steps[0], row)]),
        (CHAIN_PROTOCOL, [(Attach(session), b""), (Filled(0), b"")]),
        (CHAIN_PROTOCOL, [(Attach(session), b""), (Probe(0), b"")]),
        (CHAIN_PROTOCOL, [(Attach(session), b"")]),
        (CHAIN_PROTOCOL, [(Attach(session), b""), (steps[0], row)]),
        (CHAIN_PROTOCOL, [(Result(0, 0, 1), row)]),
    ]
    found = [
        Conversation(
            protocol,
            tuple(Frame("wire", msgspec.msgpack.encode(message), payload) for message, payload in said),
        )
        for protocol, said in talks
    ]
    asks: dict[str, list[Any]] = {
        "/p2pinfer/snapshot/1.0.0": [[revision], [None], [revision, bytes(16)]],
        "/p2pinfer/evidence/1.0.0": [[[bytes(32), b"\1" * 32]]],
        "/p2pinfer/dialback/1.0.0": [[[9, 4001]]],
    }
    for protocol, values in asks.items():
        found += [Conversation(protocol, (Frame("u32", msgspec.msgpack.encode(each)),)) for each in values]
    reserve = HopMessage(type=HopMessage.RESERVE)
    connect = HopMessage(type=HopMessage.CONNECT, peer=PeerId(id=bytes(38)))
    rpc = RPC(
        subscriptions=[RPC.SubOpts(subscribe=True, topicid=f"/p2pinfer/1/{revision}/blocks")],
    )
    message = rpc.publish.add()
    message.from_id, message.seqno = attacker.peer_id.encode(), bytes(8)
    message.data = seal(attacker, msgspec.msgpack.encode([1, attacker.peer_id, "m", revision, 0, 8]))
    message.topicIDs.append(f"/p2pinfer/1/{revision}/blocks")
    spoken: list[tuple[str, Any]] = [
        ("/libp2p/circuit/relay/0.2.0/hop", reserve),
        ("/libp2p/circuit/relay/0.2.0/hop", connect),
        (
            "/libp2p/circuit/relay/0.2.0/stop",
            StopMessage(type=StopMessage.CONNECT, peer=PeerId(id=bytes(38))),
        ),
        ("/libp2p/dcutr", HolePunch(type=HolePunch.CONNECT, ObsAddrs=[b"\x04\x7f\0\0\1\x06\x0f\xa1"])),
        ("/libp2p/dcutr", HolePunch(type=HolePunch.SYNC)),
        ("/meshsub/1.2.0", rpc),
        ("/meshsub/1.1.0", rpc),
        ("/ipfs/id/push/1.0.0", Identify(agent_version="x", protocols=["/a", "/b"])),
        ("/ipfs/id/1.0.0", Identify()),
    ]
    found += [
        Conversation(protocol, (Frame("varint", said.SerializeToString()),)) for protocol, said in spoken
    ]
    return [*found, Conversation("/ipfs/ping/1.0.0", (Frame("raw", bytes(32)),))]


def mutate(frame: Frame, rng: random.Random) -> bytes:
    """The bytes of something that resembles `frame`, and is not what it was."""
    whole = frame.encode()
    while True:
        bitten = _rewrite(frame, rng).encode() if rng.random() < 0.5 else _bite(whole, rng)
        if bitten != whole:
            return bitten


def _rewrite(frame: Frame, rng: random.Random) -> Frame:
    """With other values, framed as they should be."""
    body = _bite(frame.body, rng)
    if frame.framing in ("wire", "u32"):
        values = cast("list[Any]", msgspec.msgpack.decode(frame.body))
        for _ in range(rng.randint(1, 2)):
            at = rng.randrange(len(values) + 1)
            if at == len(values) or rng.random() < 0.1:
                values.insert(at, rng.choice(ODD_VALUES))
            elif rng.random() < 0.1 and len(values) > 1:
                del values[at]
            else:
                values[at] = rng.choice(ODD_VALUES)
        body = msgspec.msgpack.encode(values)
    payload = _bite(frame.payload, rng) if frame.payload and rng.random() < 0.3 else frame.payload
    return Frame(frame.framing, body, payload)


def _bite(content: bytes, rng: random.Random) -> bytes:
    bitten = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(bitten) + 1)
        match rng.randrange(7):
            case 0 if bitten:
                bitten[at % len(bitten)] ^= 1 << rng.randrange(8)
            case 1 if bitten:
                bitten[at % len(bitten)] = rng.choice((0, 1, 0x7F, 0x80, 0xC1, 0xFF))
            case 2:
                del bitten[at:]
            case 3:
                del bitten[at : at + rng.randint(1, 8)]
            case 4:
                bitten[at:at] = rng.randbytes(rng.randint(1, 16))
            case 5:
                bitten[at : at + 4] = struct.pack(">I", rng.choice(ODD_LENGTHS))
            case _:
                bitten += bitten[at : at + 64]
    return bytes(bitten[: 1 << 20])


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])
