"""Answers to peers that ask for weights.

A peer gets only contents whose hash it names, of models that this node gives away, and each chunk is hashed
before it is sent: a folder may be rewritten under a running process, and what is sent counts as this node's
word. Reading and hashing is done in threads. Answers take turns and their bytes a budget (`Answers`): one for
the local network, one for everybody else. Nothing goes through relays, which others pay for.

Whoever asks has this process hash a file that it has not hashed in chunks yet. That is done once for each
file, one at a time, and who asks meanwhile is told to come again.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Final

import trio

from p2pinfer.errors import CheckpointError, ModelChanged, PeerVanished, ProtocolViolation
from p2pinfer.models.pieces.chunks import CHUNK_BYTES, ChunkList, ChunkReader, list_chunks, recall_chunks
from p2pinfer.models.pieces.manifest import Holdings
from p2pinfer.node.concurrency.rate_limit import RateLimit
from p2pinfer.node.host.answers import Allowance, Answer, AnswerLimits, Answers
from p2pinfer.node.host.home_networks import plain
from p2pinfer.node.host.network import Network
from p2pinfer.node.transport.peer_stream import PeerStream

from .config import WeightsConfig
from .frames import Frames
from .messages import (
    MAX_REQUEST_BYTES,
    WEIGHTS_PROTOCOL,
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
    Weight,
    Words,
    decode_request,
    encode,
)
from .plain_copy import TOKEN_BYTES, Budget, PlainSender, open_door

IDLE_S: Final = 30.0  # that a peer may say nothing between two requests
LATER_S: Final = 1.0  # after which who asks for a list that is being made is to come again
ASKS_PER_S: Final = 50.0  # requests of one peer: a run of chunks each, or a small file
ASKS_AT_ONCE: Final = 200


class WeightsServer:
    """Gives other peers what this process holds of models. One for all models of a process."""

    def __init__(
        self,
        host: Network,
        config: WeightsConfig,
        cache_dir: Path,
        *,
        is_private: bool = False,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        """`is_private` says that this is a swarm with a key, in which nothing travels in the clear."""
        self._host = host
        self._config = config
        self._cache_dir = cache_dir
        self._clock = clock
        self._near, self._far = (
            Answers(_limits(rate, config.uploads)) if rate else None
            for rate in (config.lan_bytes_per_s, config.upload_bytes_per_s)
        )
        self._asks = RateLimit(ASKS_PER_S, ASKS_AT_ONCE)
        self._models: dict[str, Holdings] = {}
        self._files: dict[bytes, Path] = {}  # weight files by SHA-256
        self._texts: dict[bytes, Path] = {}  # small files by blake3
        self._lists: dict[bytes, ChunkList] = {}
        self._hashing = trio.Lock()
        self._opens_doors = config.plain and config.lan_bytes_per_s > 0 and not is_private
        self._budget = Budget(config.lan_bytes_per_s)
        self._threads = trio.CapacityLimiter(config.uploads)

    def register(self) -> None:
        """Answer from now on."""
        self._host.serve(WEIGHTS_PROTOCOL, self.answer)

    def unregister(self) -> None:
        """Answer no more."""
        self._host.stop_serving(WEIGHTS_PROTOCOL)

    def offer(self, holdings: Holdings) -> None:
        """Give away what is here of a model, if the settings allow it."""
        allowed = self._config.share == "all" or (self._config.share == "open" and holdings.is_open)
        if not allowed:
            return
        manifest = holdings.manifest
        self._models[manifest.revision] = holdings
        for weight in manifest.weights:
            if (path := holdings.paths.get(weight.name)) is not None:
                self._files[bytes.fromhex(weight.sha256)] = path
        for text in manifest.texts:
            self._texts[bytes.fromhex(text.digest)] = holdings.folder / text.name

    async def answer(self, stream: PeerStream) -> None:
        """Answer the requests of one stream until the peer ends it."""
        answers = self._near if is_near(stream) else self._far
        if answers is None:
            return
        with answers.turn(stream) as answer:
            frames = Frames(stream)
            while True:
                content: bytes | None = None
                with trio.move_on_after(IDLE_S):
                    content = await frames.value(MAX_REQUEST_BYTES)
                if content is None:
                    return
                if not self._asks.take(stream.peer_id, self._clock()):
                    raise ProtocolViolation("asks for weights too often", stream.peer_id)
                await self._reply(stream, answer, decode_request(content))

    async def _reply(self, stream: PeerStream, answer: Answer, request: Request) -> None:
        match request:
            case Find(revision):
                await _send(answer, encode(self._found(revision)))
            case Chunks(sha256):
                await _send(answer, encode(await self._listed(sha256)))
            case Get(sha256, first, count):
                await self._send_chunks(stream, answer, sha256, first, count)
            case Small(digest):
                await self._send_small(answer, digest)
            case Knock():
                await self._open_door(stream, answer)

    def _found(self, revision: str) -> Found | Denied:
        if (holdings := self._models.get(revision)) is None:
            return Denied("unknown", 0.0)
        manifest = holdings.manifest
        return Found(
            manifest.model[:256],
            manifest.numbers,
            tuple(
                Weight(each.name, each.size, bytes.fromhex(each.sha256), each.name in holdings.paths)
                for each in manifest.weights
            ),
            tuple(Words(each.name, each.size, bytes.fromhex(each.digest)) for each in manifest.texts),
        )

    async def _listed(self, sha256: bytes) -> Listed | Denied:
        if sha256 not in self._files:
            return Denied("unknown", 0.0)
        known = self._lists.get(sha256) or recall_chunks(sha256.hex(), self._cache_dir)
        if known is None:
            if self._hashing.locked():
                return Denied("later", LATER_S)
            async with self._hashing:
                try:
                    known = await self._make_list(sha256)
                except (ModelChanged, CheckpointError):
                    return self._changed(sha256)
        self._lists[sha256] = known
        return Listed(known.size, known.digests)

    async def _make_list(self, sha256: bytes) -> ChunkList:
        make = partial(list_chunks, self._files[sha256], sha256.hex(), self._cache_dir)
        return await trio.to_thread.run_sync(make, abandon_on_cancel=True)

    def _changed(self, sha256: bytes) -> Denied:
        """Give a file away no more: it is not what it was."""
        self._files.pop(sha256, None)
        self._lists.pop(sha256, None)
        return Denied("changed", 0.0)

    async def _send_chunks(
        self, stream: PeerStream, answer: Answer, sha256: bytes, first: int, count: int
    ) -> None:
        chunks, path = self._lists.get(sha256), self._files.get(sha256)
        if chunks is None or path is None or first + count > len(chunks):
            await _send(answer, encode(Denied("unknown", 0.0)))
            return
        if stream.is_relayed:
            await _send(answer, encode(Denied("relayed", 0.0)))
            return
        size = sum(map(chunks.bytes_of, range(first, first + count)))
        try:
            reader = ChunkReader(path, chunks)
        except ModelChanged:
            await _send(answer, encode(self._changed(sha256)))
            return
        with closing(reader):
            # A chunk before the promise of all: a file that has changed mostly shows by the first.
            for index in range(first, first + count):
                try:
                    content = await trio.to_thread.run_sync(reader.read, index)
                except ModelChanged as exc:
                    denied = self._changed(sha256)
                    if index > first:
                        raise PeerVanished(f"cannot give what it promised: {exc}", stream.peer_id) from exc
                    await _send(answer, encode(denied))
                    return
                if index == first:
                    await _send(answer, encode(Sending(size)))
                await answer.send(len(content), (content,))

    async def _send_small(self, answer: Answer, digest: bytes) -> None:
        content: bytes | None = None
        if (path := self._texts.get(digest)) is not None:
            with suppress(OSError):
                content = await trio.to_thread.run_sync(path.read_bytes)
        if content is None:
            await _send(answer, encode(Denied("unknown", 0.0)))
            return
        head = encode(Sending(len(content)))
        await answer.send(len(head) + len(content), (head, content))

    async def _open_door(self, stream: PeerStream, answer: Answer) -> None:
        """Send chunks over a plain connection, for as long as the peer keeps it."""
        listener = None
        if self._opens_doors and is_near(stream) and stream.local_ip:
            with suppress(OSError):
                listener = open_door(stream.local_ip)
        if listener is None:
            await _send(answer, encode(Door(0, b"")))
            return
        token = secrets.token_bytes(TOKEN_BYTES)
        sender = PlainSender(listener, token, self._file, self._budget)
        try:
            await _send(answer, encode(Door(listener.getsockname()[1], token)))
            await trio.to_thread.run_sync(sender.run, abandon_on_cancel=True, limiter=self._threads)
        finally:
            sender.close()

    def _file(self, sha256: bytes) -> tuple[Path, ChunkList] | None:
        path, chunks = self._files.get(sha256), self._lists.get(sha256)
        return None if path is None or chunks is None else (path, chunks)


def is_near(stream: PeerStream) -> bool:
    """True if the peer is on this machine or in this network: nobody's line is paid for."""
    return is_near_address(stream.remote_address)


def is_near_address(remote: tuple[str, int] | None) -> bool:
    """The same of an address; False without one."""
    address = None if remote is None else plain(remote[0])
    if address is None:
        return False
    return address.is_loopback or address.is_link_local or any(address in network for network in _LOCAL)


# Not 100.64.0.0/10, behind which a provider has its customers.
_LOCAL: Final = tuple(
    map(ipaddress.ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"))
)


async def _send(answer: Answer, content: bytes) -> None:
    await answer.send(len(content), (content,))


def _limits(bytes_per_s: int, uploads: int) -> AnswerLimits:
    rate, burst = bytes_per_s, max(4 * CHUNK_BYTES, bytes_per_s // 4)
    return AnswerLimits(
        peer=Allowance(4, burst, rate),
        # A peer may hold no more than is left to others of its range, and so on: see `Answers`.
        address_range=Allowance(max(8, uploads // 2), burst, rate),
        everybody=Allowance(max(16, uploads), burst, rate),
    )
