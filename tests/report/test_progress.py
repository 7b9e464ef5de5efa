"""Hypervolume and progress against sums over thin slices and fronts found pair by pair."""

from __future__ import annotations

import math
import random

import pytest

from lpsearch.plan import Plan
from lpsearch.report.progress import compute_hypervolume, find_reference_cost, trace_progress
from lpsearch.search import TrialResult
from tests.results import build_result
from tests.tolerances import HYPERVOLUME, HYPERVOLUME_OF_TIMES

NUM_LAYERS = 9


def build_records(seed: int, count: int = 40) -> list[TrialResult]:
    """Draw plans with any loss; some have fewer tokens than the baseline, one has no loss."""
    rng = random.Random(seed)
    records = []
    for trial in range(count):
        joins = [] if trial == 0 else [i for i in range(0, NUM_LAYERS - 1, 2) if rng.random() < 0.5]
        if trial and not joins:
            joins = [rng.randrange(NUM_LAYERS - 1)]
        delta = 0.0 if trial == 0 else math.nan if trial == 7 else 0.3 * len(joins) * rng.uniform(-0.1, 1.5)
        is_whole = trial == 0 or trial % 5 > 0
        records.append(
            build_result(
                Plan.from_joins(NUM_LAYERS, joins),
                delta,
                trial=trial,
                delta_nll_se=0.01,
                latency_ms=10 - len(joins) - 0.1 * sum(joins),
                num_windows=4 if is_whole else 1,
                num_tokens=100 if is_whole else 25,
                state="broken" if math.isnan(delta) else "complete" if is_whole else "stopped",
            )
        )
    return records


def slice_hypervolume(points: list[tuple[float, float]], reference: float, num_slices: int) -> float:
    total = 0.0
    for i in range(num_slices):
        middle = (i + 0.5) / num_slices
        reached = [cost for saving, cost in points if saving >= middle]
        total += max(0.0, reference - min(reached, default=reference)) / num_slices
    return total


@pytest.mark.parametrize("seed", range(5))
def test_hypervolume_is_the_sum_of_slices(seed: int) -> None:
    rng = random.Random(seed)
    points = [(rng.randrange(21) / 20, rng.uniform(-0.2, 2.0)) for _ in range(12)]
    for reference in (0.1, 1.0, 3.0):
        assert compute_hypervolume(points, reference) == pytest.approx(slice_hypervolume(points, reference, 20))
    assert compute_hypervolume([], 1.0) == 0.0


@pytest.mark.parametrize("objective", ["depth", "latency"])
@pytest.mark.parametrize("seed", range(3))
def test_progress_is_what_each_beginning_of_the_search_knew(seed: int, objective: str) -> None:
    records = build_records(seed)
    base = records[0]

    def saving(record: TrialResult) -> float:
        return record.depth_reduction if objective == "depth" else 1 - record.latency_ms / base.latency_ms

    steps = trace_progress(records, metric="nll", objective=objective, reference_cost=0.8)
    assert [step.trial for step in steps] == list(range(len(records)))
    for end, step in enumerate(steps, start=1):
        known = [r for r in records[:end] if r.proxy_tokens >= base.proxy_tokens and math.isfinite(r.loss.delta_nll)]
        assert step.tokens == sum(record.proxy_tokens for record in records[:end])
        assert step.best == {
            k: min(r.loss.delta_nll for r in known if r.num_joins == k) for k in {r.num_joins for r in known}
        }
        # every saving is a multiple of this slice, or so close to one that it does not matter
        slices = NUM_LAYERS if objective == "depth" else 20000
        expected = slice_hypervolume([(saving(record), record.loss.delta_nll) for record in known], 0.8, slices)
        assert step.hypervolume == pytest.approx(
            expected, abs=HYPERVOLUME if objective == "depth" else HYPERVOLUME_OF_TIMES
        )


def test_the_reference_is_a_nat_or_the_worst_of_the_front() -> None:
    base, *others = build_records(0, 6)

    def find(*costs: float) -> float:
        records = [build_result(others[0].plan, cost) for cost in costs]
        return find_reference_cost([base, *records], "nll")

    assert find(0.2, 0.6) == 0.6
    assert find(0.2, 6.0) == 1.0
    assert find(2.0, 6.0) == 6.0
    assert find() == 1.0
