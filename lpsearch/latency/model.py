"""The latency model: a decode step costs a fixed overhead and, for each group, what a group of its size costs.

This module imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from lpsearch.errors import ConfigError
from lpsearch.latency.profile import LatencyProfile
from lpsearch.plan import LatencyMetrics, Plan

__all__ = ["GroupCosts", "LatencyModel", "fit_group_costs"]


@dataclass(frozen=True)
class GroupCosts:
    """Coefficients of the additive model.

    Attributes:
        overhead_ms: time of a step that no layer causes.
        cost_ms: time of one group, by its number of layers.
    """

    overhead_ms: float
    cost_ms: Mapping[int, float]

    def estimate_latency_ms(self, num_groups: Mapping[int, int]) -> float:
        """Estimate a step's time.

        Args:
            num_groups: number of groups of each size.

        Raises:
            ConfigError: for a size that was not measured.
        """
        unknown = sorted(size for size in num_groups if size not in self.cost_ms)
        if unknown:
            raise ConfigError(
                f"the latency profile has no groups of {unknown[0]} layers (it has {sorted(self.cost_ms)}); "
                "measure again with a larger --max-group"
            )
        return self.overhead_ms + sum(count * self.cost_ms[size] for size, count in num_groups.items())


@dataclass(frozen=True)
class LatencyModel:
    """Estimates the decode latency of plans from a profile.

    Attributes:
        profile: the profile whose fitted costs are used.
    """

    profile: LatencyProfile

    def estimate_latency_ms(self, plan: Plan) -> float:
        """Estimate TPOT of a plan in milliseconds.

        Raises:
            ConfigError: for a group larger than those measured, or another number of layers.
        """
        if plan.num_layers != self.profile.geometry.num_layers:
            raise ConfigError(
                f"the latency profile is of a model of {self.profile.geometry.num_layers} layers and the plan of one "
                f"of {plan.num_layers}; measure this model"
            )
        costs = GroupCosts(self.profile.overhead_ms, self.profile.cost_ms)
        return costs.estimate_latency_ms(Counter(len(group) for group in plan.groups))

    def estimate_speedup(self, plan: Plan) -> float:
        """Estimate by what factor the plan's decode step is faster than the unmodified model's."""
        return self.estimate_latency_ms(Plan.baseline(plan.num_layers)) / self.estimate_latency_ms(plan)

    def build_metrics(self, plan: Plan) -> LatencyMetrics:
        """Build the entry of a plan file."""
        profile = self.profile
        return LatencyMetrics(
            kind="estimated",
            latency_ms=self.estimate_latency_ms(plan),
            baseline_latency_ms=self.estimate_latency_ms(Plan.baseline(plan.num_layers)),
            speedup=self.estimate_speedup(plan),
            batch_size=profile.batch_size,
            context_len=profile.context_len,
            dtype=profile.dtype,
            device=profile.device,
            runtime=profile.runtime,
            versions=profile.versions,
        )


def fit_group_costs(num_groups: Sequence[Mapping[int, int]], latency_ms: Sequence[float]) -> GroupCosts:
    """Fit overhead and costs to measured depths by least squares of the relative errors.

    Overhead, cost of one layer and what each further layer adds to a group are kept from being negative: noise may ask
    for that, but a wider group never takes less time.

    Args:
        num_groups: for each depth, the number of groups of each size.
        latency_ms: its time.
    """
    sizes = sorted({size for counts in num_groups for size, count in counts.items() if count})
    # Column j counts the groups of at least sizes[j] layers: its coefficient is what they cost beyond the next smaller.
    matrix = np.array(
        [[1, *(sum(n for s, n in counts.items() if s >= size) for size in sizes)] for counts in num_groups],
        dtype=np.float64,
    )
    times = np.asarray(latency_ms, dtype=np.float64)
    coefficients, _ = nnls(matrix / times[:, None], np.ones_like(times))
    costs = np.cumsum(coefficients[1:])
    return GroupCosts(float(coefficients[0]), {size: float(cost) for size, cost in zip(sizes, costs, strict=True)})
