"""Drafts of the tokens to come: what a drafter is, and the one that copies from earlier in the text.

Prompt lookup decoding (Saxena, 2023; Yang et al., "Inference with reference", 2023): where the end of the
text has occurred before, what followed it then is a good guess at what follows now. It costs no model, and it
is right most often where texts quote, extract, edit, list or repeat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

MAX_ORDER: Final = 3  # tokens by which an earlier occurrence is found; it is compared further back after that
MAX_MATCH: Final = 16  # tokens that are compared


@dataclass(frozen=True, slots=True)
class Draft:
    """Guesses at the next tokens.

    Attributes:
        token_ids: The guesses, in order.
        matched: Number of tokens before the first guess that are the same as before its origin.
    """

    token_ids: tuple[int, ...] = ()
    matched: int = 0


class LazyDrafter(Protocol):
    """Source of guesses each of which takes time; no more of them are found than are asked for."""

    @property
    def guess_s(self) -> float:
        """Seconds that a guess takes; 0 before the first."""
        ...

    def guesses(self, ids: Sequence[int], last_id: int) -> Iterator[tuple[int, float]]:
        """Guesses at what follows `ids` and then `last_id`, each with the drafter's own probability of it."""
        ...


class NgramDrafter:
    """Drafts from one text, which may only grow."""

    def __init__(self) -> None:
        # By n-gram: the position behind its last occurrence, but for those that end with the last token.
        self._behind: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def draft(self, ids: Sequence[int], last_id: int, most: int) -> Draft:
        """Up to `most` guesses at what follows `ids` and then `last_id`; none if that end is new.

        The longest n-gram that occurred before decides, and of its occurrences the last. What it takes does
        not grow with the text: `ids` is not copied, and only what was added since the last draft is indexed.
        """
        if most < 1:
            return Draft()
        self._index(ids)
        end = (*ids[1 - MAX_ORDER :], last_id)
        for start in range(len(end)):
            origin = self._behind.get(end[start:])
            if origin is not None:
                return Draft(_copied(ids, last_id, origin, most), _matched(ids, last_id, origin))
        return Draft()

    def _index(self, ids: Sequence[int]) -> None:
        for behind in range(self._indexed + 1, len(ids) + 1):
            for order in range(1, min(MAX_ORDER, behind) + 1):
                self._behind[tuple(ids[behind - order : behind])] = behind
        self._indexed = max(self._indexed, len(ids))


def _copied(ids: Sequence[int], last_id: int, origin: int, most: int) -> tuple[int, ...]:
    """`most` tokens from `origin` on; past the end of the text those that were copied are copied again."""
    source = (*ids[origin : origin + most], last_id)
    return tuple(source[i % len(source)] for i in range(most))


def _matched(ids: Sequence[int], last_id: int, origin: int) -> int:
    """Number of equal tokens before `origin` and before the end, up to `MAX_MATCH`."""
    most = min(origin, MAX_MATCH)
    return next((i for i in range(most) if ids[origin - 1 - i] != (ids[-i] if i else last_id)), most)
