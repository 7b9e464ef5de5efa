"""The latency model: a step costs a fixed overhead and, for each group, what a group of its kind and size costs.

This module imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import nnls

from lpsearch.errors import ConfigError
from lpsearch.latency.mix import Workload, format_mix
from lpsearch.latency.profile import LatencyProfile, WorkloadProfile
from lpsearch.plan import LatencyMetrics, Plan

__all__ = ["GroupCosts", "LatencyModel", "fit_group_costs"]

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class GroupCosts:
    """Coefficients of the additive model.

    Attributes:
        overhead_ms: time of a step that no layer causes.
        cost_ms: time of one group, by its kind, e.g. ``2 full``; or of one stage, by its kind, e.g. ``MLP: 2 dense``.
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
        if unknown and "," in unknown[0]:
            raise ConfigError(
                f"the latency profile has no groups that keep {unknown[0]} (it has {', '.join(self.cost_ms)}); measure "
                "again with `lpsearch profile --allow joins,drops`"
            )
        if unknown:
            raise ConfigError(
                f"the latency profile has no groups of {unknown[0]} layers (it has {', '.join(self.cost_ms)}); "
                "measure again with `lpsearch profile --max-group`"
            )
        return self.overhead_ms + sum(count * self.cost_ms[kind] for kind, count in num_groups.items())


