"""Which plan of a front to take within limits: the one rule of ``lpsearch plan pick``, the report and the summary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lpsearch.config import Metric, Objective

__all__ = ["Pickable", "has_gain", "pick_plan"]


class Pickable(Protocol):
    """A plan of a front: a result of a study, or a point of a ``front.json``."""

    @property
    def num_joins(self) -> int:
        """Its joins; 0 is the unmodified model."""

    @property
    def speedup(self) -> float | None:
        """Estimated time of the unmodified model over that of the plan; None with latency off."""

    @property
    def num_dropped(self) -> int:
        """Branches that it drops."""

    @property
    def depth_reduction(self) -> float:
        """Share of the depth that it removes."""

    def get_reported_cost(self, metric: Metric) -> float:
        """Return its loss in nats per token: held out where that is known."""


def has_gain(plan: Pickable, margin: float | None) -> bool:
    """Tell whether a plan is faster than the unmodified model by more than its speed-up may be off."""
    return plan.speedup is not None and plan.speedup > 1 + (margin or 0.0)


def pick_plan(
    front: Sequence[Pickable],
    *,
    metric: Metric,
    objective: Objective,
    max_loss: float | None = None,
    min_speedup: float | None = None,
    margin: float | None = None,
) -> int | None:
    """Pick the plan that saves most within a loss, or without such a limit the one of least loss.

    The unmodified model saves nothing, so it is picked only where no plan that changes it meets the limits, or where
    time is what is saved and no such plan is measurably faster.

    Args:
        front: the plans.
        metric: which loss counts.
        objective: what is saved: depth, or estimated time.
        max_loss: largest loss, in nats per token.
        min_speedup: smallest speed-up.
        margin: by what share a speed-up may be off, so that one within it saves no time that could be measured; None
            where that is not known.

    Returns:
        The place of the plan on the front; None where none meets the limits.
    """
    meeting = [
        index
        for index, plan in enumerate(front)
        if (max_loss is None or plan.get_reported_cost(metric) <= max_loss)
        and (min_speedup is None or (plan.speedup is not None and plan.speedup >= min_speedup))
    ]
    changed = [index for index in meeting if front[index].num_joins + front[index].num_dropped > 0]
    unmodified = [index for index in meeting if index not in changed]
    if margin is not None and objective == "latency" and max_loss is not None and min_speedup is None:
        gaining = [index for index in changed if has_gain(front[index], margin)]
        changed = gaining or ([] if unmodified else changed)

    def rank(index: int) -> tuple[float, float]:
        plan = front[index]
        saving = plan.depth_reduction if objective == "depth" else plan.speedup or 0.0
        return (0.0 if max_loss is None else saving, -plan.get_reported_cost(metric))

    return max(changed or unmodified, key=rank, default=None)
