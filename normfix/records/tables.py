"""How results show themselves: a line in a session, the line and its parts when printed, a table in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Shown", "Table", "by_axis", "counted", "number"]

_LINES, _ROWS = 20, 200
"""Rows that are printed, and rows in a notebook."""
_WIDTH, _LAST = 48, 240
"""Characters of a cell that is printed, and of the last in its row, which runs on."""


@dataclass(frozen=True, slots=True)
class Table:
    """Heads of columns and rows of cells."""

    heads: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


class Shown:
    """Base of results that people look at; `headline` and `table` say what of them."""

    __slots__ = ()

    @property
    def headline(self) -> str:
        """Return the result in one line, the answer first."""
        raise NotImplementedError

    def table(self) -> Table:
        """Return its parts."""
        return Table()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.headline}>"

    def __str__(self) -> str:
        table = self.table()
        cells = [
            [*(_short(cell, _WIDTH) for cell in row[:-1]), _short(row[-1], _LAST)]
            for row in table.rows[:_LINES]
        ]
        widths = [max(map(len, column)) for column in zip(table.heads, *cells, strict=True)] if cells else []
        lines = [
            "  " + "  ".join(c.ljust(n) for c, n in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        return "\n".join([self.headline, *lines, *_rest(table, _LINES)])

    def _repr_html_(self) -> str:
        """Show the line above the table; everything in it is escaped."""
        table = self.table()
        head = "".join(f"<th>{escape(text)}</th>" for text in table.heads)
        rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in table.rows[:_ROWS])
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        rest = "".join(f"<p>{escape(text.strip())}</p>" for text in _rest(table, _ROWS))
        shown = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if table.rows else ""
        return f"<div><p><b>{type(self).__name__}</b>: {escape(self.headline)}</p>{shown}{rest}</div>"


def number(value: float | None) -> str:
    """Return a number with two figures, or nothing where there is none.

    >>> number(0.01234), number(None)
    ('0.012', '')
    """
    return "" if value is None else f"{value:.2g}"


def counted(n: int, what: str) -> str:
    """Return a count with its noun.

    >>> counted(1, "site"), counted(2, "site")
    ('1 site', '2 sites')
    """
    return f"{n} {what}" + "s" * (n != 1)


def by_axis(numbers: Sequence[int]) -> str:
    """Return extents as they are written.

    >>> by_axis((64, 96))
    '64x96'
    """
    return "x".join(map(str, numbers))


def _short(cell: str, most: int) -> str:
    return cell if len(cell) <= most else cell[: most - 3] + "..."


def _rest(table: Table, most: int) -> list[str]:
    left = len(table.rows) - most
    return [f"  and {left} more"] if left > 0 else []
