"""The Pareto front of a study: the plans that no other finished plan beats in both objectives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

from lpsearch.search.records import Metric, PlanRecord

__all__ = ["Objective", "build_front", "find_rival"]

Objective = Literal["depth", "latency"]


def build_front(
    records: Iterable[PlanRecord],
    *,
    metric: Metric = "nll",
    objective: Objective = "depth",
    include_partial: bool = False,
) -> list[PlanRecord]:
    """Return the baseline, then every plan that no other plan beats, fewest joins first.

    A plan is beaten by one that saves at least as much and costs at most as much, and is strictly better in one of
    the two. Of equal plans the one that finished first stays. The baseline leads even where a plan with joins has a
    lower loss than it: every other value is relative to it.

    Args:
        records: finished plans; those whose loss is not finite are left out.
        metric: which loss is the cost.
        objective: what is saved: ``depth`` counts joins, ``latency`` compares ``latency_ms``.
        include_partial: believe the losses of plans that were evaluated on fewer tokens than the baseline as well.

    Returns:
        Empty unless the baseline is among the records.
    """
    finished = sorted(records, key=lambda record: record.trial)
    baseline = next((record for record in finished if record.num_joins == 0), None)
    if baseline is None:
        return []
    candidates = [
        record
        for record in finished
        if record.num_joins > 0
        and math.isfinite(_get_time(record, objective))
        and (include_partial or record.proxy_tokens >= baseline.proxy_tokens)
    ]
    # Best saving first, then lowest cost: whatever comes later must cost strictly less than all before it.
    candidates.sort(key=lambda record: (_get_time(record, objective), record.get_cost(metric), record.trial))
    front: list[PlanRecord] = []
    lowest_cost = math.inf
    for record in candidates:
        if record.get_cost(metric) < lowest_cost:
            front.append(record)
            lowest_cost = record.get_cost(metric)
    if objective == "latency" and baseline.latency_ms is not None:
        # A plan no faster than the baseline saves nothing, unless it is the better model.
        front = [
            record
            for record in front
            if _get_time(record, objective) < baseline.latency_ms or record.get_cost(metric) < baseline.get_cost(metric)
        ]
    return [baseline, *sorted(front, key=lambda record: (record.num_joins, record.trial))]


def find_rival(
    front: Sequence[PlanRecord],
    *,
    depth: int,
    latency_ms: float | None,
    metric: Metric = "nll",
    objective: Objective = "depth",
) -> PlanRecord | None:
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
    saving = [record for record in front if record.num_joins > 0 and _get_time(record, objective) <= limit]
    return min(saving, key=lambda record: record.get_cost(metric), default=None)


def _get_time(record: PlanRecord, objective: Objective) -> float:
    """Return what the plan takes: its depth in layers, or its latency in ms; inf where that is not known."""
    if objective == "depth":
        return record.plan.depth
    return math.inf if record.latency_ms is None else record.latency_ms
