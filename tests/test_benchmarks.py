"""One meaning of `ratio`, in the scripts that measure and in the tables that they filled."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from math import floor, log10
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
TABLES = ROOT / "docs" / "benchmarks.md"

pytestmark = pytest.mark.skipif(not TABLES.is_file(), reason="the documents are not here")

Row = dict[str, str]


def load_quotient() -> ModuleType:
    """benchmarks/quotient.py, loaded by its path: scripts are no package."""
    spec = importlib.util.spec_from_file_location("quotient", ROOT / "benchmarks" / "quotient.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(lines: Sequence[str]) -> Iterator[Row]:
    """The rows of all tables, by the names of their columns."""
    head: list[str] = []
    for line in lines:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells
        elif cells[0].strip("-"):
            yield dict(zip(head, cells, strict=True))


def between(text: str) -> tuple[float, float]:
    """What a printed number may have been: three figures are printed, and zeros at the end left out."""
    value = float(text)
    half = 0.5 * 10.0 ** (floor(log10(value)) - 2)
    return value - half, value + half


def may_be_quotient(said: str, over: str, under: str) -> bool:
    """Whether a ratio of two decimals can be `over` / `under`, all of them rounded."""
    (low, high), (least, most) = between(over), between(under)
    return low / most - 0.0051 <= float(said) <= high / least + 0.0051


def test_every_ratio_in_the_tables_is_the_quotient_of_the_columns_beside_it() -> None:
    found = 0
    for row in rows_of(TABLES.read_text(encoding="utf-8").splitlines()):
        if "ratio" not in row:
            continue
        ours, local = (
            next(cell for name, cell in row.items() if name in (f"{who} ms", f"{who} s"))
            for who in ("ours", "local")
        )
        assert may_be_quotient(row["ratio"], local, ours), row
        found += 1
    assert found > 40


def test_every_times_one_in_the_tables_is_the_quotient_of_its_rows() -> None:
    alone, found = "", 0
    for row in rows_of(TABLES.read_text(encoding="utf-8").splitlines()):
        if "times one" not in row:
            continue
        if (together := row["tok/s together"]) and row[
            next(n for n in row if n.startswith("clients"))
        ] == "1":
            alone = together
        assert may_be_quotient(row["times one"], together, alone), row
        found += 1
    assert found >= 6


@pytest.mark.parametrize(
    ("said", "is_so"), [("1.11", False), ("0.82", True), ("0.83", True), ("0.85", False)]
)
def test_the_other_side_of_one_is_told_from_a_rounding(said: str, is_so: bool) -> None:
    assert may_be_quotient(said, "66.8", "81") is is_so


def test_the_ratio_is_that_of_the_medians_and_the_rounds_are_beside_it() -> None:
    """The median of the rounds' own quotients would be 2 here, and would call a loss a win."""
    ours, theirs = [10.0, 100.0, 50.0], [20.0, 40.0, 100.0]
    assert load_quotient().compared(ours, theirs) == {"ratio": 0.8, "rounds": "0.40-2.00"}


def test_no_script_has_a_definition_of_its_own() -> None:
    for script in (ROOT / "benchmarks").glob("*.py"):
        if script.name != "quotient.py":
            assert '"ratio":' not in script.read_text(encoding="utf-8"), script.name
