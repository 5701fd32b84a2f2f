"""Formulas for pipelines in the benchmarks, against simulations of every line and hop."""

from __future__ import annotations

import heapq
import importlib.util
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "pipeline.py"

pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="the benchmarks are not here")


@pytest.fixture(scope="module")
def pipeline() -> ModuleType:
    """benchmarks/pipeline.py, loaded by its path: scripts are no package."""
    spec = importlib.util.spec_from_file_location("pipeline", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Stage:
    """One line or one computation of a piece: who does it, for how long, and how long the result travels."""

    server: str
    seconds: float
    delay_s: float = 0.0


def simulated_s(
    stages: Sequence[Stage], pieces: int, servers: dict[str, int], furthest_first: bool = True
) -> float:
    """When the last of `pieces` has passed all stages; of those that wait, one end goes first."""
    sign = -1 if furthest_first else 1
    free = defaultdict[str, int](lambda: 1, servers)
    waiting = defaultdict[str, list[tuple[int, int]]](list)
    # (time, 0 for a server that gets free, else 1 for a piece that arrives, stage, piece)
    events = [(0.0, 1, 0, piece) for piece in range(pieces)]
    now = 0.0
    while events:
        now, kind, at, piece = heapq.heappop(events)
        if kind and at == len(stages):
            continue
        server = stages[at].server
        if kind:
            heapq.heappush(waiting[server], (sign * at, piece))
        else:
            free[server] += 1
        while free[server] and waiting[server]:
            rank, chosen = heapq.heappop(waiting[server])
            free[server] -= 1
            at = sign * rank
            stage = stages[at]
            heapq.heappush(events, (now + stage.seconds, 0, at, chosen))
            heapq.heappush(events, (now + stage.seconds + stage.delay_s, 1, at + 1, chosen))
    return now


def chain(hops: int, line_s: float, compute_s: float, delay_s: float, *, shared: bool) -> list[Stage]:
    """A piece from the client over all hops and back to it."""
    stages = [Stage("uplink of the client", line_s, delay_s)]
    for hop in range(hops):
        stages.append(Stage("processors" if shared else f"hop {hop}", compute_s / hops))
        stages.append(Stage(f"uplink of hop {hop}", line_s, delay_s))
    return stages


def star(hops: int, line_s: float, compute_s: float, delay_s: float, *, shared: bool) -> list[Stage]:
    """A piece from the client to each hop and back to it."""
    return [
        stage
        for hop in range(hops)
        for stage in (
            Stage("uplink of the client", line_s, delay_s),
            Stage("processors" if shared else f"hop {hop}", compute_s / hops),
            Stage(f"uplink of hop {hop}", line_s, delay_s),
        )
    ]


@pytest.mark.parametrize(("hops", "at_once"), [(1, 1), (2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("line_s", [0.1, 0.34, 3.0])
def test_steps_of_training_are_bounded_by_what_tends_to_the_bound(
    pipeline: ModuleType, hops: int, at_once: int, line_s: float
) -> None:
    """Of a pipeline whose pieces get smaller, each is slower than the bound, and the last one hardly so."""
    alone, delay_s = (2.0, 3.1), 0.025
    bound, of_star, compute_s = pipeline.bounds_s(alone, line_s, delay_s, hops, at_once)
    assert compute_s == pytest.approx(sum(alone) / at_once)

    def step_s(way: Callable[..., list[Stage]], pieces: int, *, furthest_first: bool) -> float:
        """There and back."""
        parts = [way(hops, line_s / pieces, each / pieces, delay_s, shared=at_once < hops) for each in alone]
        servers = {"processors": at_once}
        return sum(simulated_s(part, pieces, servers, furthest_first) for part in parts)

    for limit, way in ((bound, chain), (of_star, star)):
        for pieces in (1, 4, 16, 200):
            found = [step_s(way, pieces, furthest_first=each) for each in (True, False)]
            assert min(found) >= limit * (1 - 1e-9)
        assert min(found) <= 1.1 * limit


def test_chunks_of_a_prompt_take_what_a_simulation_of_them_takes(pipeline: ModuleType) -> None:
    for hops, chunks, row_s, compute_s in product((1, 3, 4), (1, 2, 7), (1e-4, 4e-3), (0.1, 2.0)):
        stages = [Stage(f"line {hop}", 50 * row_s) for hop in range(hops)]
        stages += [Stage(f"hop {hop}", compute_s / chunks / hops) for hop in range(hops)]
        stages = [each for pair in zip(stages[:hops], stages[hops:], strict=True) for each in pair]
        said = pipeline.pipeline_s(50 * chunks, 50, row_s, compute_s, hops, hops)
        assert said == pytest.approx(simulated_s(stages, chunks, {}))
