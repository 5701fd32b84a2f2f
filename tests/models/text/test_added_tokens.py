"""Special tokens that stand in other files than tokenizer.json, against transformers' own reading of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from p2pinfer.errors import CheckpointError
from p2pinfer.models.text.text import Tokenizer, load_tokenizer

PreTrainedTokenizerFast: Any = transformers.PreTrainedTokenizerFast

TEXT = "ab<|im_end|>b<|tool|>a</s>b<think>a <|user|>"


def write(folder: Path, added: list[str], **files: Any) -> Path:
    """A model folder with a tokenizer of a few letters, and other files."""
    letters = ["a", "b", "Ġ", *"<|>/_ceghiklmnorstudp"]
    backend: Any = tokenizers.Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate([*letters, "</s>"])}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(added)
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def token(content: str, *, special: bool = True, **others: Any) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": content, "special": special, **flags, **others}


CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "added_tokens_decoder": (
        [],
        {
            "tokenizer_config": {
                "added_tokens_decoder": {
                    "25": token("<|im_end|>"),
                    "24": token("<think>", special=False),
                    "26": token("<|user|>", lstrip=True),
                },
                "eos_token": "<|im_end|>",
            }
        },
    ),
    "added_tokens_decoder beside a map that does not count": (
        ["<|im_end|>"],
        {
            "tokenizer_config": {
                "added_tokens_decoder": {"24": token("<|im_end|>")},
                "pad_token": "<|tool|>",
            },
            "special_tokens_map": {"eos_token": "<|im_end|>", "unk_token": "<think>"},
        },
    ),
    "added_tokens.json": (
        [],
        {
            "tokenizer_config": {"eos_token": "<|im_end|>"},
            "added_tokens": {"<|im_end|>": 25, "<think>": 24},
        },
    ),
    "the map, as text": (["<|im_end|>"], {"special_tokens_map": {"eos_token": "<|im_end|>"}}),
    "the map, as a token": (
        [],
        {
            "tokenizer_config": {"eos_token": "<think>"},
            "special_tokens_map": {
                "eos_token": {key: value for key, value in token("<|im_end|>").items() if key != "special"},
                "additional_special_tokens": ["<|tool|>", "<|user|>"],
            },
        },
    ),
    "the settings, as a token": (
        [],
        {
            "tokenizer_config": {
                "eos_token": {"__type": "AddedToken", **token("<|im_end|>")},
                "extra_special_tokens": ["<|tool|>"],
                "image_token": "<|user|>",
            }
        },
    ),
    "a word of the vocabulary": ([], {"tokenizer_config": {"eos_token": "</s>"}}),
    "nothing": (["<|im_end|>"], {}),
}


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Tokenizer, Any]:
    """A tokenizer, and transformers' of the same folder."""
    added, files = CASES[request.param]
    folder = write(tmp_path, added, **files)
    return load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)


def test_tokens_and_what_is_special_are_as_in_transformers(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    ids = ours.encode(TEXT)
    assert ids == theirs(TEXT).input_ids
    special = {id_: str(each) for id_, each in theirs.added_tokens_decoder.items() if each.special}
    assert dict(ours.special_texts) == special
    assert ours.eos_ids == ({theirs.eos_token_id} if theirs.eos_token_id is not None else set())
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, show_special=True) == theirs.decode(ids)


def test_the_cases_hold_something_to_be_found(pair: tuple[Tokenizer, Any], request: Any) -> None:
    ours, _ = pair
    case: str = request.node.callspec.params["pair"]
    assert bool(ours.eos_ids) == (case != "nothing" and "does not count" not in case)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"added_tokens_decoder": {"x": token("<a>")}}},
        {"tokenizer_config": {"added_tokens_decoder": {"24": 7}}},
        {"tokenizer_config": {"added_tokens_decoder": {"24": token("<a>", lstrip="no")}}},
        {"tokenizer_config": {"eos_token": 7}},
        {"special_tokens_map": {"additional_special_tokens": 7}},
        {"added_tokens": {"<a>": "last"}},
        {"added_tokens": {"<a>": None}},
    ],
)
def test_what_is_no_token_is_refused(files: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="lists invalid added tokens"):
        load_tokenizer(write(tmp_path, [], **files))
