"""What a peer that asks for weights is given, and what it is not."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from blake3 import blake3

from p2pinfer.errors import PeerError, PeerRefused
from p2pinfer.models.pieces.manifest import SmallFile
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.node.weights import weights_server
from p2pinfer.node.weights.asking import Asking, Come, open_asking
from p2pinfer.node.weights.config import WeightsConfig
from p2pinfer.node.weights.file_job import Source
from p2pinfer.node.weights.weights_server import is_near_address

from ..memory import MemoryNetwork
from .givers import ALL, Giver, give, holdings, write_file


@asynccontextmanager
async def asked(
    folder: Path, config: WeightsConfig = ALL, *, networks: list[MemoryNetwork] | None = None
) -> AsyncGenerator[tuple[Giver, Asking, bytes]]:
    """A giver, a question to it, and the hash of its file."""
    file = write_file(folder / "held", chunks=2.5)
    (folder / "held" / "config.json").write_bytes(b"{}")
    with trio.fail_after(60):
        async with open_nursery() as nursery:
            network = MemoryNetwork(nursery)
            if networks is not None:
                networks.append(network)
            held = holdings(folder / "held", file)
            text = SmallFile("config.json", 2, blake3(b"{}").hexdigest())
            held = replace(held, manifest=replace(held.manifest, texts=(text,)))
            giver = give(network, "giver", held, folder, config)
            async with open_asking(network.host("asker"), Source("giver")) as asking:
                yield giver, asking, bytes.fromhex(file.sha256)


async def test_a_model_is_described_and_its_small_files_are_given(tmp_path: Path) -> None:
    async with asked(tmp_path) as (giver, asking, sha256):
        [revision] = giver._models  # pyright: ignore[reportPrivateUsage]
        manifest, held = await asking.manifest(revision)
        assert held == {"model.safetensors"} and manifest.weights[0].sha256 == sha256.hex()
        assert await asking.small(manifest.texts[0]) == b"{}"
        with pytest.raises(PeerRefused):
            await asking.manifest("0" * 32)
        with pytest.raises(PeerRefused):
            await asking.small(SmallFile("config.json", 2, "0" * 64))
        (tmp_path / "held" / "config.json").unlink()
        with pytest.raises(PeerRefused):
            await asking.small(manifest.texts[0])


async def test_chunks_are_asked_for_after_their_list(tmp_path: Path) -> None:
    async with asked(tmp_path) as (_, asking, sha256):
        await asking.send_get(sha256, 0, 1)
        with pytest.raises(PeerRefused, match="unknown"):
            await asking.begin(1)
        chunks = await asking.chunks(sha256)
        assert chunks.is_whole and len(chunks) == 3
        await asking.send_get(sha256, 2, 1)
        await asking.begin(chunks.bytes_of(2))
        assert chunks.has(2, await asking.content(chunks.bytes_of(2)))
        for first, count in ((2, 2), (3, 1)):  # behind the end
            await asking.send_get(sha256, first, count)
            with pytest.raises(PeerRefused, match="unknown"):
                await asking.begin(1)
        with pytest.raises(PeerRefused):
            await asking.chunks(bytes(32))
        assert not (await asking.door()).port  # a memory stream has no address to open one at


async def test_who_asks_for_a_list_that_is_being_made_is_to_come_again(tmp_path: Path) -> None:
    async with asked(tmp_path) as (giver, asking, sha256):
        async with giver._hashing:  # pyright: ignore[reportPrivateUsage]
            with pytest.raises(Come):
                await asking.chunks(sha256)
        assert await asking.chunks(sha256)


async def test_a_file_that_changed_is_given_away_no_more(tmp_path: Path) -> None:
    async with asked(tmp_path) as (_, asking, sha256):
        (tmp_path / "held" / "model.safetensors").write_bytes(b"something else")
        with pytest.raises(PeerRefused, match="changed"):
            await asking.chunks(sha256)
        with pytest.raises(PeerRefused, match="unknown"):
            await asking.chunks(sha256)


@pytest.mark.parametrize(
    ("share", "is_open", "given"),
    [("open", True, True), ("open", False, False), ("all", False, True), ("none", True, False)],
)
async def test_settings_say_which_models_are_given(
    tmp_path: Path, share: str, is_open: bool, given: bool
) -> None:
    file = write_file(tmp_path / "held", chunks=0.5)
    async with open_nursery() as nursery:
        network = MemoryNetwork(nursery)
        held = holdings(tmp_path / "held", file, is_open=is_open)
        give(network, "giver", held, tmp_path, replace(ALL, share=share))
        async with open_asking(network.host("asker"), Source("giver")) as asking:
            if given:
                assert await asking.chunks(bytes.fromhex(file.sha256))
            else:
                with pytest.raises(PeerRefused):
                    await asking.chunks(bytes.fromhex(file.sha256))


async def test_one_peer_has_four_streams_and_asks_so_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks: list[MemoryNetwork] = []
    async with asked(tmp_path, networks=networks) as (_, asking, sha256):
        host = networks[0].hosts["asker"]
        refused = 0
        async with AsyncExitStack() as stack:
            more = [await stack.enter_async_context(open_asking(host, Source("giver"))) for _ in range(4)]
            for each in (asking, *more):
                try:
                    await each.chunks(sha256)
                except PeerError:
                    refused += 1
        assert refused == 1
    monkeypatch.setattr(weights_server, "ASKS_AT_ONCE", 2)
    monkeypatch.setattr(weights_server, "ASKS_PER_S", 0.001)
    async with asked(tmp_path / "more") as (_, asking, sha256):
        for _ in range(2):
            await asking.chunks(sha256)
        with pytest.raises(PeerError):
            await asking.chunks(sha256)


@pytest.mark.parametrize(
    ("ip", "near"),
    [
        ("127.0.0.1", True),
        ("192.168.3.4", True),
        ("10.1.2.3", True),
        ("::1", True),
        ("fd00::1", True),
        ("fe80::1", True),
        ("::ffff:192.168.3.4", True),
        ("100.64.1.2", False),
        ("8.8.8.8", False),
        ("203.0.113.7", False),
        ("2001:db8::1", False),
        ("nonsense", False),
    ],
)
def test_near_is_this_machine_or_a_network_of_ones_own(ip: str, near: bool) -> None:
    assert is_near_address((ip, 4001)) is near
    assert not is_near_address(None)


@pytest.mark.parametrize(
    "setting", [{"share": "some"}, {"upload_bytes_per_s": -1}, {"uploads": 0}, {"patience_s": 0.0}]
)
def test_settings_out_of_bounds_are_refused(setting: dict[str, object]) -> None:
    with pytest.raises(Exception, match=r"choose one of|must be"):
        WeightsConfig(**setting)  # type: ignore[arg-type] # what a user may write


async def test_zero_bytes_a_second_is_nothing_at_all(tmp_path: Path) -> None:
    async with asked(tmp_path, replace(ALL, upload_bytes_per_s=0)) as (_, asking, sha256):
        with pytest.raises(PeerError):
            await asking.chunks(sha256)
