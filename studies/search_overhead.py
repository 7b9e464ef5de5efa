"""Measure what a study costs beside its evaluations: ask, tell, storage and bookkeeping.

Evaluations only sleep, so the study's time beyond the sum of theirs is overhead. It includes creating the database and
the first ask, which no evaluation can hide.

    python studies/search_overhead.py --layers 32 --trials 200 --seconds 0.5
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from lpsearch.evaluation.losses import WindowLosses
from lpsearch.plan import Plan
from lpsearch.search import SAMPLER_NAMES, PlanSpace, StudyStore, run_study

BASE_NLL = 3.0


class SleepingEvaluator:
    """Sleeps a fixed time for each window; the loss grows with the joins.

    Args:
        num_layers: layers of the model.
        num_windows: number of windows.
        seconds: duration of an evaluation on all windows.
    """

    def __init__(self, num_layers: int, *, num_windows: int, seconds: float) -> None:
        self.num_windows = num_windows
        self.busy_s = 0.0
        self._costs = np.random.default_rng(0).gamma(1.0, 0.05, num_layers - 1)
        self._seconds = seconds

    def evaluate_windows(self, plan: Plan, window_indices: Sequence[int]) -> WindowLosses:
        """Sleep, and return losses that differ between windows by a shift and some noise."""
        began_at = time.perf_counter()
        time.sleep(self._seconds * len(window_indices) / self.num_windows)
        total = float(self._costs[list(plan.joins)].sum())
        loss = BASE_NLL + total + 0.1 * total**2
        noise = np.random.default_rng(sum(1 << i for i in plan.joins)).normal(0.0, 0.05 * total, self.num_windows)
        losses = WindowLosses(tuple(loss + 0.01 * i + float(noise[i]) for i in window_indices), None, 2047)
        self.busy_s += time.perf_counter() - began_at
        return losses


def measure_overhead(
    sampler: str,
    *,
    num_layers: int,
    max_group: int,
    num_trials: int,
    num_windows: int,
    seconds: float,
    staged: bool,
) -> dict[str, Any]:
    """Run one study in a temporary database.

    Returns:
        The sampler, its wall and evaluation time in s, and the difference in ms for each trial and as a share.
    """
    evaluator = SleepingEvaluator(num_layers, num_windows=num_windows, seconds=seconds)
    with tempfile.TemporaryDirectory(prefix="lpsearch-overhead-") as directory:
        began_at = time.perf_counter()
        with StudyStore(f"sqlite:///{Path(directory) / 'study.db'}", study_name="overhead") as store:
            result = run_study(
                evaluator=evaluator,
                space=PlanSpace(num_layers, max_group),
                budget=num_trials,
                store=store,
                sampler=sampler,
                staged=staged,
            )
        wall_s = time.perf_counter() - began_at
    overhead_s = wall_s - evaluator.busy_s
    return {
        "sampler": sampler,
        "layers": num_layers,
        "trials": len(result.results),
        "staged": staged,
        "evaluation_s": evaluator.busy_s,
        "wall_s": wall_s,
        "overhead_ms_per_trial": 1e3 * overhead_s / len(result.results),
        "overhead_share": overhead_s / wall_s,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each sampler, and print its row and its JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--max-group", type=int, default=2)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=0.5, help="duration of an evaluation on all windows")
    parser.add_argument("--unstaged", action="store_true", help="evaluate every plan on all windows")
    parser.add_argument("--samplers", default="pairset", help=f"comma-separated: {', '.join(SAMPLER_NAMES)}")
    options = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print(f"{'sampler':10s} {'trials':>6s} {'evaluating':>11s} {'wall':>9s} {'overhead/trial':>15s} {'share':>7s}")
    summaries = []
    for sampler in options.samplers.split(","):
        summary = measure_overhead(
            sampler,
            num_layers=options.layers,
            max_group=options.max_group,
            num_trials=options.trials,
            num_windows=options.windows,
            seconds=options.seconds,
            staged=not options.unstaged,
        )
        summaries.append(summary)
        print(
            f"{sampler:10s} {summary['trials']:6d} {summary['evaluation_s']:9.2f} s {summary['wall_s']:7.2f} s "
            f"{summary['overhead_ms_per_trial']:12.1f} ms {summary['overhead_share']:7.2%}",
            flush=True,
        )
    for summary in summaries:
        print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
