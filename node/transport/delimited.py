"""Protobuf messages behind a varint length, as libp2p's own protocols send them."""

from __future__ import annotations

from typing import Final, TypeVar

import trio
from google.protobuf.message import DecodeError, Message

from p2pinfer.errors import PeerVanished, ProtocolViolation

MAX_MESSAGE_BYTES: Final = 4096  # "Implementations MUST limit the size": circuit-v2, and hole punching alike
_MAX_LENGTH_BYTES: Final = 3  # of a varint: 2 MiB, more than enough to see that it is too much

_Message = TypeVar("_Message", bound=Message)


async def send_message(stream: trio.abc.SendStream, message: Message) -> None:
    """Send one message.

    Raises:
        PeerVanished: The stream is gone.
    """
    encoded = message.SerializeToString()
    await stream.send_all(_varint(len(encoded)) + encoded)


async def receive_message(stream: trio.abc.ReceiveStream, kind: type[_Message]) -> _Message:
    """The next message, and not a byte of what follows it.

    Raises:
        PeerVanished: The stream ended before it was complete.
        ProtocolViolation: It is larger than `MAX_MESSAGE_BYTES`, or no such message.
    """
    size = 0
    for index in range(_MAX_LENGTH_BYTES):
        (byte,) = await _exactly(stream, 1)
        size |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            break
    else:
        raise ProtocolViolation("a message whose length does not end")
    if size > MAX_MESSAGE_BYTES:
        raise ProtocolViolation(f"a message of {size} bytes; {MAX_MESSAGE_BYTES} are allowed")
    message = kind()
    try:
        message.ParseFromString(await _exactly(stream, size))
    except DecodeError as exc:
        raise ProtocolViolation(f"not a {kind.__name__}") from exc
    return message


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


async def _exactly(stream: trio.abc.ReceiveStream, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        part = bytes(await stream.receive_some(size))
        if not part:
            raise PeerVanished("the stream ended in the middle of a message")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
