"""Draft models: the text stays the same whatever they guess, and good guesses save trips."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import cast

import pytest

from p2pinfer.generation.speculation import Speculation

TRIP_S = 0.25  # four hops, 50 ms from one to the next


# ---------------------------------------------------------------------- how many guesses


class Oracle:
    """Draws from the text itself, right with the probability that it says; each guess takes `guess_s`."""

    def __init__(self, text: Sequence[int], sureness: float, right: float, guess_s: float) -> None:
        self.guess_s = guess_s
        self.asked = 0
        self._text, self._sureness, self._right, self._rng = text, sureness, right, random.Random(1)

    def guesses(self, ids: Sequence[int], last_id: int) -> Iterator[tuple[int, float]]:
        for token_id in self._text[len(ids) + 1 :]:
            self.asked += 1
            yield token_id if self._rng.random() < self._right else -1, self._sureness


def seconds_of(text: Sequence[int], speculation: Speculation, position_s: float) -> float:
    """Time that a text takes at `TRIP_S` a trip, its first token given; finding guesses included."""
    drafter = cast("Oracle | None", speculation.drafter)
    spent, length = 0.0, 1
    while length < len(text):
        asked = drafter.asked if drafter else 0
        guesses = speculation.guess(text[: length - 1], text[length - 1], len(text) - length - 1, 0.02)
        seconds = TRIP_S + position_s * (1 + len(guesses))
        spent += seconds + (drafter.guess_s * (drafter.asked - asked) if drafter else 0.0)
        speculation.trips.append((1 + len(guesses), seconds))
        length += 1
        for guess in guesses:
            right = guess == text[length - 1]
            speculation.note_guess(right=right)
            if not right:
                break
            length += 1
    return spent


def new_text(count: int) -> list[int]:
    """Tokens none of which occurs twice, so that nothing can be copied."""
    return random.Random(0).sample(range(10 * count), count)


def gain(sureness: float, right: float, guess_s: float = 0.001, position_s: float = 0.001) -> float:
    """Factor by which a drafter that is right so often makes a text come sooner."""
    text = new_text(400)
    speculation = Speculation()
    plain = seconds_of(text, speculation, position_s)
    speculation = Speculation()
    speculation.drafter = Oracle(text, sureness, right, guess_s)
    return plain / seconds_of(text, speculation, position_s)


@pytest.mark.parametrize(("right", "least"), [(0.7, 2.5), (0.8, 3.3), (0.95, 6.0)])
def test_far_away_a_draft_model_saves_most_trips(right: float, least: float) -> None:
    assert gain(right, right) > least


@pytest.mark.parametrize("sureness", [0.05, 0.5, 0.99])
def test_one_that_is_always_wrong_costs_little(sureness: float) -> None:
    assert gain(sureness, 0.0) > 0.95
    assert gain(sureness, 0.0, position_s=0.05) > 0.95


@pytest.mark.parametrize("guess_s", [0.25, 1.0])
def test_one_that_takes_as_long_as_a_trip_is_hardly_used(guess_s: float) -> None:
    assert gain(0.6, 0.6, guess_s=guess_s) > 0.93


def test_no_more_guesses_are_drawn_than_would_pay() -> None:
    text = new_text(400)
    speculation = Speculation()
    speculation.drafter = drafter = Oracle(text, 0.1, 0.1, 0.02)
    seconds_of(text, speculation, 0.01)
    assert drafter.asked < 800  # two a token; all of the text would be 80,000


def test_a_setting_says_how_many_are_drawn() -> None:
    text = new_text(100)
    speculation = Speculation(5)
    speculation.drafter = Oracle(text, 0.5, 1.0, 0.0)
    assert speculation.guess(text[:9], text[9], 90) == tuple(text[10:15])
    assert speculation.guess(text[:9], text[9], 2) == tuple(text[10:12])
    assert speculation.guess(text[:9], text[9], 0) == ()


def test_what_occurred_before_is_copied_where_that_is_right_more_often() -> None:
    speculation = Speculation(4)
    speculation.drafter = Oracle([9] * 100, 0.5, 1.0, 0.0)
    assert speculation.guess([*range(8), *range(7)], 7, 90) == (0, 1, 2, 3)
    speculation = Speculation(4)
    speculation.drafter = Oracle([9] * 100, 0.5, 1.0, 0.0)
    assert speculation.guess([3, 5, 3], 6, 90) == (9, 9, 9, 9)
