"""Each family gives the tokens of transformers, and reads or refuses each field of its config."""

from __future__ import annotations

import dataclasses
import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from p2pinfer.models.configs.family_rules import FAMILIES, RULES
from p2pinfer.models.configs.not_computed import NOT_COMPUTED
from p2pinfer.models.configs.values import READ

from .parity import compare, write_model
from .samples import SAMPLES

ROOT = Path(__file__).parents[3]
# Of fields that no forward pass reads, or only one that trains.
WITHOUT_EFFECT = frozenset(
    {
        "architectures",
        "attention_dropout",
        "attn_pdrop",
        "bos_token_id",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "dtype",
        "embd_pdrop",
        "embedding_dropout",
        "eos_token_id",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "resid_pdrop",
        "residual_dropout",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "transformers_version",
        "use_cache",
        "is_decoder",
        "rope_parameters",
        "original_max_position_embeddings",
    }
)
OTHERS = sorted(FAMILIES - {"llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma2"})


@pytest.mark.parametrize("family", OTHERS)
def test_the_tokens_of_a_family_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """The others have this in compute/test_runner.py; `make families` tries each option and split."""
    expected = write_model(tmp_path, family, SAMPLES[family].config, prompts=2, tokens=8)
    assert len({token for ids in expected.ids for token in ids}) > 4, (
        "a text that repeats itself shows little"
    )
    compare(tmp_path, expected, (0, 1, 4), recorded=True)


def test_every_family_has_a_sample() -> None:
    assert SAMPLES.keys() == FAMILIES


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_field_of_a_familys_config_is_read_refused_or_without_effect(family: str) -> None:
    rules = RULES[family]
    known = (
        READ | WITHOUT_EFFECT | NOT_COMPUTED.keys() | rules.unread | rules.refused.keys() | rules.names.keys()
    )
    fields = {field.name for field in dataclasses.fields(CONFIG_MAPPING[family])}
    assert fields - known == set(), "see whether it changes the logits"


def test_the_defaults_are_those_of_transformers_classes() -> None:
    script: Mapping[str, Any] = runpy.run_path(str(ROOT / "scripts" / "write_family_defaults.py"))
    written = (ROOT / "models" / "configs" / "family_defaults.json").read_text(encoding="utf-8")
    assert written == script["defaults"](), "run scripts/write_family_defaults.py"


def test_the_table_of_families_is_of_all_of_them() -> None:
    table = json.loads((ROOT / "docs" / "family_parity.json").read_text(encoding="utf-8"))
    assert table.keys() == FAMILIES, "run `make families`"
    assert all(row["options"] == sorted(SAMPLES[family].variants) for family, row in table.items())
