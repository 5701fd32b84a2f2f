from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from p2pinfer.errors import CacheFull, LocalError
from p2pinfer.models.checkpoint import Checkpoint
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.runner import open_runner
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.target import Target
from p2pinfer.node import sizing
from p2pinfer.node.sizing import WEIGHTS_SHARE, measure_capacity, measure_speed

CPU = ComputeConfig(device="cpu", dtype="float32")


def free_memory(monkeypatch: pytest.MonkeyPatch, free_bytes: float) -> None:
    def virtual_memory() -> SimpleNamespace:
        return SimpleNamespace(available=free_bytes)

    monkeypatch.setattr("psutil.virtual_memory", virtual_memory)


def test_as_many_blocks_are_held_as_fit_and_no_more_than_there_are(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = checkpoint.spec.block_parameters * 4 / WEIGHTS_SHARE
    for room, blocks in ((1.1, 1), (5.5, 5), (100, 8)):
        free_memory(monkeypatch, room * block)
        capacity = measure_capacity(checkpoint.spec, CPU)
        assert capacity.blocks == blocks
        assert capacity.tokens_per_s_per_block > 0
    free_memory(monkeypatch, 5.5 * block)
    assert measure_capacity(checkpoint.spec, replace(CPU, dtype="bfloat16")).blocks == 8


def test_no_room_for_a_single_block_is_said_with_both_sizes(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_memory(monkeypatch, 2**20)
    large = replace(checkpoint.spec, hidden_size=320, block_parameters=2**30)
    with pytest.raises(
        LocalError, match=r"one block of tiny-stories takes 4\.0 GiB and 0\.0 GiB are free on cpu"
    ):
        measure_capacity(large, CPU)


def test_a_gpu_is_asked_for_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def mem_get_info(device: torch.device) -> tuple[int, int]:
        return (123, 456)

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    target = Target(torch.device("cuda", 0), torch.bfloat16)
    assert sizing._free_bytes(target) == 123  # pyright: ignore[reportPrivateUsage]


def test_speed_is_measured_and_leaves_the_cache_as_it_was(checkpoint: Checkpoint) -> None:
    runner = open_runner(checkpoint, BlockSpan(0, 1), replace(CPU, cache_bytes=1 << 20, threads=1))
    assert measure_speed(runner) > 1
    assert runner.cache.free_tokens == runner.cache.capacity_tokens


def test_a_cache_too_small_to_serve_anybody_is_said(checkpoint: Checkpoint) -> None:
    runner = open_runner(checkpoint, BlockSpan(0, 1), replace(CPU, cache_bytes=1, threads=1))
    with pytest.raises(CacheFull, match="a session of"):
        measure_speed(runner)
