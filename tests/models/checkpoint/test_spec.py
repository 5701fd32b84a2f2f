from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from p2pinfer.errors import CheckpointError, SpanOutOfRange
from p2pinfer.models.checkpoint.spec import model_spec, revision_of
from p2pinfer.models.configs.numbers import revision_digest
from p2pinfer.models.span import BlockSpan

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 16,
    "vocab_size": 16,
    "max_position_embeddings": 32,
    "dtype": "float16",
}
SHARDS = {"a.safetensors": "00", "b.safetensors": "11"}


def test_the_revision_is_a_fixed_function_of_config_and_shards() -> None:
    """Peers of different versions must agree on it, so this value may never change."""
    assert revision_of(CONFIG, SHARDS) == "35496aa369dfa05cbe596f51143d76d1"


def test_the_revision_ignores_order_and_whose_transformers_wrote_the_config() -> None:
    reordered = dict(reversed(CONFIG.items()))
    noisy = {**reordered, "transformers_version": "9.9", "_name_or_path": "somewhere"}
    assert revision_of(noisy, dict(reversed(SHARDS.items()))) == revision_of(CONFIG, SHARDS)


@pytest.mark.parametrize(
    ("config", "shards"),
    [
        ({"rope_theta": 1e6}, {}),
        ({}, {"b.safetensors": "12"}),
        ({}, {"c.safetensors": "22"}),
    ],
)
def test_the_revision_changes_with_anything_that_counts(
    config: dict[str, Any], shards: dict[str, str]
) -> None:
    assert revision_of({**CONFIG, **config}, {**SHARDS, **shards}) != revision_of(CONFIG, SHARDS)


def test_a_spec_tells_its_weights_from_its_numbers() -> None:
    spec = model_spec("m", CONFIG, SHARDS)
    other = model_spec("m", {**CONFIG, "rope_theta": 1e6}, SHARDS)
    assert spec.revision == revision_of(CONFIG, SHARDS) == revision_digest(spec.weights, spec.numbers)
    assert (spec.weights == other.weights, spec.numbers == other.numbers) == (True, False)


def test_what_a_config_leaves_out_its_family_decides() -> None:
    spec = model_spec("m", {"model_type": "gemma2"}, SHARDS)
    assert (spec.family, spec.num_blocks, spec.hidden_size, spec.vocab_size) == ("gemma2", 26, 2304, 256_000)
    assert (spec.kv_heads, spec.head_dim, spec.max_positions, spec.dtype) == (4, 256, 8192, "float32")


YARN: dict[str, Any] = {"type": "yarn", "factor": 4.0}
ORIGINAL = "original_max_position_embeddings"
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"type": "longrope", "short_factor": [1, 1], "long_factor": [4, 8]}


@pytest.mark.parametrize(
    ("positions", "rope", "beside", "tokens"),
    [
        # Qwen2.5, as its card tells to extend it; the length within the dict, beside it, left out.
        (32768, {**YARN, ORIGINAL: 32768}, None, 131_072),
        (32768, YARN, 32768, 131_072),
        (32768, YARN, None, 131_072),
        # Qwen3, whose own length is longer than what it was trained with.
        (40960, {**YARN, ORIGINAL: 32768}, None, 131_072),
        # The extended length itself, and a factor that is left to it.
        (163_840, {**YARN, "factor": 40.0, ORIGINAL: 4096}, None, 163_840),
        (16384, {**YARN, "factor": None, ORIGINAL: 4096}, None, 16384),
        # Vicuna 1.5 16k, LongChat 1.5 32k.
        (4096, {"type": "linear", "factor": 4.0}, None, 16384),
        (4096, {"rope_type": "linear", "factor": 8.0}, None, 32768),
        (4096, {"type": "linear", "factor": 0.5}, None, 4096),
        (4096, {"type": "linear", "factor": 2.5}, None, 10240),
        (2048, {"type": "dynamic", "factor": 4.0}, None, 8192),
        (2048, {"rope_type": "proportional", "factor": 2.0}, None, 4096),
        # Llama 3.2, whose factor is not the ratio of its lengths; Phi 3.5's way to say it.
        (131_072, {**LLAMA3, ORIGINAL: 8192}, None, 131_072),
        (131_072, LONGROPE, 4096, 131_072),
        (4096, {"rope_type": "default", "factor": 4.0}, None, 4096),
    ],
)
def test_rope_scaling_extends_the_context(
    positions: int, rope: dict[str, Any], beside: int | None, tokens: int
) -> None:
    config = {**CONFIG, "max_position_embeddings": positions, "rope_scaling": rope}
    said = {} if beside is None else {ORIGINAL: beside}
    assert model_spec("m", {**config, **said}, SHARDS).max_positions == tokens


def test_a_rope_that_depends_on_the_length_limits_the_prompt_and_not_the_text() -> None:
    dynamic = model_spec("m", {**CONFIG, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, SHARDS)
    assert (dynamic.max_positions, dynamic.prompt_limit) == (128, 32)
    longrope = model_spec("m", {**CONFIG, "rope_scaling": {**LONGROPE, ORIGINAL: 8}}, SHARDS)
    assert (longrope.max_positions, longrope.prompt_limit) == (32, 8)
    assert model_spec("m", CONFIG, SHARDS).prompt_limit is None


def test_a_size_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(CheckpointError, match="value hidden_size = '8'"):
        model_spec("m", {**CONFIG, "hidden_size": "8"}, SHARDS)


def test_a_block_is_as_big_as_its_weights() -> None:
    attention, feed_forward = 8 * (8 + 4 + 4 + 8), 3 * 8 * 16
    assert model_spec("m", CONFIG, SHARDS).block_parameters == attention + feed_forward
    experts = {**CONFIG, "model_type": "mixtral", "num_local_experts": 4}
    assert model_spec("m", experts, SHARDS).block_parameters == attention + 4 * feed_forward


def test_a_dtype_that_is_not_computed_in_is_refused() -> None:
    with pytest.raises(CheckpointError, match="stored as float8"):
        model_spec("m", {**CONFIG, "dtype": "float8"}, SHARDS)


def test_the_older_name_of_the_dtype_counts_too() -> None:
    config = {key: value for key, value in CONFIG.items() if key != "dtype"}
    assert model_spec("m", {**config, "torch_dtype": "bfloat16"}, SHARDS).dtype == "bfloat16"


def test_a_span_past_the_last_block_is_refused() -> None:
    spec = replace(model_spec("m", CONFIG, SHARDS), num_blocks=8)
    spec.check_span(BlockSpan(0, 8))
    with pytest.raises(SpanOutOfRange, match="m has the blocks 0:8, so 7:9 is out of range"):
        spec.check_span(BlockSpan(7, 9))
