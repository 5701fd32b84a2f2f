"""generation_config.json as transformers reads it, and what is not followed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from p2pinfer.errors import CheckpointError
from p2pinfer.models.text.generation_file import GenerationDefaults, read_generation_defaults
from p2pinfer.models.text.sampling_config import LogitsRules, SamplingConfig


def read(folder: Path, name: str = "generation_config", /, **content: Any) -> GenerationDefaults:
    (folder / f"{name}.json").write_text(json.dumps(content))
    return read_generation_defaults(folder)


def test_without_files_nothing_is_asked_for(tmp_path: Path) -> None:
    assert read_generation_defaults(tmp_path) == GenerationDefaults()


def test_a_model_that_wants_to_be_sampled_is(tmp_path: Path) -> None:
    """As Qwen2.5-Instruct's file."""
    said = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    found = read(
        tmp_path, do_sample=True, eos_token_id=[5, 6], pad_token_id=1, transformers_version="5", **said
    )
    assert found == GenerationDefaults(
        SamplingConfig(temperature=0.7, top_p=0.8, top_k=20), LogitsRules(repetition_penalty=1.05)
    )


def test_what_a_sampled_model_leaves_open_is_the_library_s(tmp_path: Path) -> None:
    assert read(tmp_path, do_sample=True).sampling == SamplingConfig(temperature=1.0, top_k=50)
    assert read(tmp_path, do_sample=True, top_k=0).sampling == SamplingConfig(temperature=1.0)


def test_a_temperature_alone_samples_nothing(tmp_path: Path) -> None:
    for said in ({}, {"do_sample": False}, {"do_sample": None}):
        found = read(tmp_path, temperature=0.6, top_p=0.9, min_p=0.05, **said)
        assert found.sampling == SamplingConfig(top_p=0.9, min_p=0.05)


def test_every_rule_is_read(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        sequence_bias=[[[1, 2], -1.5], [[3], 2]],
        bad_words_ids=[[4], [5, 6]],
        no_repeat_ngram_size=3,
        min_length=4,
        min_new_tokens=2,
        forced_bos_token_id=7,
        forced_eos_token_id=2,
        exponential_decay_length_penalty=[8, 1.1],
        suppress_tokens=[9],
        begin_suppress_tokens=[10, 11],
        encoder_repetition_penalty=None,
        max_new_tokens=77,
        max_length=99,
        stop_strings="###",
    )
    assert found.rules == LogitsRules(
        sequence_bias=(((1, 2), -1.5), ((3,), 2.0)),
        bad_words_ids=((4,), (5, 6)),
        no_repeat_ngram_size=3,
        min_length=4,
        min_new_tokens=2,
        forced_bos_token_id=7,
        forced_eos_token_id=(2,),
        exponential_decay_length_penalty=(8, 1.1),
        suppress_tokens=(9,),
        begin_suppress_tokens=(10, 11),
    )
    assert (found.max_new_tokens, found.max_length, found.stop) == (77, 99, ("###",))


def test_an_old_model_says_it_in_its_config(tmp_path: Path) -> None:
    assert (
        read(tmp_path, "config", do_sample=True, temperature=0.5, hidden_size=8).sampling.temperature == 0.5
    )
    assert read(tmp_path, repetition_penalty=1.2).sampling == SamplingConfig()


def test_what_is_not_followed_is_named_unless_it_changes_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, num_beams=1, guidance_scale=None, penalty_alpha=0.0, use_cache=False).left_out == ()
    found = read(tmp_path, num_beams=4, guidance_scale=1.5, length_penalty=2.0, max_time=3)
    assert found.left_out == ("num_beams", "guidance_scale", "max_time")


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"top_k": 2.5}, "top_k"),
        ({"bad_words_ids": [3]}, "bad_words_ids"),
        ({"suppress_tokens": "all"}, "suppress_tokens"),
        ({"exponential_decay_length_penalty": [1]}, "exponential_decay_length_penalty"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(said: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json has an invalid value: .*{named}"):
        read(tmp_path, **said)
