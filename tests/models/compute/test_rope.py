from __future__ import annotations

from copy import deepcopy
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

from p2pinfer.models.compute.rope import Rope, rotate
from p2pinfer.models.configs.defaults import complete_config

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 96,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
_FACTOR = st.floats(1, 64)
_ORIGINAL = {"original_max_position_embeddings": st.integers(32, 8192)}
_DIVISORS = st.lists(st.floats(1, 64), min_size=12, max_size=12)
# By type: what it needs, and what it may have.
_SCALED: dict[str, tuple[dict[str, st.SearchStrategy[Any]], dict[str, st.SearchStrategy[Any]]]] = {
    "default": ({}, {}),
    "linear": ({"factor": _FACTOR}, {}),
    "llama3": (
        {
            "factor": _FACTOR,
            "low_freq_factor": st.floats(0.5, 3.5),
            "high_freq_factor": st.floats(4, 9),
        },
        _ORIGINAL,
    ),
    "yarn": (
        {"factor": st.none() | _FACTOR},
        {
            **_ORIGINAL,
            "beta_fast": st.none() | st.sampled_from([0, 16, 30, 64]),
            "beta_slow": st.none() | st.floats(0.5, 8),
            "attention_factor": st.none() | st.floats(0.5, 2),
            "mscale": st.none() | st.just(0) | st.floats(0.5, 2),
            "mscale_all_dim": st.none() | st.just(0) | st.floats(0.5, 2),
            "truncate": st.none() | st.booleans(),
        },
    ),
    "dynamic": ({"factor": _FACTOR}, {}),
    "longrope": (
        {"short_factor": _DIVISORS, "long_factor": _DIVISORS},
        {**_ORIGINAL, "factor": st.none() | _FACTOR, "attention_factor": st.none() | st.floats(0.5, 2)},
    ),
    "proportional": ({}, {"factor": _FACTOR, "partial_rotary_factor": st.floats(0.1, 1)}),
}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A config in any spelling that its rope ever had."""
    rope_type = draw(st.sampled_from(sorted(_SCALED)))
    required, optional = _SCALED[rope_type]
    rope = draw(st.fixed_dictionaries(required, optional=optional))
    rope[draw(st.sampled_from(["type", "rope_type"]))] = rope_type
    config = {**CONFIG, draw(st.sampled_from(["rope_scaling", "rope_parameters"])): rope}
    for holder in draw(st.sets(st.sampled_from(["config", "rope"]))):
        (config if holder == "config" else rope)["rope_theta"] = draw(st.sampled_from([1e4, 500_000, 1e6]))
    config.update(draw(st.fixed_dictionaries({}, optional=_ORIGINAL)))
    config["max_position_embeddings"] = draw(st.sampled_from([64, 900, 1000, 1001, 4096]))
    return config


def rope(config: dict[str, Any]) -> Rope:
    complete = complete_config("m", config)
    return Rope(complete["rope_parameters"], complete["head_dim"], torch.device("cpu"))


def rotary_of(config: dict[str, Any]) -> Any:
    """transformers' rotary embedding for the same config.json."""
    family: Any = LlamaConfig
    return modeling_llama.LlamaRotaryEmbedding(family.from_dict(deepcopy(config)))


@given(configs())
def test_angles_are_those_of_transformers(config: dict[str, Any]) -> None:
    rotary = rotary_of(config)
    position = 1000
    rotary(torch.zeros(1), torch.tensor([[position]]))  # so that what depends on the length is of this one
    turned = rope(config).at(torch.tensor([position]), torch.float64)
    # The angle is a float32: a unit in its last place is a ten thousandth of a radian here.
    angles = position * rotary.inv_freq.double()
    torch.testing.assert_close(
        turned.cos[0, 0, :12], angles.cos() * rotary.attention_scaling, rtol=0, atol=1e-3
    )
    torch.testing.assert_close(
        turned.sin[0, 0, 12:], angles.sin() * rotary.attention_scaling, rtol=0, atol=1e-3
    )


def test_plain_frequencies_are_those_of_transformers_to_the_bit() -> None:
    rotary = rotary_of(CONFIG)
    positions = torch.arange(0, 4096, 7)
    cos, sin = rotary(torch.zeros(1), positions[None])
    turned = rope(CONFIG).at(positions, torch.float32)
    assert torch.equal(turned.cos[:, 0], cos[0])
    assert torch.equal(turned.sin[:, 0].abs(), sin[0].abs())


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_each_token_is_turned_by_its_own_position(rope_type: str) -> None:
    """As transformers turns one token after the other; its embedding's state only grows."""
    longrope = {"original_max_position_embeddings": 60, "short_factor": [1.0] * 12, "long_factor": [3.0] * 12}
    scaled = longrope if rope_type == "longrope" else {"factor": 2.0}
    config = {**CONFIG, "max_position_embeddings": 60, "rope_parameters": {"rope_type": rope_type, **scaled}}
    rotary, positions = rotary_of(config), torch.tensor([0, 1, 58, 59, 60, 61, 200])
    expected = [rotary(torch.zeros(1), position.view(1, 1))[0][0, 0] for position in positions]
    turned = rope(config).at(positions, torch.float32)
    torch.testing.assert_close(turned.cos[:, 0], torch.stack(expected), rtol=0, atol=3e-5)
    plain = rope({**config, "rope_parameters": {}})
    differs = ((turned.cos - plain.at(positions, torch.float32).cos)[:, 0].abs() > 1e-3).any(-1)
    assert differs.tolist() == [False] * 4 + [True] * 3


@pytest.mark.parametrize("rope_type", ["default", "linear", "llama3", "yarn"])
def test_heads_are_turned_as_transformers_turns_them(rope_type: str) -> None:
    scaled: dict[str, Any] = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = {**CONFIG, "rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4, **scaled}}
    positions = torch.tensor([5, 0, 200, 63, 64])
    heads = torch.randn(5, 4, 24, generator=torch.Generator().manual_seed(0))
    apply = cast("Any", modeling_llama.apply_rotary_pos_emb)
    cos, sin = rotary_of(config)(heads, positions[None])
    expected, _ = apply(heads, heads, cos[0], sin[0], unsqueeze_dim=1)
    turning = rope(config)
    size = float(heads.abs().max())
    rotate(heads, turning.at(positions, torch.float32))
    # Two ways to a frequency may end one unit apart, which an angle has as often as it has turned.
    unit = torch.finfo(torch.float32).eps * float(positions.max())
    torch.testing.assert_close(heads, expected, atol=2 * unit * size, rtol=0)
