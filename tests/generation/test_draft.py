from __future__ import annotations

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
    assert NgramDrafter().draft(ids, most) == looked_for(ids, most)


@given(ids=st.lists(st.integers(0, 3), min_size=2, max_size=40), data=st.data())
def test_a_text_that_grows_is_drafted_from_as_one_that_is_new(ids: list[int], data: st.DataObject) -> None:
    drafter = NgramDrafter()
    for end in sorted(data.draw(st.sets(st.integers(1, len(ids))))):
        assert drafter.draft(ids[:end], 5) == looked_for(ids[:end], 5)
