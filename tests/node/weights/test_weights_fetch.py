"""Weights from several peers at once, some of which die or lie."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from p2pinfer.errors import ModelNotFound
from p2pinfer.models.pieces.chunks import CHUNK_BYTES, recall_chunks
from p2pinfer.models.pieces.manifest import WeightFile
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.node.weights.config import WeightsConfig
from p2pinfer.node.weights.file_job import FAR_RUN, Source
from p2pinfer.node.weights.weights_fetch import WeightsFetch

from ..memory import MemoryNetwork
from .givers import ALL, give, holdings, write_file

LIMIT_S = 60.0


@asynccontextmanager
async def open_network() -> AsyncGenerator[MemoryNetwork]:
    with trio.fail_after(LIMIT_S):
        async with open_nursery() as nursery:
            yield MemoryNetwork(nursery)


def taker(
    network: MemoryNetwork,
    peers: Sequence[str],
    cache: Path,
    config: WeightsConfig = ALL,
    told: list[str] | None = None,
) -> WeightsFetch:
    """Somebody who has nothing, and puts the peers that lie into `told`."""

    def on_lie(peer_id: str, why: str, is_certain: bool) -> None:
        if told is not None:
            told.append(peer_id)

    async def find() -> list[Source]:
        await trio.lowlevel.checkpoint()
        return [Source(peer_id) for peer_id in peers]

    return WeightsFetch(network.host("taker"), config, cache / "taker", find, on_lie)


def content_of(folder: Path, file: WeightFile) -> bytes:
    return (folder / file.name).read_bytes()


async def test_a_file_comes_from_two_peers_at_once(tmp_path: Path) -> None:
    file = write_file(tmp_path / "held")
    async with open_network() as network:
        for name in ("a", "b"):
            give(network, name, holdings(tmp_path / "held", file), tmp_path)
        fetch = taker(network, ("a", "b", "nobody"), tmp_path)
        await fetch.bring([file], tmp_path / "to")
    assert content_of(tmp_path / "to", file) == content_of(tmp_path / "held", file)
    assert fetch.brought.bytes.keys() == {"a", "b"} and not fetch.brought.liars
    assert sum(fetch.brought.bytes.values()) == file.size
    assert recall_chunks(file.sha256, tmp_path / "taker") is not None  # so it can be given away at once


@pytest.mark.parametrize("dies_at", [1, 3])
async def test_one_peer_dies_and_the_other_lies_and_the_file_is_right(tmp_path: Path, dies_at: int) -> None:
    """Whoever lies about a range is named, and what is left is taken from it all the same, checked."""
    file = write_file(tmp_path / "held", chunks=12.5)
    async with open_network() as network:
        mortal = give(network, "mortal", holdings(tmp_path / "held", file), tmp_path)
        liar = give(network, "liar", holdings(tmp_path / "held", file), tmp_path)

        async def die(index: int) -> None:
            if len(mortal.sent) >= dies_at and "mortal" in network.hosts:
                await network.kill("mortal")

        mortal.before = die
        lies = [2]

        def alter(index: int, content: bytes) -> bytes:
            if lies and index % 2:
                lies.pop()
                return bytes(len(content))
            return content

        liar.alter = alter
        told: list[str] = []
        fetch = taker(network, ("mortal", "liar"), tmp_path, told=told)
        await fetch.bring([file], tmp_path / "to")
    assert content_of(tmp_path / "to", file) == content_of(tmp_path / "held", file)
    assert fetch.brought.liars.keys() == {"liar"} == {*told}
    assert "chunk" in fetch.brought.liars["liar"] and file.name in fetch.brought.liars["liar"]


async def test_a_range_that_one_peer_lies_about_comes_from_the_other(tmp_path: Path) -> None:
    file = write_file(tmp_path / "held")
    async with open_network() as network:
        give(network, "honest", holdings(tmp_path / "held", file), tmp_path)
        liar = give(network, "liar", holdings(tmp_path / "held", file), tmp_path)
        liar.alter = lambda index, content: content[:-1] + bytes([content[-1] ^ 1])
        fetch = taker(network, ("liar", "honest"), tmp_path)
        await fetch.bring([file], tmp_path / "to")
    assert content_of(tmp_path / "to", file) == content_of(tmp_path / "held", file)
    assert fetch.brought.liars.keys() == {"liar"} and fetch.brought.bytes.keys() == {"honest"}


@pytest.mark.parametrize("liars", [1, 3])
async def test_false_lists_of_chunks_show_when_the_file_is_whole(tmp_path: Path, liars: int) -> None:
    """Whoever gave the list is named, however many agree on it, and nobody else."""
    file, false = write_file(tmp_path / "held"), write_file(tmp_path / "false")
    async with open_network() as network:
        give(network, "honest", holdings(tmp_path / "held", file), tmp_path)
        names = [f"liar-{index}" for index in range(liars)]
        for name in names:
            give(network, name, holdings(tmp_path / "false", false), tmp_path, claims=file)
        fetch = taker(network, (*names, "honest"), tmp_path)
        await fetch.bring([file], tmp_path / "to")
    assert content_of(tmp_path / "to", file) == content_of(tmp_path / "held", file)
    assert set(fetch.brought.liars) <= set(names)
    assert liars == 1 or set(fetch.brought.liars) == set(names)


async def test_nobody_else_than_liars_is_an_error_that_names_them(tmp_path: Path) -> None:
    file = write_file(tmp_path / "held", chunks=2)
    async with open_network() as network:
        liar = give(network, "liar", holdings(tmp_path / "held", file), tmp_path)
        liar.alter = lambda index, content: bytes(len(content))
        fetch = taker(network, ("liar",), tmp_path, replace(ALL, patience_s=0.1))
        with pytest.raises(ModelNotFound, match="liar sent something else as chunk"):
            await fetch.bring([file], tmp_path / "to")
    assert not (tmp_path / "to" / file.name).exists()


async def test_a_download_goes_on_where_it_ended(tmp_path: Path) -> None:
    file = write_file(tmp_path / "held", chunks=8)
    async with open_network() as network:
        giver = give(network, "giver", holdings(tmp_path / "held", file), tmp_path)

        async def die(index: int) -> None:
            if len(giver.sent) >= 5:
                await network.kill("giver")

        giver.before = die
        first = taker(network, ("giver",), tmp_path, replace(ALL, patience_s=0.1))
        with pytest.raises(ModelNotFound, match="what has come is kept"):
            await first.bring([file], tmp_path / "to")
        again = give(network, "again", holdings(tmp_path / "held", file), tmp_path)
        second = taker(network, ("again",), tmp_path)
        await second.bring([file], tmp_path / "to")
    assert content_of(tmp_path / "to", file) == content_of(tmp_path / "held", file)
    assert second.brought.resumed_bytes >= 3 * CHUNK_BYTES
    assert second.brought.resumed_bytes + second.brought.bytes["again"] == file.size
    assert len(again.sent) <= 5


async def test_peers_nearby_come_first(tmp_path: Path) -> None:
    file = write_file(tmp_path / "held")
    async with open_network() as network:
        network.addresses |= {"near": "192.168.1.7", "far": "198.51.100.7", "taker": "192.168.1.9"}
        for name in ("far", "near"):
            give(network, name, holdings(tmp_path / "held", file), tmp_path)
        fetch = taker(network, ("far", "near"), tmp_path)
        await fetch.bring([file], tmp_path / "to")
        assert fetch.brought.bytes.keys() == {"near"}
        network.addresses["near"] = "198.51.100.9"
        with pytest.raises(ModelNotFound):
            await taker(network, ("far", "near"), tmp_path).bring([file], tmp_path / "else", near_only=True)


async def test_what_a_peer_does_not_give_away_is_not_given(tmp_path: Path) -> None:
    file = write_file(tmp_path / "held", chunks=1)
    config = WeightsConfig(share="open", patience_s=0.1)
    async with open_network() as network:
        give(network, "private", holdings(tmp_path / "held", file, is_open=False), tmp_path, config)
        with pytest.raises(ModelNotFound, match="no peer gives"):
            await taker(network, ("private",), tmp_path, config).bring([file], tmp_path / "to")


async def test_nothing_goes_through_a_relay(tmp_path: Path) -> None:
    file = write_file(tmp_path / "held", chunks=1)
    async with open_network() as network:
        giver = give(network, "giver", holdings(tmp_path / "held", file), tmp_path)
        network.relayed.add(("taker", "giver"))
        with pytest.raises(ModelNotFound):
            await taker(network, ("giver",), tmp_path, replace(ALL, patience_s=0.1)).bring(
                [file], tmp_path / "to"
            )
        assert not giver.sent


async def test_a_file_that_changed_under_a_peer_is_no_lie(tmp_path: Path) -> None:
    """A folder that is written anew makes nobody a liar: each chunk is hashed before it is sent."""
    file = write_file(tmp_path / "held")
    async with open_network() as network:
        give(network, "first", holdings(tmp_path / "held", file), tmp_path)
        fetch = taker(network, ("first",), tmp_path, replace(ALL, patience_s=0.1))
        await fetch.bring([file], tmp_path / "to")
        altered = bytearray(content_of(tmp_path / "held", file))
        altered[FAR_RUN * CHUNK_BYTES + 7] ^= 1
        (tmp_path / "held" / file.name).write_bytes(altered)
        again = taker(network, ("first",), tmp_path, replace(ALL, patience_s=0.1))
        with pytest.raises(ModelNotFound):
            await again.bring([file], tmp_path / "else")
    assert not again.brought.liars


@pytest.mark.parametrize("limits", [{"upload_bytes_per_s": 8 << 20}, {"download_bytes_per_s": 8 << 20}])
async def test_bytes_are_limited_at_both_ends(tmp_path: Path, limits: dict[str, int]) -> None:
    file = write_file(tmp_path / "held", chunks=8)
    async with open_network() as network:
        config = replace(ALL, **limits)  # type: ignore[arg-type] # integers all of them
        give(network, "giver", holdings(tmp_path / "held", file), tmp_path, config)
        began = trio.current_time()
        await taker(network, ("giver",), tmp_path, config).bring([file], tmp_path / "to")
        assert trio.current_time() - began > 0.35  # four chunks at once, the others in half a second
