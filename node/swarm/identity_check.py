"""Check of an address that answers with our own id: is it this process, or a duplicate?

The question is asked under an identity drawn for it, since nobody can connect to itself. Question and answer
are sealed records of that identity's, each one value behind a big-endian u32 length; see docs/wire.md. An
answer names the instance that asked, so it was not made before; a second question names the instance that
answered, so that it, too, knows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as SequenceOf
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Final, Literal

import msgspec
import trio

from p2pinfer.errors import PeerError, ProtocolViolation
from p2pinfer.node.concurrency.rate_limit import RateLimit
from p2pinfer.node.host.host import Host, HostConfig, open_host
from p2pinfer.node.host.length_prefix import receive_value, send_value
from p2pinfer.node.transport.identity import Identity, new_identity
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.routing.announcement import INSTANCE_BYTES

from .duplicate_identity import DuplicateDetector
from .sequence import MAX_SEQUENCE, Sequence
from .signed_records import MAX_RECORD_BYTES, open_record, seal

logger = logging.getLogger(__name__)

TWIN_PROTOCOL: Final = "/p2pinfer/twin/1.0.0"
ANSWER_S: Final = 5.0
CALL_S: Final = 10.0  # for dialling and both questions
MAX_ADDRS: Final = 4  # that are tried
AGAIN_S: Final = 30.0  # between calls at an address where nobody answers
ANSWERS_PER_S: Final = 0.25  # to one address range: each costs two signatures
ANSWERS_AT_ONCE: Final = 4
ALL_ANSWERS_PER_S: Final = 8.0
ALL_ANSWERS_AT_ONCE: Final = 64

_Instance = Annotated[bytes, msgspec.Meta(max_length=INSTANCE_BYTES)]


class LivenessProof(msgspec.Struct, frozen=True, array_like=True):
    """Proof that a process runs. Travels as the payload of a sealed record."""

    kind: Literal["here"]
    instance: _Instance  # of who says so
    uptime_s: Annotated[float, msgspec.Meta(ge=0, le=1e10)]
    heard: _Instance  # the instance that this answers; empty: none
    sequence: Annotated[int, msgspec.Meta(ge=0, le=MAX_SEQUENCE)]  # of its last announcement


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final[msgspec.msgpack.Decoder[LivenessProof]] = msgspec.msgpack.Decoder(LivenessProof)


class DuplicateCheck:
    """The calls that one process makes and answers."""

    def __init__(
        self, identity: Identity, config: HostConfig, duplicates: DuplicateDetector, sequence: Sequence
    ) -> None:
        self._identity = identity
        self._config = replace(config, listen=(), dial_timeout_s=ANSWER_S)
        self._duplicates = duplicates
        self._sequence = sequence
        self._answers = RateLimit(ANSWERS_PER_S, ANSWERS_AT_ONCE)
        self._all_answers = RateLimit(ALL_ANSWERS_PER_S, ALL_ANSWERS_AT_ONCE)

    def serve(self, host: Host) -> None:
        """Answer from now on."""

        async def answer(stream: PeerStream) -> None:
            with trio.move_on_after(ANSWER_S):
                asked = self._open(await receive_value(stream, MAX_RECORD_BYTES))
                now = trio.current_time()
                if not (self._answers.take(stream.address_range, now) and self._all_answers.take("", now)):
                    raise ProtocolViolation("too many questions", stream.peer_id)
                if asked.heard == self._duplicates.instance != asked.instance:
                    self._duplicates.meet(asked.instance, asked.uptime_s)
                    self._sequence.overtaken(asked.sequence)
                await send_value(stream, self._liveness_proof(asked.instance))

        host.serve(TWIN_PROTOCOL, answer)

    async def call(self, addrs: SequenceOf[str]) -> bool:
        """Ask at these addresses, each of which names our own id; whether anybody with our key answered.

        Nothing is raised: who does not answer, or something else, is nobody.
        """
        try:
            with trio.fail_after(CALL_S):
                async with open_host(new_identity(), self._config) as host:
                    found = await self._ask(host, addrs, b"")
                    if found.instance == self._duplicates.instance:
                        logger.info(
                            "one of the addresses with this node's id leads back to it; it is left out"
                        )
                        return True
                    asked_s = self._duplicates.uptime_s  # a slow answer must not make us seem the older one
                    found = await self._ask(host, addrs, found.instance)
        except (PeerError, trio.TooSlowError) as exc:
            logger.debug("twin.no_answer addrs=%s why=%s", addrs, exc)
            return False
        self._sequence.overtaken(found.sequence)
        self._duplicates.meet(found.instance, found.uptime_s, addrs[0], own_uptime_s=asked_s)
        return True

    async def keep_calling(self, addrs: SequenceOf[str]) -> None:
        """Call at these addresses until somebody answers: a twin may be started later than we."""
        while not await self.call(addrs):
            await trio.sleep(AGAIN_S)

    async def _ask(self, host: Host, addrs: SequenceOf[str], heard: bytes) -> LivenessProof:
        async with aclosing(
            await host.open_stream(self._identity.peer_id, TWIN_PROTOCOL, addrs[:MAX_ADDRS])
        ) as stream:
            await send_value(stream, self._liveness_proof(heard))
            found = self._open(await receive_value(stream, MAX_RECORD_BYTES))
        if found.heard != self._duplicates.instance or not found.instance:
            raise ProtocolViolation("an answer to another question", self._identity.peer_id)
        return found

    def _liveness_proof(self, heard: bytes) -> bytes:
        duplicates = self._duplicates
        said = LivenessProof("here", duplicates.instance, duplicates.uptime_s, heard, self._sequence.last)
        return seal(self._identity, _encoder.encode(said))

    def _open(self, record: bytes) -> LivenessProof:
        """Raises ProtocolViolation for anything that our own identity has not signed."""
        author, payload = open_record(record)
        if author != self._identity.peer_id:
            raise ProtocolViolation("another identity's word about a twin", author)
        return decode_liveness_proof(payload)


def decode_liveness_proof(payload: bytes) -> LivenessProof:
    """Raises ProtocolViolation for anything else."""
    try:
        return _decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolViolation(f"malformed word about a twin: {exc}") from exc
