"""Questions about weights to one peer, over a stream of its own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, asynccontextmanager, contextmanager

import trio
from blake3 import blake3

from p2pinfer.errors import PeerRefused, PeerVanished, ProtocolViolation
from p2pinfer.models.pieces.chunks import ChunkList
from p2pinfer.models.pieces.manifest import Manifest, SmallFile
from p2pinfer.node.host.network import Network
from p2pinfer.node.transport.peer_stream import PeerStream

from .file_job import Source
from .frames import Frames
from .messages import (
    MAX_ANSWER_BYTES,
    WEIGHTS_PROTOCOL,
    Answer,
    Chunks,
    Denied,
    Door,
    Find,
    Found,
    Get,
    Knock,
    Listed,
    Request,
    Sending,
    Small,
    chunks_of,
    decode_answer,
    encode,
    manifest_of,
)
from .weights_server import is_near

ASK_S = 15.0  # for an answer that is not contents, and for a stream
SMALL_S = 30.0  # for a small file
LEAST_BYTES_PER_S = 16_384  # that contents have to come at, beyond that


class Come(PeerRefused):
    """The peer is making what was asked for, and wants to be asked again."""


class Asking:
    """A stream on which a peer answers about weights. Made by `open_asking`."""

    def __init__(self, stream: PeerStream) -> None:
        self.stream = stream
        self.peer_id = stream.peer_id
        self._frames = Frames(stream)

    async def manifest(self, revision: str) -> tuple[Manifest, frozenset[str]]:
        """Contents of a model, proved by its revision, and the weight files that the peer has."""
        answer = await self._ask(Find(revision))
        if not isinstance(answer, Found):
            raise self._strange(answer)
        return manifest_of(answer, revision), frozenset(each.name for each in answer.weights if each.held)

    async def chunks(self, sha256: bytes) -> ChunkList:
        """The peer's word on the chunks of a file."""
        answer = await self._ask(Chunks(sha256))
        if not isinstance(answer, Listed):
            raise self._strange(answer)
        return chunks_of(answer)

    async def small(self, file: SmallFile) -> bytes:
        """A small file, checked."""
        with self._within(SMALL_S + file.size / LEAST_BYTES_PER_S):
            answer = await self._ask(Small(bytes.fromhex(file.digest)))
            if not isinstance(answer, Sending) or answer.size != file.size:
                raise self._strange(answer)
            content = await self._frames.content(file.size)
        if blake3(content).hexdigest() != file.digest:
            raise ProtocolViolation(f"sent something else as {file.name}", self.peer_id)
        return content

    async def door(self) -> Door:
        """The port for plain copies; 0 if there is none."""
        answer = await self._ask(Knock())
        return answer if isinstance(answer, Door) else Door(0, b"")

    async def send_get(self, sha256: bytes, first: int, count: int) -> None:
        """Ask for chunks, whose contents follow in `begin` and `content`; some requests may be under way."""
        await self._send(Get(sha256, first, count))

    async def begin(self, size: int) -> None:
        """Read the head of the next contents, which have to be so long."""
        with self._within(ASK_S):
            answer = await self._answer()
        if not isinstance(answer, Sending) or answer.size != size:
            raise self._strange(answer)

    async def content(self, size: int) -> bytes:
        """The next bytes of the contents, unchecked."""
        with self._within(ASK_S + size / LEAST_BYTES_PER_S):
            return await self._frames.content(size)

    async def _ask(self, request: Request) -> Answer:
        with self._within(ASK_S):
            await self._send(request)
            return await self._answer()

    async def _send(self, request: Request) -> None:
        try:
            await self.stream.send_all(encode(request))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise PeerVanished(f"peer {self.peer_id} is gone", self.peer_id) from exc

    async def _answer(self) -> Answer:
        content = await self._frames.value(MAX_ANSWER_BYTES)
        if content is None:
            raise PeerVanished(f"peer {self.peer_id} ended its answers about weights", self.peer_id)
        return decode_answer(content)

    def _strange(self, answer: Answer) -> PeerRefused | ProtocolViolation:
        if isinstance(answer, Denied):
            kind = Come if answer.code == "later" else PeerRefused
            return kind(f"peer {self.peer_id} has no such weights: {answer.code}", self.peer_id, answer.code)
        return ProtocolViolation("answers about weights with something else", self.peer_id)

    @contextmanager
    def _within(self, seconds: float) -> Generator[None]:
        try:
            with trio.fail_after(seconds):
                yield
        except trio.TooSlowError as exc:
            raise PeerVanished(f"peer {self.peer_id} sends no weights", self.peer_id) from exc


@asynccontextmanager
async def open_asking(host: Network, source: Source) -> AsyncGenerator[Asking]:
    """A stream to `source`, of which it also notes if it is nearby.

    Raises:
        PeerError: It cannot be reached, or does not know the protocol.
    """
    async with aclosing(
        await host.open_stream(source.peer_id, WEIGHTS_PROTOCOL, source.addrs, hearsay=True)
    ) as stream:
        source.is_near = is_near(stream) and not stream.is_relayed
        try:
            yield Asking(stream)
        except ProtocolViolation as exc:
            exc.peer_id = source.peer_id
            raise
