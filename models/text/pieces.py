"""Bytes of each token, from the decoder that tokenizer.json describes.

A token is a run of bytes, not of characters, so text can be put together exactly only from bytes. The
library decodes whole sequences; decoding ever longer ones to see what a token added costs the square of
their length. Here every token becomes bytes on its own, which all decoders of today's decoder-only models
allow: byte-level BPE (GPT-2's alphabet), and SentencePiece's marks with byte fallback.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from p2pinfer.errors import CheckpointError

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


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
