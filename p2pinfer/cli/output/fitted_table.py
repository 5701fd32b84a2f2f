"""Table that drops columns where the terminal is narrow, and never cuts a cell.

rich shortens cells until a table fits: of two peers `12D3..vwxyz1` and `12D3..vwxyz2` it leaves `12D3..vw`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

_GAP: Final = 2  # cells between columns


@dataclass(frozen=True, slots=True)
class Column:
    """One column, cells from top to bottom."""

    heading: str
    cells: Sequence[str]
    rank: int = 0  # 0 always stays; of the others the highest go first
    right: bool = False

    @property
    def width(self) -> int:
        return max(map(cell_len, (self.heading, *self.cells)))

    def padded(self, cell: str) -> str:
        """The cell as wide as the column."""
        space = " " * (self.width - cell_len(cell))
        return space + cell if self.right else cell + space


@dataclass(frozen=True, slots=True)
class FittedTable:
    """Columns of which as many are shown as fit; those of rank 0 also where they do not."""

    columns: Sequence[Column]

    def shown(self, width: int) -> list[Column]:
        """The columns that are left on a terminal so wide."""
        columns = list(self.columns)
        while _total(columns) > width and any(column.rank for column in columns):
            columns.remove(max(columns, key=lambda column: column.rank))
        return columns

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = self.shown(options.max_width)
        heads = [column.padded(column.heading) for column in columns]
        yield _line(heads, "dim")
        for row in zip(*(column.cells for column in columns), strict=True):
            yield _line([column.padded(cell) for column, cell in zip(columns, row, strict=True)])

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(_total(self.shown(0)), _total(self.columns))


def _total(columns: Sequence[Column]) -> int:
    return sum(column.width for column in columns) + _GAP * (len(columns) - 1)


def _line(cells: Sequence[str], style: str = "") -> Text:
    return Text((" " * _GAP).join(cells).rstrip(), style=style, no_wrap=True, overflow="ignore")
