from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.generation.draft import MAX_MATCH, MAX_ORDER, Draft, NgramDrafter


def looked_for(ids: list[int], most: int) -> Draft:
    """The same by looking through the whole text."""
    for order in range(MAX_ORDER, 0, -1):
        for origin in range(len(ids) - 1, order - 1, -1):
            if order <= len(ids) and ids[origin - order : origin] == ids[-order:] and most > 0:
                matched = 0
                while matched < min(origin, MAX_MATCH) and ids[origin - 1 - matched] == ids[-1 - matched]:
                    matched += 1
                copied = [*ids]
                for i in range(most):
                    copied.append(copied[origin + i])
                return Draft(tuple(copied[len(ids) :]), matched)
    return Draft()


@given(ids=st.lists(st.integers(0, 3), min_size=1, max_size=40), most=st.integers(0, 50))
def test_a_draft_is_what_followed_the_longest_match(ids: list[int], most: int) -> None:
    assert NgramDrafter().draft(ids[:-1], ids[-1], most) == looked_for(ids, most)


@given(ids=st.lists(st.integers(0, 3), min_size=2, max_size=40), data=st.data())
def test_a_text_that_grows_is_drafted_from_as_one_that_is_new(ids: list[int], data: st.DataObject) -> None:
    drafter = NgramDrafter()
    for end in sorted(data.draw(st.sets(st.integers(1, len(ids))))):
        assert drafter.draft(ids[: end - 1], ids[end - 1], 5) == looked_for(ids[:end], 5)


class Watched(list[int]):
    """Token ids that count how many of them are looked at."""

    looked_at = 0

    def __getitem__(self, at: Any) -> Any:
        found: Any = list[Any].__getitem__(self, at)
        self.looked_at += len(found) if isinstance(at, slice) else 1
        return found

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("all of a text for one token")


def test_what_a_draft_takes_does_not_grow_with_the_text() -> None:
    rng = random.Random(0)
    drafter, spent = NgramDrafter(), list[int]()
    text = Watched(rng.randrange(50) for _ in range(300))
    for _ in range(2):
        drafter.draft(text, 1, 8)
        text.looked_at = 0
        for _ in range(100):
            text.append(rng.randrange(50))
            drafter.draft(text, rng.randrange(50), 8)
        spent.append(text.looked_at)
        text += [rng.randrange(50) for _ in range(20_000)]
    assert max(spent) < 100 * 60
