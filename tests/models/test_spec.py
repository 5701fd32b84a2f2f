from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from p2pinfer.errors import CheckpointError, SpanOutOfRange
from p2pinfer.models.numbers import revision_digest
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.spec import model_spec, revision_of

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


def test_a_size_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(CheckpointError, match="says hidden_size = '8'"):
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
