"""The tables of moved homes and thin lines: what they must show, and that the documents have them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from . import moves, thin_lines
from .moves import Move, every_move
from .table import DOCUMENT
from .thin_lines import CELLS, Prefill

MOVES = [
    Move(mover, *pair, 5.0, None if mover == "client" else 6.0)
    for mover, pairs in every_move()
    for pair in pairs
]


def test_moves_that_meet_the_requirements_have_no_shortcomings() -> None:
    assert moves.shortcomings(MOVES) == []
    assert len(MOVES) == 2 * len(moves.KINDS) ** 2 + 1


@pytest.mark.parametrize(
    "bad",
    [replace(MOVES[3], pause_s=15.1), replace(MOVES[3], found_s=15.1), replace(MOVES[3], why="no route")],
)
def test_one_bad_move_is_told(bad: Move) -> None:
    assert moves.shortcomings([*MOVES[:3], bad, *MOVES[4:]]) == [moves.describe(bad)]


def test_a_move_that_was_not_made_is_told() -> None:
    (told,) = moves.shortcomings(MOVES[1:])
    assert "not run" in told


def test_moves_and_lines_are_kept_as_they_were(tmp_path: Path) -> None:
    moves.keep(MOVES, tmp_path / "moves.json")
    assert moves.load(tmp_path / "moves.json") == MOVES
    lines = [Prefill(*cell, 9.0, 0) for cell in CELLS]
    thin_lines.keep(lines, tmp_path / "lines.json")
    assert thin_lines.load(tmp_path / "lines.json") == lines
    assert moves.load(tmp_path / "none.json") == []


def test_the_bound_of_a_line_is_its_rate_or_what_losses_leave_of_it() -> None:
    thin = Prefill(0.25, 50, 0, 1000, 0.0, 0)
    assert thin.line_s == pytest.approx(40.96)
    # 1448 / (0.1 s * sqrt(2/3 * 0.05)) = 79.3 kB/s, and the line has 1 MB/s.
    lossy = Prefill(8, 50, 5, 1000, 0.0, 0)
    assert lossy.bytes_per_s == pytest.approx(79_310, rel=1e-3)
    assert replace(lossy, mbit=0.25).bytes_per_s == 31_250
    assert lossy.bound_s > lossy.line_s


def test_slow_and_failed_prompts_are_told() -> None:
    right = [Prefill(*cell, 0.0, 0) for cell in CELLS]
    right = [replace(run, first_s=1.4 * run.bound_s) for run in right]
    assert thin_lines.shortcomings(right) == []
    slow = replace(right[0], first_s=1.6 * right[0].bound_s)
    assert thin_lines.shortcomings([slow, *right[1:]]) == [thin_lines.describe(slow)]
    wrong = replace(right[0], why="wrong text")
    assert thin_lines.shortcomings([wrong, *right[1:]]) == [thin_lines.describe(wrong)]
    assert len(thin_lines.shortcomings(right[1:])) == 1


# ---------------------------------------------------------------------- what the documents show


def test_every_pair_goes_on_and_is_found_again_within_15_s() -> None:
    assert moves.shortcomings(moves.load()) == []


def test_the_document_has_the_moves_that_were_kept() -> None:
    assert f"{moves.BEGIN}\n{moves.render(moves.load())}\n{moves.END}" in DOCUMENT.read_text(encoding="utf-8")


def test_every_prompt_over_thin_lines_gave_the_right_text() -> None:
    """Right in every cell that was run; `make lab-lines` also lists which were too slow."""
    runs = thin_lines.load()
    assert len(runs) >= 25
    assert [run for run in runs if run.why] == []


def test_the_document_has_the_lines_that_were_kept() -> None:
    table = f"{thin_lines.BEGIN}\n\n{thin_lines.render(thin_lines.load())}\n\n{thin_lines.END}"
    assert table in thin_lines.DOCUMENT.read_text(encoding="utf-8")
