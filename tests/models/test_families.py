from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from p2pinfer.errors import CheckpointError
from p2pinfer.models import spec
from p2pinfer.models.families import FAMILIES, describe_architecture


def config(family: str, **options: Any) -> Any:
    return AutoConfig.for_model(family, num_hidden_layers=4, **options)


def test_the_families_that_checkpoints_may_be_of_are_those_of_the_table() -> None:
    assert set(FAMILIES) == spec.FAMILIES


def test_windows_are_those_of_each_block() -> None:
    def windows(family: str, **options: Any) -> tuple[int | None, ...]:
        return describe_architecture(config(family, **options)).windows

    assert windows("llama") == (None,) * 4
    assert windows("mistral", sliding_window=9) == (9,) * 4
    assert windows("mistral", sliding_window=None) == (None,) * 4
    assert windows("gemma2", sliding_window=9) == (9, None, 9, None)
    assert windows("qwen2", sliding_window=9) == (None,) * 4
    assert windows("qwen3", sliding_window=9, use_sliding_window=True, max_window_layers=3) == (
        None,
        None,
        None,
        9,
    )


def test_numbers_come_from_the_config_where_it_has_them() -> None:
    gemma = describe_architecture(config("gemma2", query_pre_attn_scalar=144, hidden_size=256))
    assert gemma.attention_scale == 1 / 12
    assert (gemma.attention_softcap, gemma.logit_softcap, gemma.embedding_scale) == (50, 30, 16)
    llama = describe_architecture(config("llama", hidden_size=256, num_attention_heads=4, head_dim=None))
    assert (llama.head_dim, llama.attention_scale, llama.embedding_scale) == (64, 1 / 8, 1)
    assert llama.attention_softcap is llama.logit_softcap is None


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gpt2", {}, "family 'gpt2' is not one that p2pinfer runs (gemma2, llama,"),
        ("llama", {"hidden_act": "relu"}, "activation 'relu' is not one of gelu,"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope type 'dynamic'",
        ),
    ],
)
def test_what_is_not_computed_is_refused(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        describe_architecture(AutoConfig.for_model(family, **options))
    assert message in str(refusal.value)
