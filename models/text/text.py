"""Tokenizer of a model folder, for the client.

Only `tokenizers` is imported, in 40 ms.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import tokenizers

from p2pinfer.errors import CheckpointError
from p2pinfer.models.checkpoint.spec import read_json
from p2pinfer.text_files import read_text

from .added_tokens import add_tokens
from .text_stream import PieceDecoder, TextStream

if TYPE_CHECKING:
    from .grammar import Vocabularies


class Tokenizer:
    """A checkpoint's tokenizer, and what its files say about special tokens.

    Attributes:
        eos_ids: The tokens that end a text.
        special_texts: What special tokens look like where they are shown, by id.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, eos_ids: frozenset[int]) -> None:
        self.eos_ids = eos_ids
        self._backend: Any = backend  # its stubs leave out what the decoder says of itself
        self._backend.no_truncation()  # some files carry the truncation of their training
        self._backend.no_padding()
        if self._backend.decoder is None:
            raise CheckpointError("the tokenizer has no decoder, so its tokens cannot be turned into text")
        self._pieces = PieceDecoder(json.loads(self._backend.decoder.__getstate__()))
        added: Mapping[int, Any] = self._backend.get_added_tokens_decoder()
        self.special_texts: Mapping[int, str] = {
            token_id: self._pieces.piece_bytes(token.content).decode("utf-8", "replace")
            for token_id, token in added.items()
            if token.special
        }

    @cached_property
    def vocabularies(self) -> Vocabularies:
        """The tokens as grammars need them."""
        from .grammar import Vocabularies  # which imports torch; a tokenizer alone does without

        return Vocabularies(self)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text, with the special tokens that the checkpoint puts around it."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Iterable[int], *, show_special: bool = False) -> str:
        """The text of these tokens, without special ones unless they are to be shown; see `TextStream`."""
        stream = TextStream(self, at_start=True, show_special=show_special)
        return "".join([stream.push(token_id) for token_id in token_ids]) + stream.finish()

    def piece(self, token_id: int) -> str:
        """Name of a token in the vocabulary; empty if it has none of that id."""
        piece: str | None = self._backend.id_to_token(token_id)
        return piece or ""

    def vocabulary(self) -> dict[str, int]:
        """The id of every token by its name in the vocabulary, those that were added included."""
        known: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return known

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token adds to a text; none for special tokens and those past the vocabulary."""
        return b"" if token_id in self.special_texts else self._pieces.piece_bytes(self.piece(token_id))

    def first_bytes(self, token_id: int) -> bytes:
        """The same for the token that a whole text begins with, without a space of the tokenizer's own."""
        return b"" if token_id in self.special_texts else self._pieces.first_bytes(self.piece(token_id))


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder.

    Raises:
        CheckpointError: tokenizer.json is missing, damaged, or of a kind that cannot be decoded in parts.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no tokenizer.json; write one with transformers' AutoTokenizer")
    try:
        backend = tokenizers.Tokenizer.from_str(read_text(path))
    except Exception as exc:  # the Rust side raises plain Exception, and the file may be unreadable
        raise CheckpointError(f"{path} is damaged: {exc}; fetch it again") from exc
    eos = add_tokens(backend, folder)
    return Tokenizer(backend, eos_ids=_eos_ids(folder) or _id_of(backend, eos))


def _eos_ids(folder: Path) -> frozenset[int]:
    """End tokens of generation_config, or of config, as in transformers' generate; empty if neither says."""
    for name in ("generation_config.json", "config.json"):
        match (read_json(folder / name) or {}).get("eos_token_id"):
            case int(token_id):
                return frozenset({token_id})
            case [int(), *_] as token_ids:
                return frozenset(cast("list[int]", token_ids))
            case _:
                pass
    return frozenset()


def _id_of(backend: tokenizers.Tokenizer, text: str | None) -> frozenset[int]:
    found = None if text is None else backend.token_to_id(text)
    return frozenset() if found is None else frozenset({found})
