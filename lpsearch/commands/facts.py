"""Named values and tables for a person, laid out to whatever width there is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from lpsearch.wording import escape_controls

__all__ = ["Facts", "Grid", "Kept", "Row", "describe_document", "keep_line", "wrap_line"]

Row = tuple[str, str | Path | None]
"""A name and its value."""


class Kept(str):
    """Text that is left to the terminal to break, such as a command line, so that it can be copied."""

    __slots__ = ()


_GAP = 2
"""Columns of the terminal between a name and its value."""

_LEAST_VALUE = 24
"""Columns that a value needs beside its name; where there are fewer it stands below the name, indented."""

_INDENT = 2

_COLUMN_GAP = 3
"""Columns of the terminal between two columns of a table."""


@dataclass(frozen=True)
class Facts:
    """Names and values, one below the other.

    Attributes:
        rows: names and values. Text is broken between words; a path, or whatever else has no space, is left to the
            terminal to break, so that it can be copied. A value of None, or an empty one, is left out.
    """

    rows: Sequence[Row]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay the rows out to the width of the console."""
        rows = [(name, value) for name, value in self.rows if value is not None and str(value)]
        indent = max((len(name) for name, _ in rows), default=0) + _GAP
        is_beside = options.max_width - indent >= _LEAST_VALUE
        for name, value in rows:
            label = escape_controls(name, in_one_line=True)
            if not is_beside and label:
                yield Text(label)
            margin = indent if is_beside else _INDENT
            head = f"{label:<{indent}}" if is_beside else " " * _INDENT
            if isinstance(value, Path | Kept) or " " not in value:
                yield keep_line(f"{head}{value}")
                continue
            lines = Text(escape_controls(value)).wrap(console, max(1, options.max_width - margin))
            shown = [line.plain.rstrip() for line in lines]
            yield Text(head + f"\n{' ' * margin}".join(shown))


@dataclass(frozen=True)
class Grid:
    """A table where there is room for it; elsewhere its rows one by one, as names and values.

    Attributes:
        columns: their headers.
        rows: a cell for each column; a cell may have several lines.
        left: the columns of words; the others hold numbers and stand at the right.
        optional: the columns that are left out, one after the other, where there is too little room for all.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[str] = ()
    optional: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay the rows out to the width of the console."""
        if self._measure() > options.max_width and self.optional:
            yield self._leave_out(self.optional[0])
            return
        if self._measure() > options.max_width:
            for index, row in enumerate(self.rows):
                cells = [cell.replace("\n", ", ") for cell in row]
                yield Facts(list(zip(self.columns, cells, strict=True)))
                yield from [""] * (index < len(self.rows) - 1)
            return
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for name in self.columns:
            table.add_column(name, justify="left" if name in self.left else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*(escape_controls(cell) for cell in row))
        yield table

    def _measure(self) -> int:
        """Return the columns of the terminal that the table takes."""
        widths = [
            max(len(line) for cell in (name, *cells) for line in cell.split("\n"))
            for name, *cells in zip(self.columns, *self.rows, strict=True)
        ]
        return sum(widths) + _COLUMN_GAP * (len(widths) - 1)

    def _leave_out(self, name: str) -> Grid:
        """Return the table without a column."""
        place = self.columns.index(name)
        return dataclasses.replace(
            self,
            columns=[*self.columns[:place], *self.columns[place + 1 :]],
            rows=[[*row[:place], *row[place + 1 :]] for row in self.rows],
            optional=[other for other in self.optional if other != name],
        )


def describe_document(document: Mapping[str, Any]) -> Facts:
    """Lay out the JSON object of a command that has nothing better to show."""
    return Facts([(name.replace("_", " "), _describe_value(value)) for name, value in document.items()])


def _describe_value(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_describe_value(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(str(_describe_value(item)) for item in value)
    return str(value)


def wrap_line(line: str, style: str = "") -> Text:
    """Break prose between words."""
    return Text(escape_controls(line), style, no_wrap=False, overflow="fold")


def keep_line(line: str) -> Text:
    """Leave a line with commands or paths to the terminal to break, so that they can be copied."""
    return Text(escape_controls(line, in_one_line=True), no_wrap=True, overflow="ignore")
