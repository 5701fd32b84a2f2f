"""What of a config is part of a revision: all that changes the logits, and nothing that does not."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import logging as transformers_logging

from p2pinfer.errors import CheckpointError
from p2pinfer.models.checkpoint.spec import revision_of
from p2pinfer.models.configs.family_rules import FAMILIES
from p2pinfer.models.configs.numbers import MAX_NUMBERS, differences, numbers_of, revision_digest

from ..families.samples import SAMPLES

WriteCheckpoint = Callable[..., Path]

SHARDS = {"model.safetensors": "0" * 64}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 16,
    "max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
# Of transformers' own, as different releases and other tools write it.
METADATA: list[dict[str, Any]] = [
    {"use_cache": False},
    {"transformers.js_config": {"dtype": "q4"}},
    {"eos_token_id": [0, 1]},
    {"architectures": None},
    {"_name_or_path": "elsewhere", "transformers_version": "3.0.0", "_commit_hash": "f" * 40},
    {"dtype": "float32"},
    {"torch_dtype": "float32"},
    {"pad_token_id": 5, "bos_token_id": None},
    {"initializer_range": 0.5, "attention_dropout": 0.1, "pretraining_tp": 2},
    {"id2label": {"0": "a"}, "auto_map": {"AutoConfig": "x.Y"}, "torchscript": True},
    {"max_position_embeddings": 64},
    {"quantize_me": {"bits": 4}, "unsloth_version": "1", "output_attentions": False},
]


def read(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    return config


def auto_config() -> Any:
    return AutoConfig


def resaved(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The config as transformers writes it back."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    auto_config().from_pretrained(folder).save_pretrained(folder)
    return read(folder)


def test_the_head_that_the_files_hold_is_used_whatever_the_config_says_of_it() -> None:
    gemma = {"model_type": "gemma2"}
    assert numbers_of({**gemma, "tie_word_embeddings": False}) == numbers_of(gemma)
    assert numbers_of({**LLAMA, "tie_word_embeddings": True}) == numbers_of(LLAMA)


@pytest.mark.parametrize("change", METADATA, ids=lambda change: next(iter(change)))
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_no_forward_pass_reads_is_no_other_model(family: str, change: dict[str, Any]) -> None:
    config = {"model_type": family}
    assert revision_of({**config, **change}, SHARDS) == revision_of(config, SHARDS)


@pytest.mark.parametrize(
    "rope", [None, {"type": "linear", "factor": 2}, YARN], ids=["plain", "linear", "yarn"]
)
@pytest.mark.parametrize("family", ["gemma2", "llama", "mistral", "mixtral", "qwen2", "qwen3"])
def test_transformers_may_save_a_config_again(
    family: str, rope: dict[str, Any] | None, write_checkpoint: WriteCheckpoint, tmp_path: Path
) -> None:
    written = read(write_checkpoint(tmp_path / "written", family))
    assert "rope_parameters" in written
    old = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype")}
    old |= {"rope_theta": 25_000, "rope_scaling": rope, "torch_dtype": "float32"}
    new = resaved(old, tmp_path / "new")
    assert new.keys() != old.keys(), "transformers changed nothing, so nothing is shown"
    assert numbers_of(new) == numbers_of(old)
    assert numbers_of(resaved(new, tmp_path / "newer")) == numbers_of(old)
    filled = auto_config().from_pretrained(tmp_path / "new").to_dict()
    assert numbers_of(json.loads(json.dumps(filled))) == numbers_of(old)


@pytest.mark.parametrize("family", sorted(SAMPLES))
def test_transformers_may_save_any_familys_config_again(family: str, tmp_path: Path) -> None:
    said = {"model_type": family, **SAMPLES[family].config}
    new = resaved(said, tmp_path / "new")
    assert numbers_of(new) == numbers_of(said)
    assert numbers_of(resaved(new, tmp_path / "newer")) == numbers_of(said)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_defaults_may_be_written_or_left_out(family: str) -> None:
    whole: Any = auto_config().for_model(family).to_dict()
    assert numbers_of(json.loads(json.dumps(whole))) == numbers_of({"model_type": family})


def test_a_number_may_be_written_with_a_fraction_or_without() -> None:
    whole = {**LLAMA, "rope_theta": 50_000, "rope_scaling": {"type": "linear", "factor": 2}}
    real = {**LLAMA, "rope_theta": 50_000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert numbers_of(whole) == numbers_of(real)


def test_a_list_of_numbers_counts_however_long_it_is() -> None:
    def numbers(short: list[float]) -> str:
        rope = {"rope_type": "longrope", "short_factor": short, "long_factor": [2.0] * 64, "factor": 4}
        return numbers_of({"model_type": "llama", "rope_scaling": rope})

    assert numbers([1] * 64) == numbers([1.0] * 64)
    divisors = [1 + index / 7 for index in range(64)]
    assert numbers(divisors) != numbers([*divisors[:-1], 3.0])
    assert len(numbers(divisors)) < 400  # so that an announcement has room for it


def test_a_window_that_no_block_has_is_none() -> None:
    off = {"model_type": "qwen2", "use_sliding_window": False}
    assert numbers_of({**off, "sliding_window": 7}) == numbers_of(off)
    all_full = {"model_type": "gemma2", "layer_types": ["full_attention"] * 26}
    assert numbers_of({**all_full, "sliding_window": 7}) == numbers_of(all_full)
    assert numbers_of(all_full) != numbers_of({"model_type": "gemma2"})
    none = {"model_type": "mistral", "sliding_window": None}
    assert numbers_of(none) != numbers_of({"model_type": "mistral"})


def test_every_block_counts() -> None:
    kinds = ["sliding_attention", "full_attention"] * 13
    usual, other = numbers_of({"model_type": "gemma2"}), [*kinds[:-1], "sliding_attention"]
    assert numbers_of({"model_type": "gemma2", "layer_types": kinds}) == usual
    assert numbers_of({"model_type": "gemma2", "layer_types": other}) != usual


# What is tried in place of a value; a value of another type where null means none.
OTHERS: dict[str, list[Any]] = {
    "hidden_act": ["gelu"],
    "hidden_activation": ["gelu"],
    "sliding_window": [None, 6],
    "layer_types": [["full_attention"] * 4, ["full_attention", *["sliding_attention"] * 3]],
    "attn_logit_softcapping": [None, 2.0],
    "final_logit_softcapping": [None, 2.0],
    "use_sliding_window": [True, False],
    "rope_scaling": [
        {"rope_type": "linear", "factor": 2.0},
        {**YARN, "original_max_position_embeddings": 64},
    ],
}
IDS = torch.arange(3, 63).unsqueeze(0)


def changes(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The config with one field changed, for all fields, those of the rope among them."""
    # Where the files hold no head and it is not tied, transformers draws one, and p2pinfer refuses the model.
    passed_over = {"model_type", "rope_parameters", "tie_word_embeddings"}
    for key in sorted({*config, "rope_scaling"} - passed_over):
        for value in others(key, config.get(key)):
            if value != config.get(key):
                yield key, {**config, key: value}
    for key, value in config["rope_parameters"].items():
        for other in others(key, value):
            changed = deepcopy(config)
            changed["rope_parameters"][key] = other
            yield f"rope_parameters.{key}", changed