@dataclass(frozen=True)
class LatencyModel:
    """Estimates the latency of plans from a profile.

    Of a mix of workloads, the time is a weighted mean of the plan's times relative to the unmodified model's, times the
    weighted mean of the unmodified model's times. So a weight is the share of the time that the unmodified model spends
    on a workload, the speed-up is that of all the work together (the weighted harmonic mean of the workloads'
    speed-ups; Smith, "Characterizing computer performance with a single number", CACM 31, 1988), and times remain
    sums over groups.

    Attributes:
        profile: the profile whose fitted costs are used.
        workload_index: which of its workloads, the first of the mix.
        mix: of several workloads, the index and the weight of each; weights add up to 1. Empty for one workload.
    """

    profile: LatencyProfile
    workload_index: int = 0
    mix: tuple[tuple[int, float], ...] = ()

    @classmethod
    def from_mix(cls, profile: LatencyProfile, mix: Mapping[Workload, float], *, name: str) -> LatencyModel:
        """Build the model of a mix of workloads.

        Args:
            profile: a profile of all of them.
            mix: weight of each, as :func:`lpsearch.latency.mix.parse_mix` returns it; empty for the profile's
                first workload.
            name: of the profile, for the message.

        Raises:
            ConfigError: naming a workload that the profile lacks.
        """
        held = [Workload(w.kind, w.batch_size, w.context_len) for w in profile.workloads]
        for workload in mix:
            if workload not in held:
                raise ConfigError(
                    f"{name}: it has no workload {workload.spec} (it has {', '.join(other.spec for other in held)}); "
                    f"measure again with `lpsearch profile --workload {','.join(wanted.spec for wanted in mix)}`"
                )
        weights = tuple((held.index(workload), weight) for workload, weight in mix.items())
        return cls(profile, weights[0][0] if weights else 0, weights if len(weights) > 1 else ())

    @property
    def workload(self) -> WorkloadProfile:
        """The workload that is estimated; the first of a mix."""
        return self.profile.workloads[self.workload_index]

    @property
    def mean_error(self) -> float | None:
        """Mean relative error of the estimates where they were checked; of a mix the weighted mean; None if unknown."""
        errors = [(self.profile.workloads[index].mean_error, weight) for index, weight in self._weights]
        known = [(error, weight) for error, weight in errors if error is not None]
        return sum(error * weight for error, weight in known) if len(known) == len(errors) else None

    @property
    def speedup_margin(self) -> float:
        """By what share a speed-up may be off; of a mix the weighted mean."""
        return sum(self.profile.workloads[index].speedup_margin * weight for index, weight in self._weights)

    @property
    def description(self) -> str | None:
        """The workloads as ``--workload`` takes them; None for decoding alone."""
        held = ((self.profile.workloads[index], weight) for index, weight in self._weights)
        mix = {Workload(w.kind, w.batch_size, w.context_len): weight for w, weight in held}
        if not self.mix and self.workload.kind == "decode":
            return None
        return format_mix(mix) if self.mix else next(iter(mix)).spec

    @property
    def _weights(self) -> tuple[tuple[int, float], ...]:
        return self.mix or ((self.workload_index, 1.0),)

    @cached_property
    def costs(self) -> GroupCosts:
        """Overhead, and the cost of every kind of group; of a mix weighted so that sums of them are its times."""
        if not self.mix:
            return GroupCosts(self.workload.overhead_ms, self.workload.cost_ms)
        layers = self.profile.geometry.count_groups(Plan.baseline(self.profile.geometry.num_layers).groups)
        parts = []
        for index, weight in self.mix:
            workload = self.profile.workloads[index]
            costs = GroupCosts(workload.overhead_ms, workload.cost_ms)
            parts.append((costs, weight, costs.estimate_latency_ms(layers)))
        mean_ms = sum(weight * unmodified_ms for _, weight, unmodified_ms in parts)
        factors = [(costs, mean_ms * weight / unmodified_ms) for costs, weight, unmodified_ms in parts]
        kinds = [kind for kind in self.workload.cost_ms if all(kind in costs.cost_ms for costs, _ in factors)]
        return GroupCosts(
            sum(costs.overhead_ms * factor for costs, factor in factors),
            {kind: sum(costs.cost_ms[kind] * factor for costs, factor in factors) for kind in kinds},
        )

    def estimate_latency_ms(self, plan: Plan) -> float:
        """Estimate a plan's time in milliseconds: TPOT of a decode workload, TTFT of a prefill, of a mix the mean.

        Raises:
            ConfigError: for a group of a kind that was not measured, another number of layers, or costs by which the
                plan takes no time.
        """
        geometry = self.profile.geometry
        if plan.num_layers != geometry.num_layers:
            raise ConfigError(
                f"the latency profile is of a model of {geometry.num_layers} layers and the plan of one of "
                f"{plan.num_layers}; measure this model"
            )
        time_ms = self.costs.estimate_latency_ms(geometry.count_groups(plan.groups))
        if time_ms <= 0:
            raise ConfigError("by the costs of the latency profile a plan takes no time; measure again, for longer")
        return time_ms

    def estimate_kv_bytes_per_token(self, plan: Plan) -> int | None:
        """Return the bytes of the KV cache of one sequence, over all GPUs, a token of the workload's context.

        A sliding attention caches no more tokens than its window, so that this falls with the context.

        Returns:
            None where the profile does not say how far the attentions reach, or the size of its dtype is not known.
        """
        num_tokens = max(1, self.workload.context_len)
        elements = self.profile.geometry.count_cached_elements(plan, num_tokens=num_tokens)
        # llama.cpp's cache is of float16, whatever the weights are.
        size = _DTYPE_BYTES.get("float16" if self.profile.engine == "llama.cpp" else self.profile.dtype)
        return None if elements is None or size is None else round(elements * size / num_tokens)

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
        if self.mix or self.workload.num_layers_measured < num_layers:
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
            engine=profile.engine,
            runtime=profile.runtime,
            versions=profile.versions,
            mean_error=self.mean_error,
            workload=self.description,
            kv_bytes_per_token=self.estimate_kv_bytes_per_token(plan),
            baseline_kv_bytes_per_token=self.estimate_kv_bytes_per_token(Plan.baseline(plan.num_layers)),
        )


def fit_group_costs(num_groups: Sequence[Mapping[str, int]], latency_ms: Sequence[float]) -> GroupCosts:
    """Fit overhead and costs to measured depths by non-negative least squares of the relative errors.

    The solver is that of Lawson and Hanson, "Solving Least Squares Problems" (1974), chapter 23.

    Args:
        num_groups: for each depth, the number of groups, or of stages, of each kind.
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


def _count_members(kind: str) -> Counter[tuple[str, str]]:
    """Parse the kind of a group or of a stage, e.g. ``1 full + 2 sliding`` or ``MLP: 2 dense``."""
    branch, _, members = kind.rpartition(": ")
    parts = (part.split(" ", 1) for part in members.split(" + "))
    return Counter({(branch, name): int(count) for count, name in parts})
