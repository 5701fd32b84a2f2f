"""A model that is found by its revision among the peers of a swarm."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from p2pinfer.errors import ModelNotFound
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.checkpoint.model_source import FolderSource
from p2pinfer.models.checkpoint.source import resolve_model
from p2pinfer.models.pieces.manifest import Holdings, SwarmName
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.weights.peer_source import PeerWeights
from p2pinfer.reputation.ledger import Ledger

from ..memory_swarm import MemorySwarm, open_memory_swarm
from .givers import ALL, Giver, give


class Swarm:
    """Peers that have the bundled model, and one that has not."""

    def __init__(self, swarm: MemorySwarm, folder: Path) -> None:
        self._swarm = swarm
        self._folder = folder
        self.revision = swarm.spec.revision
        source = FolderSource(Path(swarm.checkpoint.folder), cache_dir=folder / "held", is_open=True)
        self.holdings = source.holdings()

    def give(self, peer_id: str, holdings: Holdings | None = None) -> Giver:
        giver = give(self._swarm.network, peer_id, holdings or self.holdings, self._folder)
        if holdings is not None:  # which may be what no honest peer has
            giver._models[self.revision] = holdings  # pyright: ignore[reportPrivateUsage]
        self._swarm.announce(peer_id)
        return giver

    def taker(self, patience_s: float = 3.0) -> PeerWeights:
        return PeerWeights(
            self._swarm.member("taker"),
            self.revision,
            replace(ALL, patience_s=patience_s),
            self._folder / "taken",
            self._folder / "data",
        )


@asynccontextmanager
async def open_swarm(checkpoint: Checkpoint, folder: Path) -> AsyncGenerator[Swarm]:
    async with open_memory_swarm(checkpoint) as swarm:
        yield Swarm(swarm, folder)


async def test_a_revision_alone_brings_what_a_span_needs(checkpoint: Checkpoint, tmp_path: Path) -> None:
    async with open_swarm(checkpoint, tmp_path) as swarm:
        swarm.give("a")
        swarm.give("b")
        taker = swarm.taker()
        source = await taker.find(SwarmName(swarm.revision))
        assert source.spec == replace(checkpoint.spec, model=source.spec.model)
        assert source.spec.revision == swarm.revision
        missing = source.missing(BlockSpan(0, 2), embedding_and_head=False)
        assert 0 < len(missing.files) < len(swarm.holdings.manifest.weights)
        with pytest.raises(ModelNotFound, match="models pull"):
            source.fetch(BlockSpan(0, 2), embedding_and_head=False)
        await taker.bring(missing.files, missing.folder, label="fetching")
        found = source.fetch(BlockSpan(0, 2), embedding_and_head=False)
        name = "model.layers.1.mlp.up_proj.weight"
        assert found.read(name).equal(checkpoint.read(name))
        with pytest.raises(ModelNotFound, match="longer name"):
            source.fetch_words()
        again = resolve_model(f"swarm:{swarm.revision}", cache_dir=tmp_path / "taken")
        assert not again.missing(BlockSpan(0, 2), embedding_and_head=False).files


async def test_a_tokenizer_is_taken_only_as_the_name_says(checkpoint: Checkpoint, tmp_path: Path) -> None:
    async with open_swarm(checkpoint, tmp_path) as swarm:
        folder = tmp_path / "poisoned"
        shutil.copytree(swarm.holdings.folder, folder)
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "version": "2.0"}))
        swarm.give("poisoner", FolderSource(folder, cache_dir=tmp_path / "p", is_open=True).holdings())
        name = SwarmName(swarm.revision, swarm.holdings.manifest.words)
        with pytest.raises(ModelNotFound, match="another tokenizer"):
            await swarm.taker(patience_s=0.1).find(name)
        swarm.give("honest")
        source = await swarm.taker().find(name)
        taken = (source.fetch_words() / "tokenizer.json").read_bytes()
        assert taken == (swarm.holdings.folder / "tokenizer.json").read_bytes()


async def test_a_config_of_another_revision_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    async with open_swarm(checkpoint, tmp_path) as swarm:
        folder = tmp_path / "altered"
        shutil.copytree(swarm.holdings.folder, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
        altered = FolderSource(folder, cache_dir=tmp_path / "p", is_open=True).holdings()
        # It says the numbers of the revision, and gives the file that does not have them.
        manifest = replace(altered.manifest, numbers=swarm.holdings.manifest.numbers)
        swarm.give("liar", replace(altered, manifest=manifest))
        with pytest.raises(ModelNotFound, match="not that of this revision"):
            await swarm.taker(patience_s=0.1).find(SwarmName(swarm.revision))
        swarm.give(
            "other", replace(altered, manifest=replace(altered.manifest, weights=manifest.weights[:1]))
        )
        with pytest.raises(ModelNotFound, match="another model"):
            await swarm.taker(patience_s=0.1).find(SwarmName(swarm.revision))


async def test_nobody_who_has_it_is_an_error_that_says_what_to_do(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    async with open_swarm(checkpoint, tmp_path) as swarm:
        with pytest.raises(ModelNotFound, match=r"no peer announces it.*weights\.share"):
            await swarm.taker(patience_s=0.1).find(SwarmName(swarm.revision))


async def test_a_lie_about_weights_bans_and_an_honest_giver_stays(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    async with open_swarm(checkpoint, tmp_path) as swarm:
        swarm.give("honest")
        liar = swarm.give("liar")
        liar.alter = lambda index, content: bytes(len(content))
        taker = swarm.taker()
        source = await taker.find(SwarmName(swarm.revision))
        missing = source.missing(None, embedding_and_head=True)
        everything = source.missing(BlockSpan(0, 8), embedding_and_head=True)
        assert len(missing.files) < len(everything.files)
        await taker.bring(everything.files, everything.folder, label="fetching")
        assert taker.brought.liars.keys() == {"liar"}
    ledger = Ledger.open(tmp_path / "data" / "ledger.sqlite")
    assert ledger.is_banned("liar") and not ledger.is_banned("honest")
    assert any("chunk" in line for line in ledger.explain("liar"))
    ledger.close()
    # And is asked for nothing the next time.
    async with open_swarm(checkpoint, tmp_path / "again") as swarm:
        liar, _ = swarm.give("liar"), swarm.give("honest")
        shutil.copytree(tmp_path / "data", tmp_path / "again" / "data")
        taker = swarm.taker()
        source = await taker.find(SwarmName(swarm.revision))
        missing = source.missing(BlockSpan(0, 1), embedding_and_head=False)
        await taker.bring(missing.files, missing.folder, label="fetching")
        assert not liar.sent
        assert taker.brought.bytes.keys() == {"honest"}


async def test_what_is_damaged_on_this_disk_is_removed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    async with open_swarm(checkpoint, tmp_path) as swarm:
        swarm.give("a")
        taker = swarm.taker()
        source = await taker.find(SwarmName(swarm.revision))
        missing = source.missing(BlockSpan(0, 1), embedding_and_head=False)
        await taker.bring(missing.files, missing.folder, label="fetching")
    path = missing.folder / missing.files[0].name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    await trio.Path(path).write_bytes(content)
    with pytest.raises(Exception, match="is removed; start again"):
        source.fetch(BlockSpan(0, 1), embedding_and_head=False)
    assert source.missing(BlockSpan(0, 1), embedding_and_head=False) == missing
