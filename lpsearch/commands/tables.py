"""The front as a table of a terminal, as wide as there is room for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich import box
from rich.table import Table

from lpsearch.evaluation.losses import PairedDelta
from lpsearch.plan import Plan
from lpsearch.search import TrialResult
from lpsearch.search.results import Metric
from lpsearch.wording import describe_layers

__all__ = ["build_front_table", "get_metric", "spread_rows"]

_Row = TypeVar("_Row")

_GAP = 3
"""Columns of the terminal between two columns of the table."""

_FOLD_WIDTH = 40
"""Room from which the layers of a plan may take several lines, not too many."""

_LAYERS_WIDTH = {1: 0, 2: 16, 3: _FOLD_WIDTH, 4: _FOLD_WIDTH}
"""Room for the layers without which a column of a rank gives way."""


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
    heldout: Mapping[Plan, PairedDelta] | None = None,
    is_brief: bool = False,
    newest: Plan | None = None,
) -> Table:
    """Lay a front out as a table.

    Args:
        front: the baseline and the points of the front.
        width: columns of the terminal. Perplexity, time, speed-up, layers and depth give way, in this order.
        heldout: held-out loss of each plan by the metric of the search, where it is known.
        is_brief: one line a plan, without perplexity and time.
        newest: the plan to point out.
    """
    columns = _build_columns(front, heldout)
    if is_brief:
        columns = [column for column in columns if column.rank < 3]
    for column in sorted(columns, key=lambda column: -column.rank):
        if column.rank and _measure(columns) + _GAP + _LAYERS_WIDTH[column.rank] > width:
            columns.remove(column)
    layers = [describe_layers(record.plan) for record in front]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column.name, justify="right", no_wrap=True)
    layers_width = width - _measure(columns) - _GAP
    has_layers = layers_width >= len("layers")
    if has_layers:
        name = "layers together" if layers_width >= len("layers together") else "layers"
        shown_width = min(layers_width, max(map(len, (name, *layers))))
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


def _build_columns(front: Sequence[TrialResult], heldout: Mapping[Plan, PairedDelta] | None) -> list[_Column]:
    columns = [
        _Column("joins", [str(record.num_joins) for record in front]),
        _Column("less depth", [f"{record.depth_reduction:.1%}" for record in front], rank=1),
    ]
    delta = _Column("delta nll", [_format_loss(record.loss.delta_nll, record.loss.delta_nll_se) for record in front])
    is_kl = get_metric(front) == "kl"
    if is_kl:
        columns.append(_Column("kl", [_format_loss(record.get_cost("kl"), record.loss.kl_se) for record in front]))
    else:
        columns.append(delta)
    if heldout is not None:
        known = [heldout.get(record.plan) for record in front]
        cells = ["" if paired is None else _format_loss(paired.delta, paired.standard_error) for paired in known]
        columns.append(_Column("held-out kl" if is_kl else "held out", cells))
    if is_kl:
        columns.append(dataclasses.replace(delta, rank=3))  # not what is searched
    columns.append(_Column("perplexity", [f"{record.perplexity:.2f}" for record in front], rank=4))
    base_ms = front[0].latency_ms
    if base_ms is not None:
        times = [record.latency_ms for record in front]
        columns.append(_Column("ms/token", ["" if ms is None else f"{ms:.2f}" for ms in times], rank=3))
        columns.append(_Column("speed-up", ["" if ms is None else f"{base_ms / ms:.3f}x" for ms in times], rank=2))
    return columns


def _measure(columns: Sequence[_Column]) -> int:
    return sum(column.width for column in columns) + _GAP * (len(columns) - 1)


def _format_loss(loss: float, standard_error: float | None) -> str:
    return f"{loss:.3f}" if not standard_error else f"{loss:.3f} ±{standard_error:.3f}"
