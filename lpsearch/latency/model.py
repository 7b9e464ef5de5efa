"""The latency model: a step costs a fixed overhead and, for each group, what a group of its kind and size costs.

This module imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from lpsearch.errors import ConfigError
from lpsearch.latency.profile import LatencyProfile, WorkloadProfile
from lpsearch.plan import LatencyMetrics, Plan

__all__ = ["GroupCosts", "LatencyModel", "fit_group_costs"]


@dataclass(frozen=True)
class GroupCosts:
    """Coefficients of the additive model.

    Attributes:
        overhead_ms: time of a step that no layer causes.
        cost_ms: time of one group, by its kind, e.g. ``2 full``.
    """

    overhead_ms: float
    cost_ms: Mapping[str, float]

    def estimate_latency_ms(self, num_groups: Mapping[str, int]) -> float:
        """Estimate a step's time.

        Args:
            num_groups: number of groups of each kind.

        Raises:
            ConfigError: for a kind that was not measured.
        """
        unknown = sorted(kind for kind in num_groups if kind not in self.cost_ms)
        if unknown:
            raise ConfigError(
                f"the latency profile has no groups of {unknown[0]} layers (it has {', '.join(self.cost_ms)}); "
                "measure again with `lpsearch profile --max-group`"
            )
        return self.overhead_ms + sum(count * self.cost_ms[kind] for kind, count in num_groups.items())


@dataclass(frozen=True)
class LatencyModel:
    """Estimates the latency of plans from a profile.

    Attributes:
        profile: the profile whose fitted costs are used.
        workload_index: which of its workloads.
    """

    profile: LatencyProfile
    workload_index: int = 0

    @property
    def workload(self) -> WorkloadProfile:
        """The workload that is estimated."""
        return self.profile.workloads[self.workload_index]

    def estimate_latency_ms(self, plan: Plan) -> float:
        """Estimate a plan's time in milliseconds: TPOT of a decode workload, TTFT of a prefill.

        Raises:
            ConfigError: for a group larger than those measured, another number of layers, or costs by which the plan
                takes no time.
        """
        geometry = self.profile.geometry
        if plan.num_layers != geometry.num_layers:
            raise ConfigError(
                f"the latency profile is of a model of {geometry.num_layers} layers and the plan of one of "
                f"{plan.num_layers}; measure this model"
            )
        costs = GroupCosts(self.workload.overhead_ms, self.workload.cost_ms)
        time_ms = costs.estimate_latency_ms(Counter(geometry.describe_group(group.layers) for group in plan.groups))
        if time_ms <= 0:
            raise ConfigError("by the costs of the latency profile a plan takes no time; measure again, for longer")
        return time_ms

    def estimate_speedup(self, plan: Plan) -> float:
        """Estimate by what factor the plan's step is faster than the unmodified model's under the same runtime."""
        return self.estimate_latency_ms(Plan.baseline(plan.num_layers)) / self.estimate_latency_ms(plan)

    def estimate_unmodified_ms(self) -> dict[str, float]:
        """Return the time of the unmodified model by each way of running it, in milliseconds.

        That of the way which the costs are of is estimated by these costs, as every plan's is, so that a speed-up
        compares like with like, and holds for the whole model where fewer layers were measured. It comes first. The
        others are measured.
        """
        num_layers = self.profile.geometry.num_layers
        estimated = self.estimate_latency_ms(Plan.baseline(num_layers))
        mode, *others = self.workload.unmodified_ms or ("unmodified",)
        if self.workload.num_layers_measured < num_layers:
            others = []
        return {mode: estimated} | {other: self.workload.unmodified_ms[other] for other in others}

    def build_metrics(self, plan: Plan) -> LatencyMetrics:
        """Build the entry of a plan file."""
        profile = self.profile
        return LatencyMetrics(
            kind="estimated",
            latency_ms=self.estimate_latency_ms(plan),
            baseline_latency_ms=self.estimate_latency_ms(Plan.baseline(plan.num_layers)),
            speedup=self.estimate_speedup(plan),
            batch_size=self.workload.batch_size,
            context_len=self.workload.context_len,
            dtype=profile.dtype,
            device=profile.device if profile.num_ranks == 1 else f"{profile.num_ranks} x {profile.device}",
            runtime=profile.runtime,
            versions=profile.versions,
            mean_error=self.workload.mean_error,
        )


def fit_group_costs(num_groups: Sequence[Mapping[str, int]], latency_ms: Sequence[float]) -> GroupCosts:
    """Fit overhead and costs to measured depths by non-negative least squares of the relative errors.

    The solver is that of Lawson and Hanson, "Solving Least Squares Problems" (1974), chapter 23.

    Args:
        num_groups: for each depth, the number of groups of each kind.
        latency_ms: its time.
    """
    kinds = list(dict.fromkeys(kind for counts in num_groups for kind, count in counts.items() if count))
    matrix = np.array([[1, *(counts.get(kind, 0) for kind in kinds)] for counts in num_groups], dtype=np.float64)
    times = np.asarray(latency_ms, dtype=np.float64)
    coefficients, _ = nnls(matrix / times[:, None], np.ones_like(times))
    costs = _order_costs(dict(zip(kinds, (float(cost) for cost in coefficients[1:]), strict=True)))
    return GroupCosts(float(coefficients[0]), costs)


def _order_costs(costs: Mapping[str, float]) -> dict[str, float]:
    """Make each group cost at least what every group within it costs: noise must not make more layers cheaper."""
    members = {kind: _count_members(kind) for kind in costs}
    return {kind: max(cost for other, cost in costs.items() if not members[other] - members[kind]) for kind in costs}


def _count_members(kind: str) -> Counter[str]:
    """Parse the kind of a group, e.g. ``1 full + 2 sliding``."""
    parts = (part.split(" ", 1) for part in kind.split(" + "))
    return Counter({name: int(count) for count, name in parts})
