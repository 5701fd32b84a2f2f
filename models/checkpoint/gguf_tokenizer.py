"""Tokenizer of a GGUF file, as the files that a model folder would have.

llama.cpp keeps the vocabulary, the merges, the kinds of the tokens, and a name for the rule that splits a
text before them (`tokenizer.ggml.pre`). The rules are those of the models' own tokenizer.json, which
llama.cpp's names stand for; a name that is not known here makes no tokenizer, for a wrong split would give
other ids without a word.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

logger = logging.getLogger(__name__)

_CONTROL, _USER_DEFINED = 3, 4  # kinds of tokens
_LETTERS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES: Final = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_BYTES_SPLIT: Final = {**_BYTES, "use_regex": True}
_DIGITS: Final = {"type": "Digits", "individual_digits": True}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_LLAMA3: Final = [_split(_LETTERS + r"|\p{N}{1,3}" + _REST), _BYTES]
_QWEN: Final = [_split(_LETTERS + r"|\p{N}" + _REST), _BYTES]
# By llama.cpp's name: what splits a text before the merges.
_SPLITS: Final[Mapping[str, list[dict[str, Any]]]] = {
    "gpt-2": [_BYTES_SPLIT],
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN,
    "smollm": [_DIGITS, _BYTES_SPLIT],
}
_WHOLE_WORDS: Final = frozenset({"llama-bpe"})  # a word of the vocabulary is not put together by merges
_NORMALISED: Final = frozenset({"qwen2"})


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Contents by file name, as JSON or text; without tokenizer.json if its kind is not known here."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        return {}
    texts: list[str] = [str(each) for each in tokens]
    ids = {
        key: found
        for key in ("bos_token_id", "eos_token_id", "padding_token_id")
        if type(found := metadata.get(f"tokenizer.ggml.{key}")) is int and 0 <= found < len(texts)
    }
    files: dict[str, Any] = {
        "generation_config.json": {key.replace("padding", "pad"): ids[key] for key in ids}
    }
    said = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}
    config: dict[str, Any] = {name: texts[ids[key]] for name, key in said.items() if key in ids}
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
        files["chat_template.jinja"] = template
    files["tokenizer_config.json"] = config
    if (made := _tokenizer(metadata, texts, ids)) is not None:
        files["tokenizer.json"] = made
    return files


def _tokenizer(
    metadata: Mapping[str, Any], texts: list[str], ids: Mapping[str, int]
) -> dict[str, Any] | None:
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2" or pre not in _SPLITS:
        logger.warning(
            "the tokenizer of this GGUF, %.40r by the rule %.40r, is not known here: put the model's "
            "tokenizer.json beside the file to have its texts",
            model,
            pre,
        )
        return None
    kinds = metadata.get("tokenizer.ggml.token_type")
    kinds = kinds if isinstance(kinds, list) and len(kinds) == len(texts) else [1] * len(texts)
    added = [
        {
            "id": index,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for index, (text, kind) in enumerate(zip(texts, kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    merges = [str(each).split(" ", 1) for each in metadata.get("tokenizer.ggml.merges") or ()]
    begins = metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe") and "bos_token_id" in ids
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre in _NORMALISED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _SPLITS[pre]},
        "post_processor": _beginning(texts[ids["bos_token_id"]], ids["bos_token_id"]) if begins else None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {
            "type": "BPE",
            "vocab": {text: index for index, text in enumerate(texts)},
            "merges": [each for each in merges if len(each) == 2],
            "ignore_merges": pre in _WHOLE_WORDS,
        },
    }


def _beginning(text: str, token_id: int) -> dict[str, Any]:
    """Template that puts a token before a text."""
    first = {"SpecialToken": {"id": text, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            first,
            {"Sequence": {"id": "A", "type_id": 0}},
            first,
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {text: {"id": text, "ids": [token_id], "tokens": [text]}},
    }
