"""The Pareto front of a study: the plans that no other finished plan beats in both objectives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lpsearch.config import Metric, Objective
from lpsearch.search.results import TrialResult

__all__ = ["Objective", "build_front", "find_rival"]


def build_front(
    results: Iterable[TrialResult],
    *,
    metric: Metric = "nll",
    objective: Objective = "depth",
    include_partial: bool = False,
) -> list[TrialResult]:
    """Return the baseline, then every plan that no other plan beats, fewest joins first.

    Where some of them drop branches, they come by their time, slowest first.

    A plan is beaten by one that saves at least as much and costs at most as much, and is strictly better in one of
    the two. Of equal plans the one that finished first stays. The baseline leads even where a plan with joins has a
    lower loss than it: every other value is relative to it.

    Args:
        results: finished plans; those whose loss is not finite are left out.
        metric: which loss is the cost.
        objective: what is saved: ``depth`` counts joins, ``latency`` compares ``latency_ms``.
        include_partial: believe the losses of plans that racing stopped as well.

    Returns:
        Empty unless the baseline is among the results.
    """
    finished = sorted(results, key=lambda result: result.trial)
    baseline = next((result for result in finished if result.is_baseline), None)
    if baseline is None:
        return []
    candidates = [
        result
        for result in finished
        if not result.is_baseline
        and math.isfinite(_get_time(result, objective))
        and (include_partial or result.state == "complete")
    ]
    # Best saving first, then lowest cost: whatever comes later must cost strictly less than all before it.
    candidates.sort(key=lambda result: (_get_time(result, objective), result.get_cost(metric), result.trial))
    front: list[TrialResult] = []
    lowest_cost = math.inf
    for result in candidates:
        if result.get_cost(metric) < lowest_cost:
            front.append(result)
            lowest_cost = result.get_cost(metric)
    if objective == "latency" and baseline.latency_ms is not None:
        # A plan no faster than the baseline saves nothing, unless it is the better model.
        front = [
            result
            for result in front
            if _get_time(result, objective) < baseline.latency_ms or result.get_cost(metric) < baseline.get_cost(metric)
        ]
    if any(result.num_dropped for result in front):
        return [baseline, *sorted(front, key=lambda result: (-_get_time(result, objective), result.trial))]
    return [baseline, *sorted(front, key=lambda result: (result.num_joins, result.trial))]


def find_rival(
    front: Sequence[TrialResult],
    *,
    depth: float,
    latency_ms: float | None,
    metric: Metric = "nll",
    objective: Objective = "depth",
) -> TrialResult | None:
    """Return the plan of a front that a new plan has to beat: the one of least loss that saves at least as much.

    Args:
        front: as :func:`build_front` returns it.
        depth: of the new plan.
        latency_ms: of the new plan; needed for the objective ``latency`` alone.
        metric: which loss is the cost.
        objective: what is saved.
    """
    limit = depth if objective == "depth" else latency_ms
    assert limit is not None
    saving = [result for result in front if not result.is_baseline and _get_time(result, objective) <= limit]
    return min(saving, key=lambda result: result.get_cost(metric), default=None)


def _get_time(result: TrialResult, objective: Objective) -> float:
    """Return what the plan takes: its depth in layers, or its latency in ms; inf where that is not known."""
    if objective == "depth":
        return result.plan.depth
    return math.inf if result.latency_ms is None else result.latency_ms
