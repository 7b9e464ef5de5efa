"""The live display of a search: trial, time left and the best front so far; plain lines where stderr is no terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich import box
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lpsearch.commands.console import stderr_console
from lpsearch.evaluation.losses import PairedDelta
from lpsearch.plan import Plan
from lpsearch.search import PlanRecord, TrialUpdate

__all__ = ["SearchDisplay", "build_front_table", "show_search", "show_steps"]

logger = logging.getLogger(__name__)


class SearchDisplay(Protocol):
    """What shows the trials of a search."""

    def __call__(self, update: TrialUpdate) -> None:
        """Show one finished trial."""


@contextmanager
def show_search(*, enabled: bool) -> Iterator[SearchDisplay | None]:
    """Show a search while the block runs.

    Args:
        enabled: False shows nothing.

    Yields:
        What to call after every trial; None where nothing is shown.
    """
    console = stderr_console()
    if not enabled:
        yield None
    elif not console.is_terminal:
        yield _log_update
    else:
        progress = Progress(
            TextColumn("[bold]trial"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]} left"),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        task = progress.add_task("search", total=None, left="-:--:--", note="")
        with Live(Group(progress), console=console, refresh_per_second=4, transient=True) as live:

            def show(update: TrialUpdate) -> None:
                progress.update(
                    task,
                    completed=update.num_finished,
                    total=update.budget,
                    left=_format_seconds(_estimate_seconds_left(update)),
                    note=_describe(update),
                )
                live.update(Group(build_front_table(update.front, title="best front so far"), progress))

            yield show


@contextmanager
def show_steps(description: str, *, enabled: bool) -> Iterator[_Steps]:
    """Show a bar over the steps of one piece of work, such as sampling.

    Args:
        description: what is being done.
        enabled: False shows nothing.

    Yields:
        What to call with steps done and steps in all.
    """
    console = stderr_console()
    progress = Progress(
        TextColumn(description), BarColumn(), TimeElapsedColumn(), console=console, disable=not enabled, transient=True
    )
    if not console.is_terminal:
        yield lambda done, total: None
        return
    with progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class _Steps(Protocol):
    def __call__(self, done: int, total: int) -> None: ...


def build_front_table(
    front: Sequence[PlanRecord], *, title: str, heldout: Mapping[Plan, PairedDelta] | None = None
) -> Table:
    """Lay a front out as a table, the baseline first.

    Args:
        front: the baseline and the points of the front.
        title: what stands above it.
        heldout: held-out loss of each plan, where it is known.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    base_ms = front[0].latency_ms
    columns = ["joins", "less depth", "delta nll"] + (["held out"] if heldout is not None else []) + ["perplexity"]
    for column in columns + (["ms/token", "speed-up"] if base_ms is not None else []):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("layers together", overflow="fold", ratio=1)
    for record in front:
        cells = [
            str(record.num_joins),
            f"{record.depth_reduction:.1%}",
            _format_delta(record.delta_nll, record.delta_nll_se),
        ]
        if heldout is not None:
            paired = heldout.get(record.plan)
            cells.append("" if paired is None else _format_delta(paired.delta, paired.standard_error))
        cells.append(f"{record.perplexity:.2f}")
        if base_ms is not None:
            latency_ms = record.latency_ms
            cells += ["", ""] if latency_ms is None else [f"{latency_ms:.2f}", f"{base_ms / latency_ms:.3f}x"]
        groups = [group for group in record.plan.groups if len(group) > 1]
        cells.append(" ".join(f"{group[0]}-{group[-1]}" for group in groups))
        table.add_row(*cells)
    return table


def _format_delta(delta: float, standard_error: float | None) -> str:
    return f"{delta:.3f}" if not standard_error else f"{delta:.3f} ±{standard_error:.3f}"


def _describe(update: TrialUpdate) -> str:
    record = update.record
    return f"{record.origin}: {record.num_joins} joins, delta {record.delta_nll:.4f}"


def _log_update(update: TrialUpdate) -> None:
    logger.info(
        "trial %d/%d  %s  front of %d  %s left",
        update.num_finished,
        update.budget,
        _describe(update),
        len(update.front),
        _format_seconds(_estimate_seconds_left(update)),
    )


def _estimate_seconds_left(update: TrialUpdate) -> float:
    """Estimate the time to the budget from the mean duration of this run's trials."""
    return update.elapsed_s / update.num_new * max(0, update.budget - update.num_finished)


def _format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
