"""Where ids differ from transformers', and what makes them equal: docs/models.md tells users so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from p2pinfer.models.text.text import load_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer.json that keeps numbers whole, beside a config that names a class which does not."""
    level: Any = pre_tokenizers.ByteLevel
    pieces = ["<|end|>", *sorted(level.alphabet()), "12", "34", "1234"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=[("1", "2"), ("3", "4"), ("12", "34")]))
    backend.pre_tokenizer, backend.decoder = level(add_prefix_space=False), decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "eos_token_id": 0}))
    said = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    return tmp_path


def ids_by_transformers(folder: Path) -> list[int]:
    auto: Any = AutoTokenizer
    ids: list[int] = auto.from_pretrained(folder)("in 1234").input_ids
    return ids


def test_the_file_is_followed_and_not_the_class_that_it_names(folder: Path) -> None:
    ours = load_tokenizer(folder).encode("in 1234")
    library: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert list(ours) == library.encode("in 1234").ids
    assert len(ids_by_transformers(folder)) == len(ours) + 3, "digits one by one"


def test_what_transformers_has_saved_gives_the_ids_of_transformers(folder: Path) -> None:
    expected = ids_by_transformers(folder)
    auto: Any = AutoTokenizer
    auto.from_pretrained(folder).save_pretrained(folder)
    assert list(load_tokenizer(folder).encode("in 1234")) == expected
