"""Text of a growing sequence of tokens: bytes of each token, whole characters, and stop strings.

A token is a run of bytes, not of characters, so text can be put together exactly only from bytes. The
library decodes whole sequences; decoding ever longer ones to see what a token added costs the square of
their length. Here every token becomes bytes on its own, which all decoders of today's decoder-only models
allow: byte-level BPE (GPT-2's alphabet), and SentencePiece's marks with byte fallback.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

from p2pinfer.errors import CheckpointError, ConfigError

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts(Protocol):
    """Texts of single tokens. `Tokenizer` is one."""

    special_texts: Mapping[int, str]

    def token_bytes(self, token_id: int) -> bytes: ...

    def first_bytes(self, token_id: int) -> bytes: ...


class TextStream:
    """The text of a growing sequence of tokens; every push costs the same, however many went before.

    What the pushes and `finish` return is, put together, what the tokenizers library makes of the whole
    sequence, but for one thing. Of a run of byte tokens (`<0xE2>`) that is not all UTF-8 the library shows
    nothing: every byte of it becomes U+FFFD, also those of characters that had come whole. A stream has shown
    these, or would have to keep every run back until its end; so only what is no character becomes U+FFFD,
    one for as many bytes as could have been the beginning of one.
    """

    def __init__(self, tokenizer: TokenTexts, *, at_start: bool = False, show_special: bool = False) -> None:
        """A stream whose text follows a prompt, or with `at_start` begins one.

        That matters to tokenizers that put a space before the first word: after a prompt it is text.
        With `show_special`, special tokens are text as well.
        """
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = at_start
        self._show_special = show_special
        self._bytes: dict[int, bytes] = {}  # of the tokens that this text has used

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
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._tokenizer.token_bytes(token_id)
        return self._utf8.decode(known)

    def finish(self) -> str:
        """Text that was held back: U+FFFD for a character that never came whole."""
        held = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return held


class StopMatcher:
    """Ends a text before the first stop string that is complete in it; of several, the longest.

    What it returns does not depend on how the text is cut into pushes. Special tokens are hidden, as a rule:
    not part of the text. Stop strings that name one are looked for in the text as it would be with them.

    Attributes:
        met: The stop string that ended the text; None if none did.
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
        self.met: str | None = None

    def push(self, new: str, hidden: str = "") -> tuple[str, bool]:
        """The text that may be shown, and whether a stop string was met; after it comes no more.

        Args:
            hidden: What follows `new` and is not to be shown.
        """
        if not self._stops:
            return new, False
        if self._stopped:
            return "", True
        self._shown += range(len(self._held), len(self._held) + len(new))
        self._held += new + hidden
        if met := self._met():
            _, start, self.met = min(met)
            text = self._release(start)
            self._stopped, self._held, self._shown = True, "", []
            return text, True
        return self._release(self._possible_start()), False

    def finish(self) -> str:
        """Text that was held back because a stop string might have begun there."""
        return self._release(len(self._held))

    def _met(self) -> list[tuple[int, int, str]]:
        """The end and the start of every stop string that is complete in what is held, and the string."""
        visible, shown = self._visible(), self._shown
        found = [(stop, visible.find(stop)) for stop in self._stops]
        met = [(shown[at + len(stop) - 1] + 1, shown[at], stop) for stop, at in found if at >= 0]
        raw = [(stop, self._held.find(stop)) for stop in self._raw_stops]
        return met + [(at + len(stop), at, stop) for stop, at in raw if at >= 0]

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


class PieceDecoder:
    """Turns one token's piece into bytes."""

    def __init__(self, decoder: Mapping[str, Any]) -> None:
        """Read the `decoder` part of a tokenizer.json.

        Raises:
            CheckpointError: It has a step that cannot be taken token by token.
        """
        self._strips_space = False  # one, at the very beginning of a text, which is the tokenizer's own
        self._strips_mark = ""  # each of these in the first token
        self._byte_fallback = False
        self._finish: Callable[[str], bytes] = str.encode
        self._replaced: list[tuple[str, str]] = []
        steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
        for step in cast("Sequence[Mapping[str, Any]]", steps):
            self._add(step)

    def piece_bytes(self, piece: str) -> bytes:
        """The bytes of a token that the vocabulary calls `piece`."""
        if self._byte_fallback and (match := _FALLBACK.fullmatch(piece)):
            return bytes.fromhex(match[1])
        for old, new in self._replaced:
            piece = piece.replace(old, new)
        return self._finish(piece)

    def first_bytes(self, piece: str) -> bytes:
        """The bytes of the token that a whole text begins with."""
        if self._strips_mark:
            piece = piece.replace(self._strips_mark, "")
        found = self.piece_bytes(piece)
        return found.removeprefix(b" ") if self._strips_space else found

    def _add(self, step: Mapping[str, Any]) -> None:
        match step:
            case {"type": "ByteLevel"}:
                self._finish = _byte_level
            case {"type": "ByteFallback"}:
                self._byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                self._replaced.append((old, new))
            case {"type": "Metaspace", "replacement": str(mark)}:
                self._replaced.append((mark, " "))
                self._strips_mark = mark if step.get("prepend_scheme", "always") != "never" else ""
            case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0}:
                self._strips_space = bool(start)
            case _:
                raise CheckpointError(
                    f"the tokenizer's decoder has a step that p2pinfer does not know: {step}"
                )


def _beginning(text: str, stops: Sequence[str]) -> int:
    """The length of the longest end of `text` that one of `stops` begins with."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


def _alphabet() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for every byte (`bytes_to_unicode` in its encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = printable + [256 + i for i in range(len(others))]
    return dict(zip(map(chr, characters), printable + others, strict=True))


_ALPHABET = _alphabet()


def _byte_level(piece: str) -> bytes:
    try:
        return bytes(_ALPHABET[character] for character in piece)
    except KeyError:  # an added token, such as <|im_start|> followed by a space, is written as it is
        return piece.encode()
