"""Rungs of evaluation windows: few for a first look at a plan, all of them for one that may be on the front.

Windows of several kinds of text are interleaved (:mod:`lpsearch.kinds`); a rung then holds as many of every kind.

An evaluator never batches windows of different rungs together, so that a plan's losses are the same bits whether it is
evaluated rung by rung or at once, and both share the hidden states that a prefix cache keeps a batch.

Imports no torch, so that a search can replay a table.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["find_rung_starts", "split_by_rung"]

FIRST_RUNG_WINDOWS = 4
"""Least windows of a kind in the first look: its spread over fewer says next to nothing."""


def find_rung_starts(num_windows: int, num_kinds: int = 1) -> tuple[int, ...]:
    """Return the first window of every rung.

    The first rung is a quarter of the windows, but at least ``FIRST_RUNG_WINDOWS`` of every kind; each that follows
    doubles what came before it; the last takes the rest: 16 windows are 4, 4 and 8, and 16 of each of two kinds 8, 8
    and 16. The sizes depend on these two numbers alone, so that a study means the same rungs whenever it is resumed.

    Args:
        num_windows: windows in total, at least 1, and as many of every kind.
        num_kinds: kinds of text.
    """
    num_rounds = num_windows // num_kinds
    starts = [0]
    stop = max(FIRST_RUNG_WINDOWS, num_rounds // 4)
    while 2 * stop <= num_rounds:
        starts.append(stop * num_kinds)
        stop *= 2
    return tuple(starts)


def split_by_rung(window_indices: Sequence[int], num_windows: int, num_kinds: int = 1) -> list[list[int]]:
    """Split a selection of windows by rung, in the order of the rungs; rungs without a window are left out.

    Args:
        window_indices: which windows, each in ``[0, num_windows)``, in any order.
        num_windows: windows in total.
        num_kinds: kinds of text.

    Returns:
        The windows of each rung, in the order in which they were given.
    """
    starts = find_rung_starts(num_windows, num_kinds)
    bounds = zip(starts, (*starts[1:], num_windows), strict=True)
    parts = [[index for index in window_indices if start <= index < stop] for start, stop in bounds]
    return [part for part in parts if part]
