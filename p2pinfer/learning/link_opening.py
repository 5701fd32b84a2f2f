"""Opening of a session of training on a hop, and what is asked of it before anything is sent."""

from __future__ import annotations

import secrets
from typing import Final

import trio

from p2pinfer.errors import PeerRefused, PeerVanished, ProtocolViolation
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.numerics import Codec, parse_numerics, reference_for, row_bytes
from p2pinfer.node.host.network import Network
from p2pinfer.node.protocol.frames import MinimumRate
from p2pinfer.node.protocol.train_messages import TRAIN_PROTOCOL, Begin, Begun, Declined, TrainMessage
from p2pinfer.node.protocol.train_stream import TrainStream
from p2pinfer.routing.route import Hop

from .pass_watch import PassWatch
from .train_link import TrainLink

OPENING_S: Final = 10.0  # for a hop to let us in, where round trips take no time
OPENING_ROUND_TRIPS: Final = 8
_RATE: Final = MinimumRate(60.0, 16_384)


async def open_link(
    host: Network, hop: Hop, spec: ModelSpec, codec: Codec, watch: PassWatch | None = None
) -> TrainLink:
    """A session of training on a hop; `watch` is shown its passes.

    Raises:
        PeerError: It cannot be reached, does not train, or refuses.
    """
    begin = Begin(secrets.token_bytes(16), spec.revision, hop.span.start, hop.span.stop, codec)
    with host.within(OPENING_S, [hop.peer_id], OPENING_ROUND_TRIPS) as scope:
        stream = await host.open_stream(hop.peer_id, TRAIN_PROTOCOL, hop.addrs, hearsay=True)
        frames = TrainStream(stream, max_payload_bytes=0, peer_id=hop.peer_id, minimum_rate=_RATE)
        try:
            await frames.send(begin)
            answer, _ = await frames.receive()
            return _opened(hop, spec, begin, answer, frames, host, watch)
        except BaseException:
            with trio.CancelScope(shield=True), trio.move_on_after(1.0):
                await frames.aclose()
            raise
    assert scope.cancelled_caught
    raise PeerVanished(f"peer {hop.peer_id} took too long to let us train", hop.peer_id)


def _opened(
    hop: Hop,
    spec: ModelSpec,
    begin: Begin,
    answer: TrainMessage,
    frames: TrainStream,
    host: Network,
    watch: PassWatch | None,
) -> TrainLink:
    if isinstance(answer, Declined):
        raise PeerRefused(
            f"peer {hop.peer_id} refused to train blocks {hop.span}: {answer.message}",
            hop.peer_id,
            answer.code,
        )
    if not isinstance(answer, Begun):
        raise ProtocolViolation(f"{type(answer).__name__} as an answer to Begin", hop.peer_id)
    if reference_for(parse_numerics(answer.dtype)) is None:
        raise ProtocolViolation(f"computes in {answer.dtype:.20}, which nobody here can check", hop.peer_id)
    if hop.dtype and answer.dtype != hop.dtype:
        raise ProtocolViolation(f"computes in {answer.dtype}, and has announced {hop.dtype}", hop.peer_id)
    largest = answer.max_tokens * row_bytes(spec.hidden_size, "float32") + answer.max_adapter_bytes
    frames.max_payload_bytes = min(largest, 1 << 31)
    return TrainLink(hop, spec, begin, answer, frames, host, watch)