def others(key: str, value: Any) -> list[Any]:
    if key in OTHERS:
        return OTHERS[key]
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, value * 2, max(1, value // 2)]
        case float():
            return [value * 1.5, value / 4]
        case _:
            return []


def logits_of(config: dict[str, Any], weights: Path, folder: Path) -> torch.Tensor | None:
    """transformers' logits of these weights under a config; None where the two do not fit."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors").symlink_to(weights)
    torch.manual_seed(0)  # what the file lacks is drawn
    try:
        auto: Any = AutoModelForCausalLM
        model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        with torch.inference_mode():
            logits: torch.Tensor = model(IDS).logits
    except Exception:  # transformers has many ways to say so
        return None
    return logits


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        *("gemma2", "llama", "mixtral"),
        *(pytest.param(each, marks=pytest.mark.sweep) for each in ("mistral", "qwen2", "qwen3")),
    ],
)
def test_each_field_that_changes_the_logits_is_another_model_or_refused(
    family: str, write_checkpoint: WriteCheckpoint, tmp_path: Path
) -> None:
    """Every key that transformers knows of the family, on the same weights; a tenth of them matters."""
    quiet: Any = transformers_logging
    quiet.set_verbosity(logging.CRITICAL)
    weights = write_checkpoint(tmp_path / "model", family) / "model.safetensors"
    whole: dict[str, Any] = json.loads(
        json.dumps(auto_config().from_pretrained(tmp_path / "model").to_dict())
    )
    usual, before = logits_of(whole, weights, tmp_path / "try"), numbers_of(whole)
    assert usual is not None
    counted: set[str] = set()
    for key, changed in changes(whole):
        logits = logits_of(changed, weights, tmp_path / "try")
        if logits is None or (logits.shape == usual.shape and torch.allclose(logits, usual, atol=1e-5)):
            continue
        try:
            assert numbers_of(changed) != before, f"{key} = {changed.get(key)} changes the logits"
        except CheckpointError:
            continue  # nobody runs it, so nobody's output differs
        counted.add(key)
    assert {"rms_norm_eps", "rope_parameters.rope_theta"} <= counted


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ({}, {"rope_theta": 5e5}, "rope_theta is 10000 here and 500000 there"),
        ({"rms_norm_eps": 1e-5}, {}, "rms_norm_eps is 1e-05 here and 1e-06 there"),
        (
            {},
            {"rope_scaling": {"type": "linear", "factor": 2.5}},
            "factor is unset here and 2.5 there; rope_type is 'default' here and 'linear' there",
        ),
        ({}, {"head_dim": 8}, "head_dim is 4 here and 8 there"),
    ],
)
def test_the_field_that_differs_is_named(ours: dict[str, Any], theirs: dict[str, Any], said: str) -> None:
    assert differences(numbers_of({**LLAMA, **ours}), numbers_of({**LLAMA, **theirs})) == said


@pytest.mark.parametrize(
    "theirs",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"model_type": "bert"}',
        '{"model_type": ["llama"]}',
        '{"model_type": "llama", "a\\u001b[2J": 1}',
        '{"model_type": "llama", "rope": {"deep": 1}}',
        '{"model_type": "llama", "x": "' + "y" * MAX_NUMBERS + '"}',
        "[" * 1000,
    ],
)
def test_what_a_peer_makes_up_is_not_shown(theirs: str) -> None:
    assert differences(numbers_of(LLAMA), theirs) == ""


@given(
    st.text(max_size=40),
    st.dictionaries(st.text(max_size=6), st.none() | st.text() | st.floats() | st.integers()),
)
def test_whatever_a_peer_says_can_be_printed_in_a_line(text: str, made_up: dict[str, object]) -> None:
    for theirs in (text, json.dumps({**made_up, "model_type": "llama", "rope_type": text})):
        shown = differences(numbers_of(LLAMA), theirs)
        assert shown.isprintable()
        assert len(shown) < 800


def test_weights_and_numbers_are_the_revision() -> None:
    spec_like = revision_digest("0" * 32, numbers_of(LLAMA))
    assert spec_like != revision_digest("1" * 32, numbers_of(LLAMA))
    assert spec_like != revision_digest("0" * 32, numbers_of({**LLAMA, "rope_theta": 2e4}))
