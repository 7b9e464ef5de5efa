"""Evaluators that cost nothing: a formula, and the exhaustive table of a real model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lpsearch.evaluation.losses import WindowLosses
from lpsearch.plan import Plan

TABLES = Path(__file__).parents[1] / "data" / "tables"
BASE_NLL = 3.0


class SyntheticEvaluator:
    """Additive costs of joins, extra cost for joins at distance 2, windows that differ; counts what it is asked.

    Args:
        num_layers: layers of the model.
        num_windows: windows that it holds.
        broken_join: plans with this join have a loss that is not a number.
        fail_at: raise KeyboardInterrupt at this call, counted from 0.
        easy_windows: on so many windows from the first a plan loses a fifth of what it loses on the others.
        delay_s: sleep at every call.
    """

    def __init__(
        self,
        num_layers: int,
        *,
        num_windows: int = 3,
        broken_join: int | None = None,
        fail_at: int | None = None,
        easy_windows: int = 0,
        delay_s: float = 0.0,
    ) -> None:
        rng = np.random.default_rng(7)
        self.costs = rng.gamma(1.0, 0.1, num_layers - 1)
        self.wobble = rng.normal(0.0, 0.01, (num_windows, num_layers))
        self.num_windows = num_windows
        self.calls: list[tuple[Plan, tuple[int, ...]]] = []
        self._broken_join = broken_join
        self._fail_at = fail_at
        self._easy_windows = easy_windows
        self._delay_s = delay_s

    def compute_delta(self, plan: Plan) -> float:
        joins = plan.joins
        return float(sum(self.costs[list(joins)]) + 0.03 * sum(j - i == 2 for i in joins for j in joins))

    def evaluate_windows(self, plan: Plan, window_indices: Sequence[int]) -> WindowLosses:
        if len(self.calls) == self._fail_at:
            raise KeyboardInterrupt
        self.calls.append((plan, tuple(window_indices)))
        time.sleep(self._delay_s)
        delta = float("nan") if self._broken_join in plan.joins else self.compute_delta(plan)
        nll = tuple(
            BASE_NLL
            + 0.1 * i
            + (0.2 if i < self._easy_windows else 1.0) * (delta + float(sum(self.wobble[i][list(plan.joins)])))
            for i in window_indices
        )
        return WindowLosses(nll, tuple(abs(delta) for _ in window_indices), 63)


class TableEvaluator:
    """Replays the exhaustive table of Gemma 3 270M: all 4181 sets of pairs, means over 8 windows of WikiText-2."""

    num_windows = 1

    def __init__(self) -> None:
        with np.load(TABLES / "gemma3-270m.npz") as table:
            self.nll_of_mask = dict(zip(table["mask"].tolist(), table["nll"].tolist(), strict=True))
            self.num_layers = int(table["L"])

    def evaluate_windows(self, plan: Plan, window_indices: Sequence[int]) -> WindowLosses:
        mask = sum(1 << i for i in plan.joins)
        return WindowLosses(tuple(self.nll_of_mask[mask] for _ in window_indices), None, 511)
