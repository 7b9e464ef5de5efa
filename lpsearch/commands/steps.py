"""Shows one piece of work: a bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lpsearch.commands.console import get_output
from lpsearch.wording import escape_controls

__all__ = ["LINE_INTERVAL_S", "NARROW", "build_bar", "choose_width", "clip", "draw", "format_seconds", "show_steps"]

logger = logging.getLogger(__name__)

_UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))

LINE_INTERVAL_S = 10.0
"""Seconds between two lines of one piece of work, where there is no live display."""

NARROW = 60
"""Columns below which there is no room for a bar beside its numbers."""

_MAX_WIDTH = 117
"""Columns of the live display on wider terminals."""

_MARGIN = 3
"""Columns left free at its right: a ``^C`` that wrapped would leave half of the display behind."""


@contextmanager
def show_steps(description: str, *, unit: Literal["steps", "bytes"] = "steps") -> Iterator[Callable[[int, int], None]]:
    """Show one piece of work, such as sampling, while the block runs.

    Args:
        description: what is being done.
        unit: what is counted. Bytes are those of a download, and more work follows when all are there.

    Yields:
        A function to call with the steps done and the steps in all; work that never calls it is shown without a share.
    """
    output = get_output()
    steps = _Steps(description, in_bytes=unit == "bytes")
    if output.is_live:
        with draw(steps, output.console):
            yield steps.update
    else:
        steps.log(description)
        interval_s = 1.0 if output.is_json else LINE_INTERVAL_S
        logged_at = time.monotonic()

        def update(done: int, total: int) -> None:
            nonlocal logged_at
            steps.update(done, total)
            if steps.share is not None and time.monotonic() - logged_at >= interval_s:
                logged_at = time.monotonic()
                steps.log(f"{description}: {steps.count}, {format_seconds(steps.estimate_seconds_left())} left")

        yield update
    if output.is_json or steps.elapsed_s >= 1:
        steps.log(f"{description} took {format_seconds(steps.elapsed_s)}")


class _Steps:
    """One piece of work, drawn as a bar."""

    def __init__(self, description: str, *, in_bytes: bool) -> None:
        self._description = description
        self._in_bytes = in_bytes
        self._began_at = time.monotonic()
        self._done = 0
        self._total: int | None = None

    def update(self, done: int, total: int) -> None:
        self._done, self._total = done, total

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began_at

    @property
    def share(self) -> float | None:
        """Share that is done; None where it is not known, as after a download."""
        if not self._total or (self._in_bytes and self._done >= self._total):
            return None
        return self._done / self._total

    @property
    def count(self) -> str:
        """What is done, in words."""
        if self.share is None or not self._total:
            return ""
        if not self._in_bytes:
            return f"{self.share:.0%}"
        name, size = next((name, size) for name, size in _UNITS if self._total >= size or name == "kB")
        return f"{self._done / size:.1f} of {self._total / size:.1f} {name}"

    def estimate_seconds_left(self) -> float | None:
        if self.share is None or not self._total or not self._done:
            return None
        return self.elapsed_s / self._done * (self._total - self._done)

    def log(self, line: str) -> None:
        progress = {
            "step": self._description,
            "done": self._done,
            "total": self._total,
            "elapsed_s": round(self.elapsed_s, 3),
        }
        logger.info("%s", line, extra={"progress": progress})

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield build_bar(
            self._description,
            count=self.count,
            share=self.share,
            elapsed_s=self.elapsed_s,
            left_s=self.estimate_seconds_left(),
            width=choose_width(options),
        )


@contextmanager
def draw(display: RenderableType, console: Console) -> Iterator[None]:
    """Draw a display four times a second while the block runs, then remove it; the cursor always comes back."""
    # Where stdout is a terminal, what a library prints there would tear the display.
    with Live(display, console=console, refresh_per_second=4, transient=True, redirect_stdout=sys.stdout.isatty()):
        yield


def build_bar(
    label: str, *, count: str, share: float | None, elapsed_s: float, left_s: float | None, width: int
) -> RenderableType:
    """Lay out what is being done and how far it is: one line with a bar, or two lines where that is too wide."""
    times = format_seconds(elapsed_s) + ("" if left_s is None else f", {format_seconds(left_s)} left")
    if width < NARROW:
        return Group(clip(label, "bold", width), clip(f"{count} {times}".lstrip(), "", width))
    grid = Table.grid(expand=False, padding=(0, 1))
    grid.width = width
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True, justify="right")
    grid.add_column(no_wrap=True)
    bar = ProgressBar(total=None if share is None else 1.0, completed=share or 0.0, pulse=share is None)
    grid.add_row(Text(escape_controls(label, in_one_line=True), "bold"), bar, count, times)
    return grid


def clip(line: str, style: str, width: int) -> Text:
    """Cut a line to so many columns."""
    text = Text(escape_controls(line, in_one_line=True), style, no_wrap=True)
    text.truncate(width, overflow="ellipsis")
    return text


def choose_width(options: ConsoleOptions) -> int:
    """Return the columns that a live display takes of a terminal."""
    return min(options.max_width - _MARGIN, _MAX_WIDTH)


def format_seconds(seconds: float | None) -> str:
    """Return a duration as hours, minutes and seconds; dashes where it is not known."""
    if seconds is None:
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
