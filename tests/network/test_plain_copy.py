"""Weights between real hosts on loopback, over plain connections and over streams."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pinfer.models.pieces.chunks import CHUNK_BYTES, ChunkList, ChunkReader
from p2pinfer.models.pieces.manifest import Holdings, Manifest, WeightFile
from p2pinfer.node.weights import plain_copy
from p2pinfer.node.weights.config import WeightsConfig
from p2pinfer.node.weights.file_job import Source
from p2pinfer.node.weights.plain_copy import TOKEN_BYTES, Budget, PlainReceiver, PlainSender, open_door
from p2pinfer.node.weights.weights_fetch import WeightsFetch
from p2pinfer.node.weights.weights_server import WeightsServer

from .support import StartHost

ALL = WeightsConfig(share="all", lan_bytes_per_s=1 << 40, patience_s=20.0)


def _ignore(index: int, content: memoryview) -> None: ...


class Model:
    """A file, two hosts, and what was copied over plain connections."""

    def __init__(self, folder: Path) -> None:
        content = os.urandom(6 * CHUNK_BYTES + 99)
        (folder / "held").mkdir()
        self.folder = folder
        self.path = folder / "held" / "model.safetensors"
        self.path.write_bytes(content)
        self.content = content
        self.file = WeightFile(self.path.name, len(content), hashlib.sha256(content).hexdigest())

    async def bring(self, start_host: StartHost, *, is_private: bool = False) -> WeightsFetch:
        giver, taker = await start_host(), await start_host()
        server = WeightsServer(giver, ALL, self.folder / "cache", is_private=is_private)
        manifest = Manifest("m", "{}", (self.file,), ())
        server.offer(Holdings(manifest, {self.path.name: self.path}, self.path.parent))
        server.register()

        async def find() -> list[Source]:
            await trio.lowlevel.checkpoint()
            return [Source(giver.peer_id, giver.addrs)]

        await taker.connect(giver.peer_id, giver.addrs)
        fetch = WeightsFetch(taker, ALL, self.folder / "taken", find, is_private=is_private)
        await fetch.bring([self.file], self.folder / "to")
        assert (self.folder / "to" / self.path.name).read_bytes() == self.content
        return fetch


@pytest.fixture
def plain_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What each plain connection has sent."""
    sent: list[int] = []
    run = PlainSender.run

    def counted(self: PlainSender) -> int:
        sent.append(run(self))
        return sent[-1]

    monkeypatch.setattr(PlainSender, "run", counted)
    return sent


async def test_peers_of_one_network_copy_without_encryption(
    start_host: StartHost, tmp_path: Path, plain_bytes: list[int]
) -> None:
    model = Model(tmp_path)
    fetch = await model.bring(start_host)
    assert sum(fetch.brought.bytes.values()) == model.file.size and not fetch.brought.liars
    with trio.fail_after(30):
        while sum(plain_bytes) < model.file.size:  # the senders end a moment later
            await trio.sleep(0.01)


async def test_a_private_swarm_has_no_plain_connections(
    start_host: StartHost, tmp_path: Path, plain_bytes: list[int]
) -> None:
    await Model(tmp_path).bring(start_host, is_private=True)
    assert not plain_bytes


async def test_what_is_altered_on_its_way_makes_nobody_a_liar(
    start_host: StartHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who can change a plain copy must not be able to have its sender banned."""

    class Tampered(ChunkReader):
        def read(self, index: int) -> memoryview:
            content = super().read(index)
            if index == 3:
                content[5] ^= 1
            return content

    monkeypatch.setattr(plain_copy, "ChunkReader", Tampered)
    fetch = await Model(tmp_path).bring(start_host)
    assert not fetch.brought.liars


@pytest.fixture
def opened(tmp_path: Path) -> tuple[PlainSender, socket.socket, bytes, Model]:
    model = Model(tmp_path)
    from p2pinfer.models.pieces.chunks import list_chunks

    chunks = list_chunks(model.path, model.file.sha256, tmp_path)
    sha256, token = bytes.fromhex(model.file.sha256), os.urandom(TOKEN_BYTES)

    def find(asked: bytes) -> tuple[Path, ChunkList] | None:
        return (model.path, chunks) if asked == sha256 else None

    listener = open_door("127.0.0.1")
    return PlainSender(listener, token, find, Budget(0)), listener, token, model


async def test_a_door_opens_for_its_token_alone(
    opened: tuple[PlainSender, socket.socket, bytes, Model], nursery: trio.Nursery
) -> None:
    sender, listener, token, model = opened
    address: tuple[str, int] = listener.getsockname()
    nursery.start_soon(trio.to_thread.run_sync, sender.run)

    def ask(shown: bytes, *asked: Any) -> bytes:
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(shown)
            connection.sendall(b"".join(plain_copy._ASK.pack(*each) for each in asked))  # pyright: ignore[reportPrivateUsage]
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while received := connection.recv(1 << 16):
                answer += received
            return answer

    sha256 = bytes.fromhex(model.file.sha256)
    run: Callable[..., Any] = trio.to_thread.run_sync
    try:
        wrong = await run(ask, bytes(TOKEN_BYTES), (sha256, 0, 1))
    except (
        OSError
    ):  # what was sent behind a wrong token is not read, and nobody may be there to be told its end
        wrong = b""
    assert wrong == b""
    answer = await run(
        ask, token, (bytes(32), 0, 1), (sha256, 6, 2), (sha256, 0, 65), (sha256, 0, 0), (sha256, 6, 1)
    )
    assert answer == bytes(16) + (99).to_bytes(4, "big") + model.content[-99:]
    with pytest.raises(OSError, match=r"refused|reset"):  # it was for one connection
        await run(ask, token)


async def test_a_receiver_hears_of_chunks_that_are_not_given(
    opened: tuple[PlainSender, socket.socket, bytes, Model], nursery: trio.Nursery
) -> None:
    from p2pinfer.errors import PeerVanished

    sender, listener, token, model = opened
    nursery.start_soon(trio.to_thread.run_sync, sender.run)
    receiver = PlainReceiver(listener.getsockname(), token)
    await trio.to_thread.run_sync(receiver.connect)
    receiver.ask(bytes(32), 0, 1)
    chunks = ChunkList(model.file.size, bytes(7 * 32))
    with pytest.raises(PeerVanished, match="no such chunks"):
        await trio.to_thread.run_sync(receiver.receive, chunks, 0, 1, _ignore)
    sender.close()
    with pytest.raises(PeerVanished):
        await trio.to_thread.run_sync(receiver.receive, chunks, 0, 1, _ignore)
    receiver.close()
    receiver.close()


def test_a_budget_lets_a_tenth_of_a_second_go_at_once() -> None:
    budget = Budget(1e6)
    assert budget.due_s(100_000) == 0
    assert 0 <= budget.due_s(500_000) <= 0.01
    assert 0.4 < budget.due_s(1) <= 0.5
    assert Budget(0).due_s(1 << 40) == 0
