"""Checks look as the traffic looks: shapes of sessions that were served, prompts that nobody has seen."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from statistics import median

import pytest

from p2pinfer.audit.traffic import SHAPES_KEPT, TEXTS_KEPT, SessionShapes, Shape, Texts

MOST = 128


def served(*sessions: tuple[str, int, int]) -> SessionShapes:
    """Shapes after sessions of so many reserved and computed tokens."""
    shapes = SessionShapes()
    for client, reserved, computed in sessions:
        shapes.note_opened(client, reserved)
        shapes.note_closed(client, computed)
    return shapes


def drawn(shapes: SessionShapes, count: int = 2000, most: int = MOST) -> list[Shape]:
    rng = random.Random(1)
    return [shapes.draw(most, rng) for _ in range(count)]


def test_without_sessions_shapes_are_those_of_a_prior() -> None:
    shapes = drawn(SessionShapes())
    assert all(each.prompt >= 1 and 1 <= each.new <= min(each.asked, MOST) for each in shapes)
    assert 15 < median(each.prompt for each in shapes) < 35
    assert sum(each.asked == 128 for each in shapes) > 800  # what `p2pinfer generate` asks for
    assert len({(each.prompt, each.asked, each.new) for each in shapes}) > 1000


def test_shapes_come_to_be_those_of_the_sessions_that_are_served() -> None:
    shapes = drawn(served(*((f"client {number}", 3000, 900) for number in range(200))))
    alike = [each for each in shapes if each.prompt + each.asked == 3000]
    assert len(alike) > 0.85 * len(shapes)
    assert all(90 <= each.prompt <= 720 and each.new == MOST for each in alike)


def advantage(real: Sequence[float], checks: Sequence[float]) -> float:
    """What a hop gains by the best bound on a figure, 0 to 1: the Kolmogorov-Smirnov distance."""
    one, other = sorted(real), sorted(checks)
    return max(
        abs(bisect_right(one, bound) / len(one) - bisect_right(other, bound) / len(other))
        for bound in (*one, *other)
    )


@pytest.mark.parametrize("usual", [True, False], ids=["prompts and texts of people", "many short questions"])
def test_no_bound_on_a_length_tells_checks_from_the_sessions_of_clients(usual: bool) -> None:
    rng = random.Random(2)
    sessions: list[tuple[str, int, int]] = []
    for number in range(240):
        prompt = round(rng.lognormvariate(3.5 if usual else 1.5, 0.8)) + 1
        asked = rng.choice([64, 128, 128, 256] if usual else [8, 16, 16, 32])
        new = min(asked, MOST, round(rng.lognormvariate(4.0, 0.7)) + 1)
        sessions.append((f"client {number}", prompt + asked, prompt + new))
    checks = drawn(served(*sessions))
    real = [(reserved, computed) for _, reserved, computed in sessions]
    seen = [(each.prompt + each.asked, each.prompt + each.new) for each in checks]
    for figure in (0, 1):
        assert advantage([each[figure] for each in real], [each[figure] for each in seen]) < 0.2


def test_the_openings_of_checks_are_as_various_as_their_texts() -> None:
    """Twelve fixed ones told every check from a client."""
    rng = random.Random(3)
    texts = Texts(" ".join(f"w{text}-{word}" for word in range(400)) for text in range(40))
    openings = [texts.draw(12, rng)[0].split()[0] for _ in range(300)]
    assert len({*openings}) == len(openings)


def test_a_flood_by_one_client_decides_nothing() -> None:
    """Nor does one by many: the prior keeps its part."""
    others = [(f"client {number}", 300, 100) for number in range(40)]
    shapes = drawn(served(*others, *[("flood", 1, 1)] * 200))
    assert sum(each.asked == 1 for each in shapes) < 0.05 * len(shapes)
    shapes = drawn(served(*((f"flood {number}", 2, 2) for number in range(10 * SHAPES_KEPT))))
    assert sum(each.prompt > 2 for each in shapes) > 0.03 * len(shapes)


def test_sessions_that_come_to_nothing_or_were_never_opened_say_nothing() -> None:
    shapes = served(("client", 300, 0), ("client", 300, 301))
    shapes.note_closed("stranger", 10)
    assert drawn(shapes, 50) == drawn(SessionShapes(), 50)


def test_no_prompt_is_given_twice_and_its_readers_are_known() -> None:
    rng = random.Random(1)
    texts = Texts([" ".join(f"own{number}" for number in range(200))])
    texts.add(" ".join(f"made{number}" for number in range(200)), ("a", "b"))
    given: set[str] = set()
    for _ in range(10):
        prompt, readers = texts.draw(10, rng)
        words = prompt.split()
        assert words
        assert not given & {*words}
        given |= {*words}
        assert (readers == {"a", "b"}) == any(word.startswith("made") for word in words)


def test_a_long_prompt_takes_what_there_is() -> None:
    texts = Texts(["one two three", "four five"])
    prompt, _ = texts.draw(100, random.Random(1))
    assert sorted(prompt.split()) == ["five", "four", "one", "three", "two"]
    assert texts.draw(100, random.Random(1)) == ("", frozenset())


def test_texts_are_bounded() -> None:
    texts = Texts("word " * 5000 for _ in range(3 * TEXTS_KEPT))
    words = 0
    while prompt := texts.draw(10**6, random.Random(1))[0]:
        words += len(prompt.split())
    assert words <= 400 * TEXTS_KEPT
