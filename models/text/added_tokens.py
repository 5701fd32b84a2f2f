"""Tokens that other files than tokenizer.json add, as in transformers' PreTrainedTokenizerFast.

tokenizer_config.json may hold all added tokens (`added_tokens_decoder`). Where it does not, older files
count: special_tokens_map.json, which goes before tokenizer_config.json, and added_tokens.json. Last come
the special tokens that are named and were not among these. An id is the next free one, not the one that a
file says, unless the vocabulary has the token already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import tokenizers
from tokenizers import AddedToken

from p2pinfer.errors import CheckpointError
from p2pinfer.models.checkpoint.spec import read_json

_NAMED: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS: Final = ("extra_special_tokens", "additional_special_tokens")


def add_tokens(backend: tokenizers.Tokenizer, folder: Path) -> str | None:
    """Add what the files beside tokenizer.json name; returns the text of the token that ends a text.

    Raises:
        CheckpointError: A file is damaged.
    """
    settings = read_json(folder / "tokenizer_config.json") or {}
    present: Mapping[int, AddedToken] = cast(Any, backend).get_added_tokens_decoder()
    try:
        if isinstance(settings.get("added_tokens_decoder"), dict):
            named = _named(settings)
            others = _unnamed(settings)
            listed = _listed(settings["added_tokens_decoder"])
        else:
            settings |= read_json(folder / "special_tokens_map.json") or {}
            named, others = _named(settings), _unnamed(settings)
            specials = {token.content for token in (*named.values(), *others)}
            legacy = _legacy(read_json(folder / "added_tokens.json") or {}, specials)
            listed = [*present.values(), *legacy]
    except (TypeError, ValueError, AttributeError) as exc:
        raise CheckpointError(f"{folder} lists invalid added tokens: {exc}; fetch it again") from exc
    roles = {token.content for token in named.values()}
    for token in listed:
        token.special = token.special or token.content in roles
    known = {token.content for token in (*present.values(), *listed)}
    backend.add_tokens([*listed, *(each for each in (*named.values(), *others) if each.content not in known)])
    return named["eos_token"].content if "eos_token" in named else None


def _named(settings: Mapping[str, Any]) -> dict[str, AddedToken]:
    """The special tokens by their roles."""
    return {name: _token(settings[name]) for name in _NAMED if settings.get(name) is not None}


def _unnamed(settings: Mapping[str, Any]) -> list[AddedToken]:
    """Tokens of roles of the model's own, and those that merely are special."""
    own = [name for name in settings if name.endswith("_token") and name not in _NAMED]
    values: list[Any] = [settings[name] for name in own if isinstance(settings[name], str)]
    for name in _LISTS:
        value = settings.get(name) or ()
        values += value.values() if isinstance(value, dict) else cast("Sequence[Any]", value)
    return [_token(value) for value in values]


def _token(value: Any) -> AddedToken:
    """A token as files write it: its text, or all its attributes."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    attributes = {name: each for name, each in dict(value).items() if name not in ("__type", "special")}
    return AddedToken(**attributes, special=True)


def _listed(tokens: Mapping[str, Any]) -> list[AddedToken]:
    """In the order of their ids."""
    return [AddedToken(**tokens[key]) for key in sorted(tokens, key=int)]


def _legacy(ids: Mapping[str, Any], specials: set[str]) -> list[AddedToken]:
    """The tokens of added_tokens.json, which says of each its id alone."""
    return [
        AddedToken(text, special=text in specials, normalized=text not in specials)
        for text in sorted(ids, key=lambda text: int(ids[text]))
    ]
