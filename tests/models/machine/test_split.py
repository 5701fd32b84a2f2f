from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.models.compute import target
from p2pinfer.models.compute.target import Target, cache_budget
from p2pinfer.models.machine import split
from p2pinfer.models.machine.memory import FreeMemory
from p2pinfer.models.machine.split import apportion, rooms_of, split_span
from p2pinfer.models.numerics import BFLOAT16
from p2pinfer.models.span import BlockSpan

GIB = 1 << 30


def devices(*names: str) -> list[torch.device]:
    return [torch.device(name) for name in names]


def free(monkeypatch: pytest.MonkeyPatch, gib: Mapping[str, float]) -> None:
    def free_on(device: torch.device) -> FreeMemory:
        return FreeMemory(int(gib[str(device)] * GIB))

    monkeypatch.setattr(split, "free_on", free_on)
    monkeypatch.setattr(target, "free_on", free_on)


@pytest.mark.parametrize(
    ("names", "gib", "spans"),
    [
        (["cuda:0", "cuda:1"], {"cuda:0": 139.2, "cuda:1": 138.9}, ["10:50", "50:90"]),
        (["cuda:1", "cuda:0"], {"cuda:0": 80, "cuda:1": 40}, ["10:37", "37:90"]),
        (
            ["cuda:0", "cuda:1", "cuda:2"],
            {"cuda:0": 80, "cuda:1": 80, "cuda:2": 80},
            ["10:37", "37:64", "64:90"],
        ),
        (["cuda:0", "cuda:0"], {"cuda:0": 100}, ["10:50", "50:90"]),
        # 0.6 of 80 GiB are 48 blocks; the processor holds the rest, however much memory it has.
        (["cuda:0", "cpu"], {"cuda:0": 80, "cpu": 500}, ["10:58", "58:90"]),
        (["cpu", "cuda:0"], {"cuda:0": 80, "cpu": 500}, ["10:42", "42:90"]),
    ],
)
def test_blocks_are_split_by_free_memory(
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    gib: dict[str, float],
    spans: list[str],
) -> None:
    free(monkeypatch, gib)
    assert list(map(str, split_span(BlockSpan(10, 90), devices(*names), GIB))) == spans


@pytest.mark.parametrize(
    ("names", "gib", "left_out"),
    [
        (["cuda:0", "cuda:1"], {"cuda:0": 0.4, "cuda:1": 60}, "cuda:0 holds none of blocks 0:8"),
        (["cuda:0", "cpu"], {"cuda:0": 60, "cpu": 500}, "cpu holds none of blocks 0:8"),
        (["cuda:0", "cpu"], {"cuda:0": 1.5, "cpu": 500}, "cuda:0 holds none of blocks 0:8"),
    ],
)
def test_a_device_that_is_left_out_is_said_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    names: list[str],
    gib: dict[str, float],
    left_out: str,
) -> None:
    free(monkeypatch, gib)
    spans = split_span(BlockSpan(0, 8), devices(*names), GIB)
    assert [span for span in spans if span is not None] == [BlockSpan(0, 8)]
    assert left_out in caplog.text
    assert "a block takes 1.0 GiB, and " in caplog.text


@given(
    blocks=st.integers(0, 200),
    rooms=st.lists(st.integers(0, 1000), min_size=1, max_size=9),
    block_bytes=st.integers(1, 300),
)
def test_shares_are_whole_and_within_one_block_of_the_proportion(
    blocks: int, rooms: list[int], block_bytes: int
) -> None:
    counts = apportion(blocks, rooms, block_bytes)
    assert sum(counts) == blocks
    large = [room if room >= block_bytes else 0 for room in rooms]
    if any(large):
        for count, room in zip(counts, large, strict=True):
            assert abs(count - blocks * room / sum(large)) < 1
            assert room or not count


def test_the_fullest_device_decides_how_many_tokens_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, {"cuda:0": 10, "cuda:1": 5})
    one, other = (Target(device, BFLOAT16) for device in devices("cuda:0", "cuda:1"))
    slot_bytes = 1 << 12
    budget = cache_budget([(one, 4), (other, 4)], slot_bytes)
    tokens = budget // (8 * slot_bytes)
    assert tokens == int(5 * GIB * 0.8) // (4 * slot_bytes)
    shared = cache_budget([(one, 4), (one, 4)], slot_bytes)
    assert shared <= 10 * GIB * 0.8


def test_a_device_named_twice_has_its_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, {"cuda:0": 10, "cuda:1": 5})
    rooms = rooms_of(devices("cuda:0", "cuda:1", "cuda:0"))
    assert [room.bytes / GIB for room in rooms] == [5, 5, 5]
