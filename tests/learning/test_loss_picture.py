"""The picture of a loss is well-formed, and shows what it is given."""

from __future__ import annotations

import math
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from p2pinfer.learning.loss_picture import loss_picture


def lines_of(picture: str) -> list[list[tuple[float, float]]]:
    found = ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}polyline")
    return [
        [(float(x), float(y)) for x, y in (each.split(",") for each in line.attrib["points"].split())]
        for line in found
    ]


def test_a_falling_loss_falls_from_the_left_to_the_right() -> None:
    raw, smooth = lines_of(loss_picture([4.0, 3.0, 2.5, 2.25], "a <title> & more"))
    assert len(raw) == len(smooth) == 4
    assert [x for x, _ in raw] == sorted(x for x, _ in raw)
    assert [y for _, y in raw] == sorted(y for _, y in raw)  # down a page is up in y
    falls = [later - sooner for (_, sooner), (_, later) in pairwise(raw)]
    assert falls[0] == pytest.approx(2 * falls[1], abs=0.2)


@pytest.mark.parametrize(
    "losses", [[], [1.0], [2.0, 2.0], [math.nan, 1.0, math.inf], [0.0, 0.0], [-3.0, 5e9]]
)
def test_any_losses_make_a_picture(losses: list[float]) -> None:
    raw, _ = lines_of(loss_picture(losses, "t"))
    assert len(raw) == sum(map(math.isfinite, losses))
    assert all(0 <= x <= 720 and 0 <= y <= 360 for x, y in raw)


def test_a_long_training_is_thinned_out() -> None:
    raw, smooth = lines_of(loss_picture([1 / (step + 1) for step in range(100_000)], "t"))
    assert len(raw) == len(smooth) == 1000
