"""Rows that grow over sessions, against passes over all of their tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from p2pinfer.generation.row_sessions import RowSessions
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.blocks import load_blocks
from p2pinfer.models.compute.target import Target
from p2pinfer.models.learning.rows import Rows
from p2pinfer.models.learning.span_passes import Microbatch, SpanPasses, complete
from p2pinfer.models.numerics import FLOAT32
from p2pinfer.models.span import BlockSpan

from ..memory_client import open_memory_client


class Whole:
    """All blocks, here."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._span = BlockSpan(0, checkpoint.spec.num_blocks)
        self._passes = SpanPasses(load_blocks(checkpoint, self._span, Target(torch.device("cpu"), FLOAT32)))

    def check(self, outputs: list[Tensor], inputs: list[Tensor], new: list[int]) -> None:
        for output, row, count in zip(outputs, inputs, new, strict=True):
            order = torch.arange(len(row))
            batch = Microbatch(self._span, Rows([len(row)], order, order))
            expected = complete(self._passes.forward(batch, row)).output[-count:]
            torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)


def grown(rows: list[Tensor], seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.cat((each, torch.randn(1, each.shape[1]) * 0.1)) for each in rows]


async def test_rows_grow_change_places_and_outlive_a_hop(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, size = Whole(checkpoint), checkpoint.spec.hidden_size
    async with open_memory_client(checkpoint, monkeypatch, tmp_path) as (client, swarm):
        await swarm.serve("a", 0, 3)
        await swarm.serve("b", 3, 8)
        await swarm.serve("c", 3, 8)
        sessions = RowSessions(client, client.spec.max_positions)
        torch.manual_seed(0)
        rows = [torch.randn(count, size) * 0.1 for count in (9, 4, 30)]
        new = [9, 1, 30]
        whole.check(await sessions.run(rows, new), rows, new)
        rows = grown(rows, 1)
        whole.check(await sessions.run(rows, [1, 1, 1]), rows, [1, 1, 1])
        # As beams do: two rows go on with one text, and the third with another's.
        rows = grown([rows[2], rows[2], rows[0]], 2)
        whole.check(await sessions.run(rows, [1, 1, 1]), rows, [1, 1, 1])
        victim = next(each for each in ("b", "c") if swarm.served[each].server.sessions)
        await swarm.network.kill(victim)
        rows = grown(rows, 3)
        whole.check(await sessions.run(rows, [1, 1, 1]), rows, [1, 1, 1])
        rows = grown(rows[:1], 4)
        whole.check(await sessions.run(rows, [2]), rows, [2])
        await sessions.aclose()
        await swarm.all_closed()


async def test_a_row_that_outgrows_its_session_gets_a_larger_one(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, size = Whole(checkpoint), checkpoint.spec.hidden_size
    async with open_memory_client(checkpoint, monkeypatch, tmp_path) as (client, swarm):
        await swarm.serve("a", 0, 8)
        sessions = RowSessions(client, client.spec.max_positions)
        torch.manual_seed(0)
        long = torch.randn(150, size) * 0.1
        for length in (3, 150):
            rows = [long[:length]]
            whole.check(await sessions.run(rows, [1]), rows, [1])
        await sessions.aclose()
