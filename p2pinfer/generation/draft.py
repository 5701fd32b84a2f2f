"""Drafts of the tokens to come, copied from earlier in the text.

Prompt lookup decoding (Saxena, 2023; Yang et al., "Inference with reference", 2023): where the end of the
text has occurred before, what followed it then is a good guess at what follows now. It costs no model, and it
is right most often where texts quote, extract, edit, list or repeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

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


class NgramDrafter:
    """Drafts from one text, which may only grow."""

    def __init__(self) -> None:
        # By n-gram: the position behind its last occurrence. The end of the text itself is not among them.
        self._behind: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def draft(self, ids: Sequence[int], most: int) -> Draft:
        """Up to `most` guesses at what follows `ids`; none if its end is new.

        The longest n-gram that occurred before decides, and of its occurrences the last.
        """
        self._index(ids)
        for order in range(min(MAX_ORDER, len(ids)), 0, -1):
            origin = self._behind.get(tuple(ids[-order:]))
            if origin is not None and most > 0:
                return Draft(_copied(ids, origin, most), _matched(ids, origin))
        return Draft()

    def _index(self, ids: Sequence[int]) -> None:
        for behind in range(self._indexed + 1, len(ids)):
            for order in range(1, min(MAX_ORDER, behind) + 1):
                self._behind[tuple(ids[behind - order : behind])] = behind
        self._indexed = max(self._indexed, len(ids) - 1)


def _copied(ids: Sequence[int], origin: int, most: int) -> tuple[int, ...]:
    """`most` tokens from `origin` on; past the end of the text those that were copied are copied again."""
    period = len(ids) - origin
    return tuple(ids[origin + i % period] for i in range(most))


def _matched(ids: Sequence[int], origin: int) -> int:
    """Number of equal tokens before `origin` and before the end, up to `MAX_MATCH`."""
    most = min(origin, MAX_MATCH)
    return next((i for i in range(most) if ids[origin - 1 - i] != ids[-1 - i]), most)
