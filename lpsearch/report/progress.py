"""How a search progressed: what was known after every trial, by the values that the study has now."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lpsearch.config import Metric, Objective
from lpsearch.search import TrialResult, build_front

__all__ = [
    "ProgressStep",
    "compute_hypervolume",
    "find_reference_cost",
    "get_saving",
    "list_levels",
    "trace_progress",
]

SAVING_LEVELS = tuple(range(5, 65, 5))
"""Percent that is saved by which plans are compared where they differ in more than their number of joins."""

LARGEST_USEFUL_COST = 1.0
"""Nats per token beyond which nobody runs a plan; the hypervolume counts up to here."""


_ROUNDING = 1e-9
"""What a share may be below a level and still count, such as a depth of 27 of 30 layers."""


@dataclass(frozen=True)
class ProgressStep:
    """What was known after a trial.

    Attributes:
        trial: number of the trial.
        tokens: tokens behind the losses of all plans so far; tokens that a plan got later count with its trial.
        hypervolume: of the front so far.
        best: least loss by number of joins, of plans evaluated on all windows; where some drop branches, of those that
            save at least so many percent of the depth, or of the time.
    """

    trial: int
    tokens: int
    hypervolume: float
    best: Mapping[int, float]


def find_reference_cost(front: Sequence[TrialResult], metric: Metric) -> float:
    """Return the loss up to which the hypervolume counts.

    It is 1 nat per token, or the largest loss of the front where that is smaller or all are larger.
    """
    costs = [result.get_cost(metric) for result in front if not result.is_baseline]
    if not costs:
        return LARGEST_USEFUL_COST
    largest = max(costs)
    return LARGEST_USEFUL_COST if min(costs) < LARGEST_USEFUL_COST <= largest else largest


def trace_progress(
    results: Sequence[TrialResult], *, metric: Metric, objective: Objective, reference_cost: float
) -> tuple[ProgressStep, ...]:
    """Return what was known after every trial.

    Args:
        results: finished plans in the order of the trials.
        metric: which loss.
        objective: what it is traded against.
        reference_cost: loss up to which the hypervolume counts.
    """
    steps = []
    front: list[TrialResult] = []
    best: dict[int, float] = {}
    tokens = 0
    by_saving = any(result.num_dropped for result in results)
    baseline = next(result for result in results if result.is_baseline)
    for result in results:
        tokens += result.proxy_tokens
        # The front of all plans so far is that of the former front and the new plan.
        known = [*front, result]
        front = build_front(known, metric=metric, objective=objective) or known
        cost = result.get_cost(metric)
        if result.state == "complete":
            saving = get_saving(result, baseline, objective)
            levels = list_levels(saving) if by_saving else [result.num_joins]
            best |= {level: min(cost, best.get(level, math.inf)) for level in levels}
        hypervolume = compute_hypervolume(
            [(get_saving(point, baseline, objective), point.get_cost(metric)) for point in front], reference_cost
        )
        steps.append(ProgressStep(result.trial, tokens, hypervolume, dict(best)))
    return tuple(steps)


def list_levels(saving: float) -> list[int]:
    """Return the levels that a plan reaches, 0 for one that saves less than the first."""
    return [level for level in SAVING_LEVELS if saving >= level / 100 - _ROUNDING] or [0]


def get_saving(result: TrialResult, baseline: TrialResult, objective: Objective) -> float:
    """Return the share of the depth, or of the time, that a plan saves."""
    if objective == "depth":
        return result.depth_reduction
    if result.latency_ms is None or baseline.latency_ms is None:
        return 0.0
    return 1 - result.latency_ms / baseline.latency_ms


def compute_hypervolume(points: Sequence[tuple[float, float]], reference_cost: float) -> float:
    """Return the area between a front and a loss, over what is saved: nats per token times a share.

    Args:
        points: (saving, loss) of each plan, in any order.
        reference_cost: loss that bounds the area.
    """
    ordered = sorted(((max(saving, 0.0), cost) for saving, cost in points), reverse=True)
    area, least = 0.0, reference_cost
    for (saving, cost), (next_saving, _) in pairwise([*ordered, (0.0, 0.0)]):
        least = min(least, cost)
        area += (saving - next_saving) * (reference_cost - least)
    return area
