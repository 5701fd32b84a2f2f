"""The tables of docs/nat.md: their shape, and what they must show."""

from __future__ import annotations

from pathlib import Path

import pytest

from .pairs import Role, Run, rounds
from .scenarios import KINDS
from .table import BEGIN, DOCUMENT, END, every_pair, keep, load, must_be_direct, render, shortcomings, write


def perfect(role: Role, left: str, right: str) -> Run:
    """What the requirements ask for."""
    if must_be_direct(role, left, right):
        return Run(role, left, right, "direct", 0.2, 1.0, 2.0)
    return Run(role, left, right, "relayed", 0.2, None, 1.2)


RUNS = [perfect(*pair) for pair in every_pair() for _ in range(5)]


def test_the_rounds_have_every_pair_once_and_use_every_home_once() -> None:
    pairs = [pair for round_ in rounds(tuple(KINDS)) for pair in round_]
    assert sorted(pairs) == sorted((left, right) for left in KINDS for right in KINDS)
    for round_ in rounds(tuple(KINDS)):
        assert {left for left, _ in round_} == {right for _, right in round_} == set(KINDS)


def test_which_pairs_the_routers_allow() -> None:
    assert must_be_direct("client", "symmetric", "public")
    assert must_be_direct("client", "UPnP", "symmetric")
    assert must_be_direct("client", "double NAT", "port-preserving")
    assert must_be_direct("hops", "symmetric", "UPnP")
    assert not must_be_direct("client", "symmetric", "UPnP")  # the client has no mapping
    assert not must_be_direct("client", "symmetric", "symmetric")
    assert not must_be_direct("hops", "symmetric", "port-preserving")


def test_runs_that_meet_the_requirements_have_no_shortcomings() -> None:
    assert shortcomings(RUNS) == []


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (Run("client", "UPnP", "symmetric", "failed", why="no route\nmore"), "symmetric as client: no route"),
        (Run("hops", "public", "public", "relayed", 0.1, None, 0.2), "1 of 5 stayed relayed"),
    ],
)
def test_one_bad_run_is_told(bad: Run, says: str) -> None:
    others = list(RUNS)
    others[others.index(perfect(bad.role, bad.left, bad.right))] = bad
    (told,) = shortcomings(others)
    assert says in told


def test_missing_and_slow_runs_are_told() -> None:
    assert any("0 runs of 5" in each for each in shortcomings([]))
    slow = [Run(r.role, r.left, r.right, r.how, 9.0, r.direct_s and 9.0, 9.0) for r in RUNS]
    assert [each for each in shortcomings(slow) if "median" in each] == [
        "direct after 9.0 s in the median, not 5",
        "relayed after 9.0 s in the median, not 3",
    ]


def test_the_tables_go_between_the_marks_and_have_every_pair(tmp_path: Path) -> None:
    document = tmp_path / "nat.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write(document, RUNS)
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 * (2 + len(KINDS))
    assert all(row.count("|") == 2 + len(KINDS) for row in rows)
    assert "not run" in render(RUNS[:-5])
    with pytest.raises(ValueError, match="lacks"):
        write(tmp_path / "empty" if (tmp_path / "empty").write_text("x") else document, RUNS)


def test_runs_are_kept_as_they_were(tmp_path: Path) -> None:
    keep(RUNS, tmp_path / "runs.json")
    assert load(tmp_path / "runs.json") == RUNS


# ---------------------------------------------------------------------- what docs/nat.md shows


def test_the_document_has_the_tables_of_the_runs_that_were_kept() -> None:
    assert f"{BEGIN}\n\n{render(load())}\n{END}" in DOCUMENT.read_text(encoding="utf-8")


def test_every_pair_was_run_five_times_and_meets_what_is_required() -> None:
    assert shortcomings(load(), least=5) == []
