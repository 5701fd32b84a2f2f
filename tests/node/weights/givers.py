"""Peers that give a model away, honestly or not."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from p2pinfer.models.pieces.chunks import CHUNK_BYTES, list_chunks
from p2pinfer.models.pieces.manifest import Holdings, Manifest, WeightFile
from p2pinfer.node.host.answers import Answer
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.node.weights.config import WeightsConfig
from p2pinfer.node.weights.weights_server import WeightsServer

from ..memory import MemoryNetwork

ALL = WeightsConfig(share="all", upload_bytes_per_s=1 << 40, lan_bytes_per_s=1 << 40, patience_s=3.0)


def write_file(folder: Path, name: str = "model.safetensors", chunks: float = 5.25) -> WeightFile:
    """A weight file of random bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    content = os.urandom(int(chunks * CHUNK_BYTES))
    (folder / name).write_bytes(content)
    return WeightFile(name, len(content), hashlib.sha256(content).hexdigest())


def holdings(folder: Path, *files: WeightFile, is_open: bool = True) -> Holdings:
    paths = {each.name: folder / each.name for each in files}
    return Holdings(Manifest("random", "{}", files, ()), paths, folder, is_open=is_open)


class Giver(WeightsServer):
    """A peer in memory, which may be dishonest.

    Attributes:
        alter: Given the index of a chunk and its content, what is sent in its place.
        before: Called before each chunk.
    """

    alter: Callable[[int, bytes], bytes] | None = None
    before: Callable[[int], Any] | None = None
    sent: list[int]

    async def _send_chunks(
        self, stream: PeerStream, answer: Answer, sha256: bytes, first: int, count: int
    ) -> None:
        await super()._send_chunks(stream, cast(Answer, _Altered(self, answer, first)), sha256, first, count)


class _Altered:
    """The answer of a giver, whose contents are altered on their way."""

    def __init__(self, giver: Giver, answer: Answer, first: int) -> None:
        self._giver, self._answer = giver, answer
        self._next: int | None = None  # what comes first is no chunk
        self._first = first

    async def send(self, size: int, pieces: Any) -> None:
        index, self._next = self._next, self._first if self._next is None else self._next + 1
        [content] = pieces
        if index is not None:
            if self._giver.before is not None:
                await self._giver.before(index)
            self._giver.sent.append(index)
            if self._giver.alter is not None:
                content = self._giver.alter(index, bytes(content))
        await self._answer.send(size, (content,))


def give(
    network: MemoryNetwork,
    peer_id: str,
    held: Holdings,
    cache: Path,
    config: WeightsConfig = ALL,
    *,
    claims: WeightFile | None = None,
) -> Giver:
    """A peer that gives a model away.

    Args:
        claims: The file that it says its first one is.
    """
    giver = Giver(network.host(peer_id), config, cache / peer_id)
    giver.sent = []
    giver.offer(held)
    if claims is not None:
        [(name, path)] = held.paths.items()
        false = next(each for each in held.manifest.weights if each.name == name)
        sha256 = bytes.fromhex(claims.sha256)
        giver._files[sha256] = path  # pyright: ignore[reportPrivateUsage] - what a liar would do
        giver._lists[sha256] = list_chunks(path, false.sha256, cache / peer_id)  # pyright: ignore[reportPrivateUsage]
    giver.register()
    return giver
