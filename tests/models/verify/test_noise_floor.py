from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pinfer.models.verify.noise_floor import (
    NoiseFloor,
    carried_square,
    channel_scale,
    measure_floor,
    shared_part,
)


def rounded_session(tokens: int, hidden_size: int = 64, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Inputs, exact and rounded outputs whose rounding is a hundredth of what the span adds."""
    rng = torch.Generator().manual_seed(seed)
    inputs, added, noise = (torch.randn(tokens, hidden_size, generator=rng) for _ in range(3))
    return inputs, inputs + added, inputs + added + 0.01 * noise


def rho(floor: NoiseFloor, outputs: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return floor.deviations(outputs, positions).square().sum(-1).sqrt()


def test_the_rounded_run_itself_lies_one_floor_away_and_the_exact_one_none() -> None:
    inputs, exact, rounded = rounded_session(40)
    floor = measure_floor(inputs, exact, [rounded])
    every = torch.arange(40)
    assert torch.allclose(rho(floor, rounded, every), torch.ones(40))
    assert torch.equal(rho(floor, exact, every), torch.zeros(40))


def test_only_the_positions_that_are_asked_for_are_compared() -> None:
    inputs, exact, rounded = rounded_session(40)
    floor = measure_floor(inputs, exact, [rounded])
    assert torch.allclose(rho(floor, rounded[[3, 39]], torch.tensor([3, 39])), torch.ones(2))
    assert rho(floor, rounded[[3]], torch.tensor([4])) > 10


def test_of_several_rounded_runs_the_usual_one_counts() -> None:
    inputs, exact, rounded = rounded_session(40)
    twice = exact + 2 * (rounded - exact)
    floor = measure_floor(inputs, exact, [rounded, twice])
    assert torch.allclose(rho(floor, rounded, torch.arange(40)), torch.full((40,), 2.5**-0.5))


def test_what_tokens_have_in_common_is_told_from_what_each_does_by_itself() -> None:
    rng = torch.Generator().manual_seed(0)
    own = torch.nn.functional.normalize(torch.randn(32, 500, generator=rng), dim=-1)
    common = torch.nn.functional.normalize(torch.randn(500, generator=rng), dim=-1)
    assert abs(shared_part(own)) < 0.02
    assert abs(shared_part(own + 0.7 * common) - 0.49) < 0.05
    assert shared_part(common[None]) == 0.0


def test_a_huge_channel_does_not_hide_the_others() -> None:
    inputs, exact, rounded = rounded_session(40)
    for each in (inputs, exact, rounded):
        each[:, 7] *= 10_000
    altered = rounded.clone()
    altered[:, :7] += 0.3
    every = torch.arange(40)
    assert rho(measure_floor(inputs, exact, [rounded]), altered, every).median() > 5


def test_a_token_that_happened_to_round_well_is_not_held_to_that() -> None:
    inputs, exact, rounded = rounded_session(40)
    lucky = rounded.clone()
    lucky[11] = exact[11]
    floor = measure_floor(inputs, exact, [lucky])
    assert rho(floor, rounded, torch.arange(40)).max() < 4


def test_the_first_token_shapes_neither_scale_nor_divisor() -> None:
    inputs, exact, rounded = rounded_session(40)
    plain = measure_floor(inputs, exact, [rounded])
    for each in (exact, rounded):
        each[0] *= 1e4
    massive = measure_floor(inputs, exact, [rounded])
    assert torch.equal(plain.scale, massive.scale)
    assert plain.least == massive.least


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_a_session_of_hardly_any_tokens_has_a_floor(tokens: int) -> None:
    inputs, exact, rounded = rounded_session(tokens)
    floor = measure_floor(inputs, exact, [rounded])
    assert torch.allclose(rho(floor, rounded, torch.arange(tokens)), torch.ones(tokens))


def test_a_span_that_adds_and_rounds_nothing_divides_by_nothing() -> None:
    still = torch.zeros(5, 8)
    floor = measure_floor(still, still, [still])
    assert torch.equal(rho(floor, still, torch.arange(5)), torch.zeros(5))
    assert (rho(floor, still + 1e-3, torch.arange(5)) > 1e6).all()


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_the_scale_is_positive_and_grows_with_what_is_added(tokens: int, seed: int, factor: float) -> None:
    inputs, exact, _ = rounded_session(tokens, seed=seed)
    scale = channel_scale(inputs, exact)
    assert (scale > 0).all()
    assert torch.allclose(
        channel_scale(inputs, inputs + (exact - inputs) * factor), scale * factor, rtol=1e-2
    )


def test_what_is_carried_is_rounded_to_the_distance_of_adjacent_bfloat16_numbers() -> None:
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(3)) * torch.logspace(-6, 6, 64)
    values[0, :4] = torch.tensor([0.0, -0.0, 1.0, -2.0])
    floors = values.bfloat16().float()
    below = (floors.view(torch.int32) - (1 << 16)).view(torch.float32)
    floors = torch.where(floors.abs() > values.abs(), below, floors)
    above = (floors.view(torch.int32) + (1 << 16)).view(torch.float32)
    spacing = torch.where(values == 0, 0.0, (above - floors).abs())
    assert torch.allclose(carried_square(values), spacing.square() / 12, rtol=1e-6, atol=0)
