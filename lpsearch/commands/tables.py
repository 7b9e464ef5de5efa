"""The front as a table for a terminal, as wide as there is room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich import box
from rich.table import Table

from lpsearch.config import Metric
from lpsearch.plan import Plan
from lpsearch.report.front_columns import list_front_columns
from lpsearch.search import TrialResult
from lpsearch.wording import describe_layers

__all__ = ["build_front_table", "get_metric", "spread_rows"]

_Row = TypeVar("_Row")

_GAP = 3
"""Columns of the terminal between two columns of the table."""

_FOLD_WIDTH = 40
"""Room from which the layers of a plan may take several lines, not too many."""

_LAYERS_WIDTH = {1: 0, 2: 16, 3: _FOLD_WIDTH, 4: _FOLD_WIDTH}
"""Room for the layers without which a column of a rank gives way."""

_RANKS = {
    "joins": 0,
    "drops": 0,
    "less depth": 1,
    "loss": 0,
    "held out": 0,
    "delta nll": 3,
    "unrepaired": 2,
    "perplexity": 4,
    "ms": 3,
    "speed-up": 2,
}
"""Which columns give way: those of the highest rank first; those of rank 0 stay."""

_RANKS_WITH_DROPS = {"less depth": 2, "speed-up": 1}
"""Where branches are dropped, time is what is saved, and depth says little of it."""

_MOST_FIXED = 4
"""Joins, drops, the loss and the held-out loss: all the columns of rank 0 that there can be."""

_LEAST_LAYERS = 14
"""Room below which the layers are left out, where they would be cut to nothing that could be read."""

_KIND_RANK = 2
"""Of the losses by kind of text."""


@dataclass(frozen=True)
class _Column:
    """A column of numbers.

    Attributes:
        name: its header.
        cells: one a row.
        rank: columns of the highest rank give way first; those of rank 0 stay.
    """

    name: str
    cells: Sequence[str]
    rank: int = 0

    @property
    def width(self) -> int:
        """Columns of the terminal that it takes."""
        return max(map(len, (self.name, *self.cells)))


def build_front_table(
    front: Sequence[TrialResult],
    *,
    width: int,
    is_brief: bool = False,
    newest: Plan | None = None,
) -> Table:
    """Lay a front out as a table.

    Args:
        front: the baseline and the points of the front.
        width: columns of the terminal. Perplexity, time, speed-up and losses by kind, layers and depth give way, in
            this order.
        is_brief: one line a plan, without held-out loss, losses by kind, perplexity and time.
        newest: the plan to point out.
    """
    columns = _build_columns(front, is_brief=is_brief)
    for column in sorted(columns, key=lambda column: -column.rank):
        if column.rank and _measure(columns) + _GAP + _LAYERS_WIDTH[column.rank] > width:
            columns.remove(column)
    if _measure(columns) > width and len(columns) == _MOST_FIXED:  # the held-out loss is the one to trust
        del columns[_MOST_FIXED - 2]
    layers = [describe_layers(record.plan) for record in front]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column.name, justify="right", no_wrap=True)
    layers_width = width - _measure(columns) - _GAP
    widest = max(map(len, layers))
    has_layers = layers_width >= max(len("layers"), min(_LEAST_LAYERS, widest))
    if has_layers:
        has_drops = any(record.num_dropped for record in front)
        name = "layers together" if layers_width >= len("layers together") and not has_drops else "layers"
        shown_width = min(layers_width, max(len(name), widest))
        is_cut = is_brief or layers_width < _FOLD_WIDTH
        table.add_column(name, no_wrap=is_cut, overflow="ellipsis" if is_cut else "fold", width=shown_width)
    for index, record in enumerate(front):
        cells = [column.cells[index] for column in columns] + ([layers[index]] if has_layers else [])
        table.add_row(*cells, style="bold" if record.plan == newest else None)
    return table


def get_metric(front: Sequence[TrialResult]) -> Metric:
    """Return the loss that was searched: the divergence is measured only where it is what is searched."""
    return "nll" if front[0].loss.kl_nats_per_token is None else "kl"


def spread_rows(rows: Sequence[_Row], count: int) -> list[_Row]:
    """Choose so many rows, at least two, evenly from the first to the last."""
    if len(rows) <= count:
        return list(rows)
    return [rows[round(index * (len(rows) - 1) / (count - 1))] for index in range(count)]


def _build_columns(front: Sequence[TrialResult], *, is_brief: bool) -> list[_Column]:
    metric = get_metric(front)
    names = {
        "ms": "ms/token",
        **({"loss": "delta nll"} if metric == "nll" else {"loss": "kl", "held out": "held-out kl"}),
    }
    cells = list_front_columns(front, metric=metric, digits=3, sign=" ±", by_kind=not is_brief)
    if is_brief or not any(cells["held out"]):
        del cells["held out"]
    ranks = _RANKS | (_RANKS_WITH_DROPS if "drops" in cells and "speed-up" in cells else {})
    columns = [_Column(names.get(name, name), column, ranks.get(name, _KIND_RANK)) for name, column in cells.items()]
    return [column for column in columns if not is_brief or column.rank < 3]


def _measure(columns: Sequence[_Column]) -> int:
    return sum(column.width for column in columns) + _GAP * (len(columns) - 1)
