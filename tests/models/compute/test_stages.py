"""A span on several devices: here a CPU that is named several times, for which the code is the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute import paged_decode, stage
from p2pinfer.models.compute.attention import Piece
from p2pinfer.models.compute.cache import CacheLease, PagedCache
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.compute.runner import Chunk, SpanRunner, open_runner
from p2pinfer.models.compute.stage import Row, cut
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan

ONE = ComputeConfig(device="cpu", dtype="float32", cache_bytes=1 << 23, page_tokens=16)
NEW_TOKENS = 8


def open_on(checkpoint: Checkpoint, device: str, *, recorded: bool = False) -> SpanRunner:
    config = ComputeConfig(device=device, dtype="float32", cache_bytes=1 << 23, page_tokens=16)
    runner = open_runner(checkpoint, BlockSpan(0, checkpoint.spec.num_blocks), config)
    return SpanRunner([each.recorded() for each in runner.stages], runner.cache) if recorded else runner


def prompt(tokens: int) -> list[int]:
    rng = random.Random(tokens)
    return [rng.randrange(3, 199) for _ in range(tokens)]


def decode(runner: SpanRunner, ends: Any, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Greedy continuations of prompts that begin one batch after the other and then step together."""
    leases: list[CacheLease] = []
    ids = [list(each) for each in prompts]

    def step() -> None:
        chunks = [
            Chunk(lease, lease.length, ends.embed(grown[lease.length :]))
            for lease, grown in zip(leases, ids, strict=False)
        ]
        for grown, output in zip(ids, runner.run(chunks), strict=False):
            grown.append(int(ends.logits(output[-1:]).argmax()))

    for each in prompts:
        leases.append(runner.cache.reserve(len(each) + NEW_TOKENS + len(prompts)))
        step()
    for _ in range(NEW_TOKENS - 1):
        step()
    return [grown[: len(each) + NEW_TOKENS] for grown, each in zip(ids, prompts, strict=True)]


@pytest.mark.parametrize(("device", "recorded"), [("cpu,cpu", False), ("cpu,cpu,cpu", True)])
def test_ids_over_several_devices_are_those_of_transformers(
    family_checkpoint: Checkpoint,
    oracle: Callable[..., PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    recorded: bool,
) -> None:
    """Prompts are cut on their way, the parts of one may share a batch with another session's step."""
    monkeypatch.setattr(stage, "PART_TOKENS", 32)
    monkeypatch.setattr(paged_decode, "_MIN_CONTEXT", 32)
    prompts = [prompt(tokens) for tokens in (70, 1, 33)]
    ends = load_embedding_and_head(family_checkpoint, ONE)
    found = decode(open_on(family_checkpoint, device, recorded=recorded), ends, prompts)
    model: Any = oracle(family_checkpoint.folder)
    for ids, grown in zip(prompts, found, strict=True):
        batch = torch.tensor([ids])
        expected = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        assert grown == expected[0].tolist()


@pytest.mark.parametrize(("device", "recorded"), [("cpu,cpu", True), ("cpu,cpu,cpu", False)])
def test_a_span_on_several_devices_gives_the_bits_of_one_device(
    checkpoint: Checkpoint, device: str, recorded: bool
) -> None:
    """Of its whole, of parts that begin and end within a device, after rolling back, and stepwise.

    Of recorded steps the whole alone: what is a part of one device may be all that another one has.
    """
    one, several = (
        open_on(checkpoint, "cpu", recorded=recorded),
        open_on(checkpoint, device, recorded=recorded),
    )
    hidden = torch.randn(40, checkpoint.spec.hidden_size, generator=torch.Generator().manual_seed(0))
    parts = [] if recorded else [BlockSpan(0, 1), BlockSpan(3, 5), BlockSpan(2, 8), BlockSpan(7, 8)]
    for span in (None, *parts):
        for stepwise in (False, True):
            results: list[list[Tensor]] = []
            for runner in (one, several):
                run = (runner.stepwise() if stepwise else runner).run
                leases = [runner.cache.reserve(60) for _ in range(2)]
                found = run([Chunk(lease, 0, hidden) for lease in leases], span)
                found += run([Chunk(leases[0], 39, hidden[:1]), Chunk(leases[1], 20, hidden[:1])], span)
                found += run([Chunk(leases[1], 21, hidden[:7])], span)
                results.append(found)
                for lease in leases:
                    lease.release()
            assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_step_is_placed_on_every_device_before_the_first_one_computes(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy from the host waits for its device: behind the first launch it would make cards take turns."""
    runner = open_on(checkpoint, "cpu,cpu", recorded=True)
    said: list[str] = []
    place, compute = paged_decode._Step.place, paged_decode._Step._compute  # pyright: ignore[reportPrivateUsage]

    def placed(step: Any, *rest: Any) -> None:
        said.append("place")
        place(step, *rest)

    def computed(step: Any) -> Tensor:
        said.append("compute")
        return compute(step)

    monkeypatch.setattr(paged_decode._Step, "place", placed)  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(paged_decode._Step, "_compute", computed)  # pyright: ignore[reportPrivateUsage]
    lease = runner.cache.reserve(4)
    runner.run([Chunk(lease, 0, torch.zeros(1, checkpoint.spec.hidden_size))])
    assert said == ["place", "place", "compute", "compute"]


def test_every_device_has_its_blocks_and_a_pool_for_the_same_tokens(checkpoint: Checkpoint) -> None:
    runner = open_on(checkpoint, "cpu,cpu,cpu")
    spans = [blocks.span for blocks in runner.parts]
    assert [len(span) for span in spans] == [3, 3, 2]
    assert [span.start for span in spans[1:]] == [span.stop for span in spans[:-1]]
    assert runner.span == BlockSpan(0, 8)
    assert {pool.null_slot for pool in runner.cache.pools} == {runner.cache.capacity_tokens}
    assert runner.cache.budget_bytes <= 1 << 23
    assert runner.where == "cpu (0:3), cpu (3:6), cpu (6:8)"
    assert open_on(checkpoint, "cpu").where == "cpu"


@given(tokens=st.lists(st.integers(1, 70), min_size=1, max_size=8), most=st.integers(1, 40))
def test_a_cut_batch_has_every_token_once_in_order(tokens: list[int], most: int) -> None:
    cache = PagedCache(
        layout=[(torch.device("cpu"), 1)], kv_heads=1, head_dim=1, dtype=torch.float32, budget_bytes=1 << 16
    )
    leases = [cache.reserve(1) for _ in tokens]
    rows = [
        Row(Piece(lease, index, count))
        for index, (lease, count) in enumerate(zip(leases, tokens, strict=True))
    ]
    parts = cut(rows, most)
    assert all(0 < sum(row.piece.tokens for row in part) <= most for part in parts)
    assert all(sum(row.piece.tokens for row in part) == most for part in parts[:-1])
    found = [
        (id(row.piece.lease), row.piece.position + at)
        for part in parts
        for row in part
        for at in range(row.piece.tokens)
    ]
    assert found == [
        (id(lease), index + at)
        for index, (lease, count) in enumerate(zip(leases, tokens, strict=True))
        for at in range(count)
    ]
