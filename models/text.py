"""Text to tokens and back, token by token: what the client needs and a node does not.

Only `tokenizers` is imported, in 40 ms.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import tokenizers

from p2pinfer.errors import CheckpointError, ConfigError
from p2pinfer.text_files import read_text

from .pieces import PieceDecoder
from .spec import read_json


class Tokenizer:
    """A checkpoint's tokenizer, and what its files say about special tokens.

    Attributes:
        eos_ids: The tokens that end a text.
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
        self._bytes: dict[int, bytes] = {token_id: b"" for token_id, token in added.items() if token.special}

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, with the special tokens that the checkpoint puts around it."""
        ids: list[int] = self._backend.encode(text).ids
        return ids

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of these tokens, without special ones; bytes that are no UTF-8 become U+FFFD."""
        stream = TextStream(self, at_start=True)
        return "".join([stream.push(token_id) for token_id in token_ids]) + stream.finish()

    @property
    def strips_start(self) -> bool:
        """Whether the first space of a text is the tokenizer's, not the text's."""
        return self._pieces.strips_start

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text; nothing for special tokens and those past the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            piece: str | None = self._backend.id_to_token(token_id)
            known = b"" if piece is None else self._pieces.piece_bytes(piece)
            self._bytes[token_id] = known
        return known


class TextStream:
    """The text of a growing sequence of tokens; every push costs the same, however many went before.

    What the pushes and `finish` return is, put together, the text of the whole sequence.
    """

    def __init__(self, tokenizer: Tokenizer, *, at_start: bool = False) -> None:
        """A stream whose text follows a prompt, or with `at_start` begins one.

        That matters to tokenizers that put a space before the first word: after a prompt it is text.
        """
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = at_start and tokenizer.strips_start

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; bytes of an unfinished character are held back."""
        piece = self._tokenizer.token_bytes(token_id)
        if self._strip and piece:
            piece, self._strip = piece.removeprefix(b" "), False
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """What was held back: U+FFFD for a character that never came whole."""
        return self._utf8.decode(b"", final=True)


class StopMatcher:
    """Ends a text before the first stop string that is complete in it; of several, the longest.

    What it returns does not depend on how the text is cut into pushes.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        """Match these.

        Raises:
            ConfigError: One of them is empty.
        """
        self._stops = tuple(stops)
        if "" in self._stops:
            raise ConfigError("a stop string is empty; leave it out")
        self._held: str = ""
        self._stopped = False

    def push(self, new: str) -> tuple[str, bool]:
        """The text that may be shown, and whether a stop string was met; after it comes no more."""
        if self._stopped:
            return "", True
        text = self._held + new
        met = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if met:
            self._stopped, self._held = True, ""
            return text[: min(met)[1]], True
        keep = len(text) - self._possible_start(text)
        self._held = text[keep:]
        return text[:keep], False

    def finish(self) -> str:
        """What was held back because a stop string might have begun there."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """The length of the longest end of `text` that a stop string begins with."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


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
    settings = read_json(folder / "tokenizer_config.json") or {}
    return Tokenizer(backend, eos_ids=_eos_ids(folder, backend, settings))


def _eos_ids(folder: Path, backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> frozenset[int]:
    """As transformers' generate decides: generation_config, else config; and else the tokenizer's own."""
    for name in ("generation_config.json", "config.json"):
        match (read_json(folder / name) or {}).get("eos_token_id"):
            case int(token_id):
                return frozenset({token_id})
            case [int(), *_] as token_ids:
                return frozenset(cast("list[int]", token_ids))
            case _:
                pass
    match settings.get("eos_token"):
        case str(text) | {"content": str(text)}:
            found = backend.token_to_id(text)
            return frozenset() if found is None else frozenset({found})
        case _:
            return frozenset()
