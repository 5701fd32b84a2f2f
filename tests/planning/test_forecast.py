"""Forecasts of swarms that do not exist yet."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from p2pinfer.models.checkpoint.spec import ModelSpec, model_spec
from p2pinfer.models.configs.published_sizes import published_shape
from p2pinfer.models.machine.memory import WEIGHTS_SHARE
from p2pinfer.models.numerics import BFLOAT16, Numerics
from p2pinfer.planning.forecast import MAX_PEERS, Assumed, fewest_peers, forecast
from p2pinfer.routing.config import RoutingConfig


def llama(name: str = "meta-llama/Llama-3.3-70B-Instruct") -> ModelSpec:
    shape = published_shape(name)
    assert shape is not None
    return model_spec(name, shape.config(), {})


USUAL = Assumed(
    peers=8,
    numerics=BFLOAT16,
    block_s=0.03,
    up_bytes_per_s=2.5e6,
    rtt_ms=80.0,
    context_tokens=4096,
    prompt_tokens=1000,
)


def test_a_trip_is_compute_delays_and_bytes_by_hand() -> None:
    """An oracle without the planner: eight hops in a row, nine lines of half a round trip each."""
    found = forecast(llama(), USUAL)
    assert (found.blocks, len(found.route.hops), found.hidden_bytes) == (10, 8, 2 * 8192)
    lines = 9 * (0.080 / 2 + 2 * 8192 / 2.5e6)
    assert found.trip_s == pytest.approx(80 * 0.03 + 8 * RoutingConfig().hop_overhead_s + lines)
    assert found.compute_s == pytest.approx(80 * 0.03)
    # The head has 128256 x 8192 weights, a block 8192 x (2 x 72 x 128 + 3 x 28672).
    assert found.head_s == pytest.approx(0.03 * 128256 / (2 * 72 * 128 + 3 * 28672))
    assert found.tokens_per_s == pytest.approx(1 / (found.trip_s + found.head_s))


def test_memory_is_that_of_the_published_sizes() -> None:
    """70.6 billion weights in two bytes, less the 2.1 billion of embedding and head, in eight parts."""
    found = forecast(llama(), USUAL)
    assert 8 * found.weights_bytes == pytest.approx(2 * (70.6e9 - 2 * 128256 * 8192), rel=0.01)
    assert found.cache_bytes == 10 * 4096 * 2 * 8 * 128 * 2  # keys and values of eight heads
    assert found.memory_bytes == found.weights_bytes / WEIGHTS_SHARE
    long = forecast(llama(), replace(USUAL, context_tokens=131072))
    assert long.memory_bytes == max(
        long.weights_bytes / WEIGHTS_SHARE, long.weights_bytes + 32 * found.cache_bytes
    )


def test_lines_alone_bound_the_time_of_a_prompt() -> None:
    found = forecast(llama(), USUAL)
    sent = 1000 * 2 * 8192 / 2.5e6
    assert sent < found.prompt_lines_s < sent + 8 * 0.25 + 9 * 0.04 + 1e-9
    short = forecast(llama(), replace(USUAL, prompt_tokens=1))
    assert short.prompt_lines_s == pytest.approx(9 * (0.04 + 2 * 8192 / 2.5e6))


@pytest.mark.parametrize("peers", [1, 3, 7, 80, 100])
def test_every_block_is_served_by_somebody(peers: int) -> None:
    """Also where blocks cannot be shared out evenly, and where there are more peers than blocks."""
    found = forecast(llama(), replace(USUAL, peers=peers))
    covered = [block for hop in found.route.hops for block in range(hop.span.start, hop.span.stop)]
    assert covered == list(range(80))
    assert found.blocks == math.ceil(80 / peers)


def test_a_better_line_and_fewer_bits_are_faster() -> None:
    usual = forecast(llama(), USUAL).tokens_per_s
    assert forecast(llama(), replace(USUAL, up_bytes_per_s=2.5e7)).tokens_per_s > usual
    assert forecast(llama(), replace(USUAL, rtt_ms=10.0)).tokens_per_s > usual
    assert forecast(llama(), replace(USUAL, block_s=0.01)).tokens_per_s > usual
    int4 = replace(USUAL, numerics=Numerics("int4", "bfloat16"))
    assert forecast(llama(), int4).weights_bytes < forecast(llama(), USUAL).weights_bytes / 3


def test_the_fewest_peers_are_those_whose_memory_holds_the_model() -> None:
    spec = llama()
    least = fewest_peers(spec, BFLOAT16, 4096, 24 * 2**30)
    assert least is not None
    assert forecast(spec, replace(USUAL, peers=least)).memory_bytes <= 24 * 2**30
    assert forecast(spec, replace(USUAL, peers=least - 1)).memory_bytes > 24 * 2**30
    assert fewest_peers(spec, BFLOAT16, 4096, 2 * 2**30) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"peers": 0},
        {"peers": MAX_PEERS + 1},
        {"up_bytes_per_s": 0.0},
        {"rtt_ms": -1.0},
        {"context_tokens": 0},
        {"prompt_tokens": 0},
    ],
)
def test_what_no_swarm_can_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="forecast"):
        forecast(llama(), replace(USUAL, **wrong))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
