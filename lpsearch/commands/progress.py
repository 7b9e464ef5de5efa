"""Shows a search while it runs: a live display on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console, ConsoleOptions, RenderResult

from lpsearch.commands.console import get_output
from lpsearch.commands.steps import LINE_INTERVAL_S, NARROW, build_bar, choose_width, clip, draw, format_seconds
from lpsearch.commands.tables import build_front_table, get_metric, spread_rows
from lpsearch.plan import Plan
from lpsearch.search import EvaluationUpdate, TrialResult, TrialUpdate
from lpsearch.search.results import finite_or_none
from lpsearch.wording import describe_changes, describe_layers, describe_origin, name_count

__all__ = ["SearchProgress", "show_search"]

logger = logging.getLogger(__name__)

_LOG_LINES = 4
"""Lines of a terminal that the live display leaves to the log."""

_NUM_RECENT = 20
"""Trials from whose duration the time left is estimated."""


@contextmanager
def show_search() -> Iterator[SearchProgress]:
    """Show a search while the block runs.

    Yields:
        What ``run_study`` tells of every evaluation and every trial.
    """
    output = get_output()
    if output.is_live:
        display = _SearchDisplay()
        with draw(display, output.console):
            yield display
    else:
        yield _SearchLines(is_throttled=not output.is_json)


class SearchProgress(Protocol):
    """Follows a search; ``run_study`` calls its methods."""

    def on_evaluation(self, update: EvaluationUpdate) -> None:
        """Take note of an evaluation that begins."""

    def on_trial(self, update: TrialUpdate) -> None:
        """Take note of a finished trial."""


class _SearchLines:
    """Logs a search: every trial, or only those that reach the next tenth of the budget, and one now and then."""

    def __init__(self, *, is_throttled: bool) -> None:
        self._clock = _Clock()
        self._is_throttled = is_throttled
        self._logged_at = time.monotonic()
        self._num_tenths = -1

    def on_evaluation(self, update: EvaluationUpdate) -> None:
        pass

    def on_trial(self, update: TrialUpdate) -> None:
        self._clock.mark()
        num_tenths = 10 * update.num_finished // update.budget
        is_due = num_tenths > self._num_tenths or time.monotonic() - self._logged_at >= LINE_INTERVAL_S
        if self._is_throttled and not is_due:
            return
        self._logged_at, self._num_tenths = time.monotonic(), num_tenths
        left_s = self._clock.estimate_seconds_left(update.budget - update.num_finished)
        record = update.result
        metric = get_metric(update.front or [record])
        best = ", ".join(
            f"{point.get_cost(metric):.3f} at {describe_changes(point.plan)}"
            for point in spread_rows(update.front[1:], 4)
        )
        logger.info(
            "trial %d/%d  %s: %s, %s %.4f  front of %d%s  %s left",
            update.num_finished,
            update.budget,
            describe_origin(record.origin),
            describe_changes(record.plan),
            "delta nll" if metric == "nll" else "kl",
            record.get_cost(metric),
            len(update.front),
            f": {best}" if best else "",
            format_seconds(left_s),
            extra={
                "progress": {
                    "step": "search",
                    "trials": update.num_finished,
                    "budget": update.budget,
                    "elapsed_s": round(update.elapsed_s, 3),
                    "seconds_left": None if left_s is None else round(left_s, 3),
                    "trial": _build_point(record),
                    "front": [_build_point(point) for point in update.front],
                }
            },
        )


class _SearchDisplay:
    """Draws a search at the present size of the terminal: its progress, and the front below."""

    def __init__(self) -> None:
        self._clock = _Clock()
        self._num_finished = 0
        self._budget: int | None = None
        self._note = ""
        self._front: Sequence[TrialResult] = ()
        self._newest: Plan | None = None

    def on_evaluation(self, update: EvaluationUpdate) -> None:
        self._num_finished, self._budget, self._front = update.num_finished, update.budget, update.front
        layers = describe_layers(update.plan)
        what = f"{describe_changes(update.plan)}: layers {layers}" if layers else "the unmodified model"
        self._note = f"{describe_origin(update.origin)}, {name_count(update.num_windows, 'window')}, {what}"

    def on_trial(self, update: TrialUpdate) -> None:
        self._clock.mark()
        self._num_finished, self._budget, self._front = update.num_finished, update.budget, update.front
        self._newest = update.result.plan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = choose_width(options)
        budget = self._budget
        yield build_bar(
            "searching",
            count="" if budget is None else f"{self._num_finished}/{budget}",
            share=None if budget is None else self._num_finished / budget,
            elapsed_s=self._clock.elapsed_s,
            left_s=None if budget is None else self._clock.estimate_seconds_left(budget - self._num_finished),
            width=width,
        )
        yield clip(self._note, "dim", width)
        num_rows = options.size.height - _LOG_LINES - (6 if width < NARROW else 5)  # what is no row of the table
        if len(self._front) > 1 and num_rows >= 3:
            shown = spread_rows(self._front, num_rows)
            yield build_front_table(shown, width=width, is_brief=True, newest=self._newest)
            if len(shown) < len(self._front):
                yield clip(f"{len(self._front) - len(shown)} more on the front", "dim", width)


class _Clock:
    """Estimates the time left from the latest trials, since trials become slower or quicker during a search."""

    def __init__(self) -> None:
        self._began_at = time.monotonic()
        self._marks = deque([self._began_at], maxlen=_NUM_RECENT + 1)

    def mark(self) -> None:
        """Note that a trial is finished."""
        self._marks.append(time.monotonic())

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began_at

    def estimate_seconds_left(self, num_left: int) -> float | None:
        """Estimate the time that so many more trials take, from the last one on; None before the first."""
        num_recent = len(self._marks) - 1
        if not num_recent:
            return None
        trial_s = (self._marks[-1] - self._marks[0]) / num_recent
        return max(0.0, trial_s * num_left - (time.monotonic() - self._marks[-1]))


def _build_point(record: TrialResult) -> dict[str, Any]:
    """Build a plan's entry in the lines for programs; losses in nats per token, null where they are not finite."""
    return {
        "num_joins": record.num_joins,
        "num_dropped": record.num_dropped,
        "depth_reduction": record.depth_reduction,
        "delta_nll": finite_or_none(record.loss.delta_nll),
        "delta_nll_se": finite_or_none(record.loss.delta_nll_se),
        "kl_nats_per_token": finite_or_none(record.loss.kl_nats_per_token),
        "latency_ms": record.latency_ms,
        "speedup": record.speedup,
        "groups": record.plan.to_lists(),
        "dropped": record.plan.dropped,
        "origin": record.origin,
        "trial": record.trial,
    }
