"""A node that takes its weights from peers, over a swarm in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import p2pinfer.models
from p2pinfer.models.checkpoint.model_source import FolderSource
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL
from p2pinfer.models.compute.runner import Chunk, open_runner
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.events import Ready
from p2pinfer.node.weights.asking import open_asking
from p2pinfer.node.weights.file_job import Source
from p2pinfer.reputation.ledger import Ledger

from .memory_swarm import FLOAT32
from .nodes import OpenNode
from .weights.givers import give

BUNDLED = Path(p2pinfer.models.__path__[0], BUNDLED_MODEL)


async def test_a_node_without_the_hub_takes_its_weights_from_two_peers(
    open_node: OpenNode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One dies in the middle, the other one lies about a range, and the weights are right all the same."""
    held = FolderSource(BUNDLED, cache_dir=tmp_path / "held", is_open=True).holdings()
    revision = held.manifest.revision
    async with open_node(blocks="2:5", model=f"swarm:{revision}", others=((0, 8), (0, 8))) as node:
        network = node.swarm.network
        mortal, liar = (give(network, f"other-{index}", held, tmp_path) for index in range(2))

        async def die(index: int) -> None:
            if len(mortal.sent) >= 2 and "other-0" in network.hosts:
                await network.kill("other-0")

        mortal.before = die
        lies = [1]

        def alter(index: int, content: bytes) -> bytes:
            return bytes(len(content)) if lies and lies.pop() else content

        liar.alter = alter
        ready = await node.wait_for(Ready)
        assert (ready.blocks, ready.revision) == ((2, 5), revision)
        session = await node.session()
        hidden = torch.randn(5, node.swarm.spec.hidden_size, generator=torch.Generator().manual_seed(0))
        output = await session.prefill(hidden, 0)
        expected = open_runner(node.swarm.checkpoint, BlockSpan(2, 5), FLOAT32)
        (whole,) = expected.run([Chunk(expected.cache.reserve(5), 0, hidden)])
        torch.testing.assert_close(output, whole[-1:], rtol=1e-4, atol=1e-4)
        assert any("other-1" in record.message and "chunk" in record.message for record in caplog.records)
        # And it gives on what it has.
        async with open_asking(network.host("asker"), Source(ready.peer_id)) as asking:
            _, here = await asking.manifest(revision)
        assert here
    ledger = Ledger.open(tmp_path / "ledger.sqlite")
    # Once is suspicious, since memory errs at times, and not enough for a ban.
    assert ledger.account("other-1").suspected == 1 and not ledger.is_banned("other-1")
    assert not ledger.account("other-0").suspected
    ledger.close()
