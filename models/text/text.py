"""Tokenizer, incremental decoding and stop strings, for the client.

Only `tokenizers` is imported, in 40 ms.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import tokenizers

from p2pinfer.errors import CheckpointError, ConfigError
from p2pinfer.models.checkpoint.spec import read_json
from p2pinfer.text_files import read_text

from .added_tokens import add_tokens
from .pieces import PieceDecoder


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
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, with the special tokens that the checkpoint puts around it."""
        ids: list[int] = self._backend.encode(text).ids
        return ids

    def decode(self, token_ids: Iterable[int], *, show_special: bool = False) -> str:
        """The text of these tokens, without special ones unless they are to be shown; see `TextStream`."""
        stream = TextStream(self, at_start=True, show_special=show_special)
        return "".join([stream.push(token_id) for token_id in token_ids]) + stream.finish()

    def piece(self, token_id: int) -> str:
        """Name of a token in the vocabulary; empty if it has none of that id."""
        piece: str | None = self._backend.id_to_token(token_id)
        return piece or ""

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token adds to a text; none for special tokens and those past the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            known = b"" if token_id in self.special_texts else self._pieces.piece_bytes(self.piece(token_id))
            self._bytes[token_id] = known
        return known

    def first_bytes(self, token_id: int) -> bytes:
        """The same for the token that a whole text begins with, without a space of the tokenizer's own."""
        return b"" if token_id in self.special_texts else self._pieces.first_bytes(self.piece(token_id))


class TextStream:
    """The text of a growing sequence of tokens; every push costs the same, however many went before.

    What the pushes and `finish` return is, put together, what the tokenizers library makes of the whole
    sequence, but for one thing. Of a run of byte tokens (`<0xE2>`) that is not all UTF-8 the library shows
    nothing: every byte of it becomes U+FFFD, also those of characters that had come whole. A stream has shown
    these, or would have to keep every run back until its end; so only what is no character becomes U+FFFD,
    one for as many bytes as could have been the beginning of one.
    """

    def __init__(self, tokenizer: Tokenizer, *, at_start: bool = False, show_special: bool = False) -> None:
        """A stream whose text follows a prompt, or with `at_start` begins one.

        That matters to tokenizers that put a space before the first word: after a prompt it is text.
        With `show_special`, special tokens are text as well.
        """
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = at_start
        self._show_special = show_special

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; bytes of an unfinished character are held back."""
        if token_id in self._tokenizer.special_texts:
            if not self._show_special:
                return ""
            self._at_start = False
            return self.finish() + self._tokenizer.special_texts[token_id]
        if self._at_start:
            self._at_start = False
            return self._utf8.decode(self._tokenizer.first_bytes(token_id))
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """Text that was held back: U+FFFD for a character that never came whole."""
        held = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return held


class StopMatcher:
    """Ends a text before the first stop string that is complete in it; of several, the longest.

    What it returns does not depend on how the text is cut into pushes. Special tokens are hidden, as a rule:
    not part of the text. Stop strings that name one are looked for in the text as it would be with them.
    """

    def __init__(self, stops: Iterable[str], special_texts: Iterable[str] = ()) -> None:
        """Match these.

        Args:
            special_texts: The texts of special tokens.

        Raises:
            ConfigError: A stop string is empty.
        """
        self._stops = tuple(stops)
        if "" in self._stops:
            raise ConfigError("a stop string is empty; leave it out")
        specials = tuple(text for text in special_texts if text)
        self._raw_stops = tuple(stop for stop in self._stops if any(text in stop for text in specials))
        self._held = ""  # with what is hidden
        self._shown: list[int] = []  # where in it what is not
        self._stopped = False

    def push(self, new: str, hidden: str = "") -> tuple[str, bool]:
        """The text that may be shown, and whether a stop string was met; after it comes no more.

        Args:
            hidden: What follows `new` and is not to be shown.
        """
        if self._stopped:
            return "", True
        self._shown += range(len(self._held), len(self._held) + len(new))
        self._held += new + hidden
        if met := self._met():
            text = self._release(min(met)[1])
            self._stopped, self._held, self._shown = True, "", []
            return text, True
        return self._release(self._possible_start()), False

    def finish(self) -> str:
        """Text that was held back because a stop string might have begun there."""
        return self._release(len(self._held))

    def _met(self) -> list[tuple[int, int]]:
        """The end and the start of every stop string that is complete in what is held."""
        visible, shown = self._visible(), self._shown
        found = [(stop, visible.find(stop)) for stop in self._stops]
        met = [(shown[at + len(stop) - 1] + 1, shown[at]) for stop, at in found if at >= 0]
        raw = [(stop, self._held.find(stop)) for stop in self._raw_stops]
        return met + [(at + len(stop), at) for stop, at in raw if at >= 0]

    def _possible_start(self) -> int:
        """Index in the held text where the first incomplete stop string may begin."""
        visible, whole = self._visible(), len(self._held)
        shown = [*self._shown, whole]
        return min(
            shown[len(visible) - _beginning(visible, self._stops)],
            whole - _beginning(self._held, self._raw_stops),
        )

    def _visible(self) -> str:
        return "".join([self._held[at] for at in self._shown])

    def _release(self, stop: int) -> str:
        """Hold what is before `stop` no more; returns what of it is to be shown."""
        released = "".join([self._held[at] for at in self._shown if at < stop])
        self._held = self._held[stop:]
        self._shown = [at - stop for at in self._shown if at >= stop]
        return released


def _beginning(text: str, stops: Sequence[str]) -> int:
    """The length of the longest end of `text` that one of `stops` begins with."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
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
