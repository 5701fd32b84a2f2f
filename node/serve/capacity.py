"""Capacity of a node: number of blocks that fit, and measured speed of one."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

import torch

from p2pinfer.errors import LocalError, OutOfMemory
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.compute.runner import Chunk, SpanRunner
from p2pinfer.models.compute.target import Target, choose_targets
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.machine.memory import FreeMemory, refusals_named
from p2pinfer.models.machine.split import blocks_that_fit, rooms_of
from p2pinfer.models.quantised.formats import blank
from p2pinfer.models.span import BlockSpan

logger = logging.getLogger(__name__)

_PROBE_RUNS: Final = 5
_DECODE_STEPS: Final = 8


@dataclass(frozen=True, slots=True)
class Capacity:
    """Capacity of a node for a model."""

    blocks: int  # that fit, cache and head room included
    tokens_per_s_per_block: float  # decode speed if it held one block
    memory: FreeMemory  # that this was reckoned with


def measure_capacity(spec: ModelSpec, config: ComputeConfig) -> Capacity:
    """Number of blocks that fit this machine's free memory, and the measured speed of one.

    Decoding reads every weight once a token, so one product with a matrix of a block's size tells the speed
    before a weight is fetched.

    Raises:
        ConfigError: The device or dtype asked for is not to be had.
        LocalError: Not even one block fits.
    """
    targets = choose_targets(config, spec.dtype)
    block_bytes = spec.block_bytes(targets[0].numerics)
    devices = [target.device for target in targets]
    rooms = rooms_of(devices)
    fitting = [blocks_that_fit(room, block_bytes) for room in rooms]
    blocks = min(sum(fitting), spec.num_blocks)
    free = _together(rooms)
    if blocks < 1:
        raise LocalError(
            f"one block of {spec.model} takes {block_bytes / 2**30:.1f} GiB, and "
            f"on {_named(devices)} {free}: free some memory, raise the limit if there is one, "
            "or serve a smaller model"
        )
    with refusals_named(f"a block of {spec.model}", devices, "free some memory, or raise the limit"):
        seconds = {target.device: _block_seconds(spec, target) for target in targets}
    # The time of a block, on average over those that each device would hold.
    of_all = sum(count * seconds[device] for count, device in zip(fitting, devices, strict=True))
    return Capacity(blocks, sum(fitting) / of_all, free)


def check_room(spec: ModelSpec, span: BlockSpan, config: ComputeConfig) -> None:
    """Nothing, if the weights of `span`, which somebody asked for, can be held.

    What the machine is short of it can swap, slowly; behind a limit a process is killed without a word.

    Raises:
        ConfigError: The device or dtype asked for is not to be had.
        OutOfMemory: They exceed what a limit or a card leaves.
    """
    targets = choose_targets(config, spec.dtype)
    block_bytes = spec.block_bytes(targets[0].numerics)
    rooms = rooms_of([target.device for target in targets])
    if sum(room.bytes // block_bytes for room in rooms) >= len(span):
        return
    free = _together(rooms)
    said = f"blocks {span} of {spec.model} take {len(span) * block_bytes / 2**30:.1f} GiB, and {free}"
    if any(
        room.limit_bytes is None and target.device.type == "cpu"
        for room, target in zip(rooms, targets, strict=True)
    ):
        logger.warning("%s: the computer will swap, or run out of memory", said)
        return
    fit = sum(blocks_that_fit(room, block_bytes) for room in rooms)
    advice = f"ask for {fit} blocks or fewer" if fit else "not even one block would fit"
    raise OutOfMemory(f"{said}: {advice}, or raise the limit")


def measure_speed(runner: SpanRunner) -> float:
    """Decoded tokens per second through the whole span, one session at a time."""
    return 1 / max(median(time_steps(runner)), 1e-9)


def time_steps(runner: SpanRunner) -> list[float]:
    """The seconds of some steps of one token through the whole span, warmed up.

    Raises:
        CacheFull: The cache has no room for them.
    """
    hidden = torch.zeros(1, runner.spec.hidden_size)
    lease = runner.cache.reserve(_DECODE_STEPS)
    try:
        seconds = [_timed(runner, Chunk(lease, position, hidden)) for position in range(_DECODE_STEPS)]
    finally:
        lease.release()
    return seconds[1:]


def _timed(runner: SpanRunner, chunk: Chunk) -> float:
    started = time.perf_counter()
    runner.run([chunk])
    return time.perf_counter() - started


def _together(rooms: Sequence[FreeMemory]) -> FreeMemory:
    """Free memory of all devices; a limit is named where there is one device."""
    return rooms[0] if len(rooms) == 1 else FreeMemory(sum(room.bytes for room in rooms))


def _named(devices: Sequence[torch.device]) -> str:
    return " and ".join(map(str, dict.fromkeys(devices)))


def _block_seconds(spec: ModelSpec, target: Target) -> float:
    rows = max(1, spec.block_parameters // spec.hidden_size)
    with torch.inference_mode():
        if target.format is None:
            weight = target.linear(
                torch.zeros(rows, spec.hidden_size, dtype=target.dtype, device=target.device)
            )
        else:
            weight = target.linear(blank(rows, spec.hidden_size, target.format, target.device))
        hidden = torch.zeros(1, spec.hidden_size, dtype=target.dtype, device=target.device)
        seconds: list[float] = []
        for _ in range(_PROBE_RUNS):
            started = time.perf_counter()
            weight(hidden).sum().item()  # waits for the device
            seconds.append(time.perf_counter() - started)
    return max(median(seconds), 1e-6)
