from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from p2pinfer.errors import CacheFull, LocalError, OutOfMemory
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.runner import open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.machine import split
from p2pinfer.models.machine.memory import WEIGHTS_SHARE, FreeMemory
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.serve.capacity import check_room, measure_capacity, measure_speed

CPU = ComputeConfig(device="cpu", dtype="float32")


def free_memory(monkeypatch: pytest.MonkeyPatch, free_bytes: float, limit_bytes: int | None = None) -> None:
    free = FreeMemory(int(free_bytes), limit_bytes, "its control group" if limit_bytes else "")

    def free_on(_device: torch.device) -> FreeMemory:
        return free

    monkeypatch.setattr(split, "free_on", free_on)


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
        LocalError, match=r"one block of tiny-stories takes 4\.0 GiB, and on cpu 0\.0 GiB are free: "
    ):
        measure_capacity(large, CPU)
    free_memory(monkeypatch, 2**20, 2**31)
    with pytest.raises(LocalError, match=r"free \(limited to 2\.0 GiB by its control group\)"):
        measure_capacity(large, CPU)


def test_blocks_that_were_asked_for_and_exceed_a_limit_are_refused_before_they_are_loaded(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    large = replace(checkpoint.spec, block_parameters=2**28)  # a gibibyte each
    free_memory(monkeypatch, 4 * 2**30, 5 * 2**30)
    check_room(large, BlockSpan(2, 6), CPU)
    with pytest.raises(
        OutOfMemory, match=r"blocks 0:5 .* take 5\.0 GiB, .*group\): ask for 2 blocks or fewer"
    ):
        check_room(large, BlockSpan(0, 5), CPU)
    free_memory(monkeypatch, 2**30, 5 * 2**30)
    with pytest.raises(OutOfMemory, match="not even one block would fit"):
        check_room(large, BlockSpan(0, 5), CPU)
    assert not caplog.records


def test_several_devices_hold_what_each_of_them_holds(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = checkpoint.spec.block_parameters * 4
    both = replace(CPU, device="cpu,cpu")
    free_memory(monkeypatch, 7.5 * block / WEIGHTS_SHARE, 1 << 60)
    assert measure_capacity(checkpoint.spec, CPU).blocks == 7
    assert measure_capacity(checkpoint.spec, both).blocks == 6  # 3.75 on either half
    free_memory(monkeypatch, 5.5 * block, 1 << 60)
    check_room(checkpoint.spec, BlockSpan(0, 5), CPU)
    check_room(checkpoint.spec, BlockSpan(0, 4), both)
    with pytest.raises(OutOfMemory, match="ask for 2 blocks or fewer"):  # 1.65 on either half
        check_room(checkpoint.spec, BlockSpan(0, 5), both)


def test_what_the_machine_itself_is_short_of_it_may_swap(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free_memory(monkeypatch, 2**20)
    check_room(checkpoint.spec, BlockSpan(0, 8), CPU)
    assert "the computer will swap" in caplog.text


def test_speed_is_measured_and_leaves_the_cache_as_it_was(checkpoint: Checkpoint) -> None:
    runner = open_runner(checkpoint, BlockSpan(0, 1), replace(CPU, cache_bytes=1 << 20, threads=1))
    assert measure_speed(runner) > 1
    assert runner.cache.free_tokens == runner.cache.capacity_tokens


def test_a_cache_too_small_to_serve_anybody_is_said(checkpoint: Checkpoint) -> None:
    runner = open_runner(checkpoint, BlockSpan(0, 1), replace(CPU, cache_bytes=1, threads=1))
    with pytest.raises(CacheFull, match="a session of"):
        measure_speed(runner)
