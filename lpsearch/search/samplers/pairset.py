"""The proposer behind the ``pairset`` sampler: which plan to evaluate next, given every plan evaluated so far.

1. The baseline, then every single join; with groups of more than two layers, then the most promising single groups.
2. The cheapest plan for each number of joins, by the dynamic program over the costs known by then.
3. From then on the plan that promises the largest expected fall of the front. Candidates are the minimisers of the
   surrogate's mean and of draws from it, by the dynamic program then exchanges of joins, and the neighbours of the
   best plans so far.

Where plans are compared by time, levels of what they save take the place of the numbers of joins.

With few plans pending the proposer keeps no state: any process that sees the same results proposes the same plan. With
many, which make a search depend on time anyhow, one fit serves for several proposals, since a fit takes longer than a
worker may wait. Pending plans count as measured at their mean then, which keeps a batch apart (the kriging believer of
Ginsbourger, Le Riche and Carraro, Kriging is well-suited to parallelize optimization, 2010).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from lpsearch.plan import Plan
from lpsearch.search.results import Metric, TrialResult
from lpsearch.search.samplers.dynamic_program import (
    PlanCosts,
    build_group_costs,
    exchange_joins,
    find_valid,
    list_exchanges,
    solve_dynamic_program,
)
from lpsearch.search.samplers.sampler import Proposal
from lpsearch.search.samplers.savings import build_levels
from lpsearch.search.samplers.surrogate import Surrogate
from lpsearch.search.space import PlanSpace

__all__ = [
    "Evaluated",
    "PairsetProposer",
    "compute_expected_improvement",
    "find_least_by_level",
    "fit_surrogate",
    "leave_taken",
    "list_joins",
    "order_coarse_to_fine",
    "stack_joins",
]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

WORST_DELTA_NATS = 12.0
"""What a broken plan counts as: about the loss of guessing among a large vocabulary."""

FULL_SCAN_SHARE = 0.75
"""Largest share of the budget that a scan of every join may take; a longer one is thinned to half of the budget."""

GROUP_SCAN_SHARE = 0.25
"""Share of the budget beyond the joins that single groups of more than two layers may take."""

DEEP_AFTER = 4
"""Evaluations a join after which plans of more than a third less depth are looked for as well."""

DEEP_WEIGHT = 0.01
"""Weight of these in the front, whose losses are many times larger."""

MAX_OBSERVATIONS = 640
"""Most plans to fit; the time of a fit grows with their cube. Beyond it the worst of every number of joins go."""

MANY_PENDING = 8
"""Pending plans from which a fit serves for several proposals, and one more result for each so many of them."""

REACH_JOINS = 4
NUM_DRAWS = 4
NUM_EXCHANGES = 24
MAX_EXCHANGE_STEPS = 6
MAX_RANDOM_DRAWS = 16
INCUMBENTS_PER_LEVEL = 2
CANDIDATES_PER_LEVEL = 16
ENUMERABLE_PLANS = 256


def fit_surrogate(results: Iterable[TrialResult], *, num_joins: int, metric: Metric = "nll") -> Surrogate | None:
    """Return what the search has learned from plans; None where none of them has a join.

    Args:
        results: finished plans, in any order.
        num_joins: joins of the model, one less than its layers.
        metric: which loss.
    """
    evaluated = Evaluated.from_results(results, num_joins, metric)
    return evaluated.fit_surrogate() if len(evaluated.delta_nll) else None


class PairsetProposer:
    """Proposes plans; a pure function of the results, the pending plans, the space, the budget and the seed.

    Args:
        space: the plans to search.
        budget: evaluations of the whole study, the baseline included; None when unknown.
        seed: decides the draws and nothing else.
        metric: which loss.
        estimate_latency_ms: latency that plans are compared by, additive over groups; None compares by depth.
    """

    def __init__(
        self,
        *,
        space: PlanSpace,
        budget: int | None,
        seed: int,
        metric: Metric = "nll",
        estimate_latency_ms: Callable[[Plan], float] | None = None,
    ) -> None:
        self._space = space
        self._seed = seed
        self._metric: Metric = metric
        self._num_joins = space.num_layers - 1
        self._levels = build_levels(space, estimate_latency_ms)
        self._max_level = self._levels.num_levels
        self._useful_level = min(self._max_level, max(1, space.num_layers // 3))
        scan = order_coarse_to_fine(space.free_joins)
        budget = 4 * (len(scan) + 1) if budget is None else budget
        if len(scan) + 1 > FULL_SCAN_SHARE * budget:
            scan = scan[: max(1, budget // 2)]
        self._scan = scan
        self._fit: _Fit | None = None
        self._is_inside: dict[Plan, bool] = {}
        self._num_scanned_groups = max(0, int(GROUP_SCAN_SHARE * (budget - len(scan) - 1)))

    def propose(self, results: Sequence[TrialResult], pending: Collection[Plan]) -> Proposal | None:
        """Choose the next plan.

        Args:
            results: every finished plan, in any order.
            pending: plans that are being evaluated.

        Returns:
            A plan that is neither evaluated nor pending; None when the space has no other.
        """
        # a study may hold plans of another space, enqueued by the user
        results = [result for result in results if self._is_in_space(result.plan)]
        pending = [plan for plan in pending if self._is_in_space(plan)]
        taken = {result.plan.joins for result in results}.union(plan.joins for plan in pending)
        if () not in taken:
            return self._build_proposal((), "baseline")
        for join in self._scan:
            if (join,) not in taken:
                return self._build_proposal((join,), "scan")
        if len(taken) >= self._space.count_plans():
            return None
        evaluated = Evaluated.from_results(results, self._num_joins, self._metric)
        if not len(evaluated.delta_nll):
            return self._propose_random(taken) or self._propose_any(taken)
        join_means, _ = evaluated.estimate_join_costs()
        group = self._choose_group(join_means, taken)
        if group is not None:
            return self._build_proposal(group, "scan")
        fit = self._fit
        if fit is not None and 0 <= len(results) - fit.num_results < len(pending) // MANY_PENDING:
            proposal = self._propose_candidate(fit, evaluated, taken, pending)
            if proposal is not None:
                return proposal
        surrogate = evaluated.fit_surrogate()
        fit = _Fit(len(results), surrogate, self._list_candidates(surrogate, evaluated, taken))
        self._fit = fit if len(pending) >= MANY_PENDING else None
        return self._propose_candidate(fit, evaluated, taken, pending) or self._propose_any(taken)

    def _is_in_space(self, plan: Plan) -> bool:
        if plan not in self._is_inside:
            self._is_inside[plan] = plan in self._space
        return self._is_inside[plan]

    def _choose_group(self, join_means: FloatArray, taken: Collection[tuple[int, ...]]) -> tuple[int, ...] | None:
        """Return the joins of the next single group of more than two layers to scan, the cheapest a join first."""
        if self._space.max_group == 2:
            return None
        scanned = sum(1 < len(joins) == joins[-1] - joins[0] + 1 for joins in taken if joins)
        if scanned >= self._num_scanned_groups:
            return None
        free = set(self._space.free_joins)
        groups = [
            tuple(range(first, first + length))
            for length in range(2, min(self._space.max_group, self._num_joins + 1))
            for first in range(self._num_joins - length + 1)
        ]
        groups = [group for group in groups if free.issuperset(group) and group not in taken]
        return min(groups, key=lambda group: (float(join_means[list(group)].mean()), group), default=None)

    def _propose_candidate(
        self, fit: _Fit, evaluated: Evaluated, taken: Collection[tuple[int, ...]], pending: Collection[Plan]
    ) -> Proposal | None:
        """Return the best candidate: the dynamic program's where a level is yet untried, else by improvement."""
        surrogate, candidates = fit.surrogate, leave_taken(fit.candidates, taken)
        if not len(candidates):
            return None
        levels = self._levels.classify(candidates)
        mean = surrogate.estimate_mean(candidates)
        horizon = self._useful_level if len(taken) < DEEP_AFTER * self._num_joins else self._max_level
        tried = set(self._levels.classify(stack_joins(taken, self._num_joins)).tolist())
        for level in range(1, horizon + 1):
            rows = np.flatnonzero(levels == level)
            if level not in tried and len(rows):
                return self._build_proposal(list_joins(candidates[rows[mean[rows].argmin()]]), "programme")
        kept = find_least_by_level(mean, levels, CANDIDATES_PER_LEVEL)
        candidates, levels, mean = candidates[kept], levels[kept], mean[kept]
        gain = compute_expected_improvement(
            mean,
            self._estimate_deviation(surrogate, candidates, mean, pending),
            levels,
            front=self._estimate_front(surrogate, evaluated, pending),
            weights=np.where(np.arange(self._max_level + 1) <= self._useful_level, 1.0, DEEP_WEIGHT),
        )
        return self._build_proposal(list_joins(candidates[gain.argmax()]), "surrogate")

    def _list_candidates(
        self, surrogate: Surrogate, evaluated: Evaluated, taken: Collection[tuple[int, ...]]
    ) -> BoolArray:
        """Return (plans, num_joins) promising plans that are not taken, each once."""
        if self._space.count_plans() <= ENUMERABLE_PLANS:
            everything = stack_joins((plan.joins for plan in self._space.enumerate_plans()), self._num_joins)
            return leave_taken(everything, taken)
        mean_costs = surrogate.mean_costs
        costs = mean_costs.concatenate(surrogate.draw_costs(NUM_DRAWS, self._build_rng(taken)))
        cheapest = self._solve(costs)
        useful = cheapest[:, : self._useful_level]
        descended = exchange_joins(costs, useful, space=self._space, width=NUM_EXCHANGES, max_steps=MAX_EXCHANGE_STEPS)
        incumbents = evaluated.joined[
            find_least_by_level(evaluated.delta_nll, self._levels.classify(evaluated.joined), INCUMBENTS_PER_LEVEL)
        ]
        centres = np.concatenate([incumbents, descended[0]])[None]
        neighbours, _ = list_exchanges(mean_costs, centres, space=self._space, width=NUM_EXCHANGES)
        flipped = incumbents[:, None] ^ np.eye(self._num_joins, dtype=bool)
        sources = [cheapest, descended, neighbours, flipped]
        candidates = np.concatenate([source.reshape(-1, self._num_joins) for source in sources])
        return leave_taken(candidates[find_valid(candidates, self._space)], taken)

    def _solve(self, costs: PlanCosts) -> BoolArray:
        """Return (batch, num_levels, num_joins): the cheapest plan of each level, far products ignored."""
        units, num_levels = self._levels.units, self._max_level
        result = solve_dynamic_program(
            build_group_costs(costs.join_costs, max_group=self._space.max_group),
            free_joins=self._space.free_joins,
            max_saving=(num_levels + 1) * units - 1,
            product_costs=costs.build_bands(REACH_JOINS),
            group_units=self._levels.group_units,
        )
        best = result.cost.reshape(-1, num_levels + 1, units).argmin(axis=2)
        joined = result.joined.reshape(-1, num_levels + 1, units, self._num_joins)
        return np.take_along_axis(joined, best[:, :, None, None], axis=2)[:, 1:, 0]

    def _estimate_deviation(
        self, surrogate: Surrogate, candidates: BoolArray, mean: FloatArray, pending: Collection[Plan]
    ) -> FloatArray:
        """Return the (plans,) standard deviations of candidates, where many are pending as if these were measured."""
        if len(pending) < MANY_PENDING:
            return surrogate.estimate_standard_deviation(candidates, mean)
        believed = stack_joins((plan.joins for plan in pending if plan.joins), self._num_joins)
        return surrogate.estimate_standard_deviation(candidates, mean, believed=believed)

    def _estimate_front(self, surrogate: Surrogate, evaluated: Evaluated, pending: Collection[Plan]) -> FloatArray:
        """Return (num_levels + 1,): the least loss of plans that save so much, pending ones at what is expected."""
        front = np.full(self._max_level + 1, WORST_DELTA_NATS)
        front[0] = 0.0
        np.minimum.at(front, self._levels.classify(evaluated.joined), evaluated.delta_nll)
        joined = stack_joins((plan.joins for plan in pending), self._num_joins)
        np.minimum.at(front, self._levels.classify(joined), surrogate.estimate_mean(joined))
        return np.minimum.accumulate(front[::-1])[::-1]

    def _propose_random(self, taken: Collection[tuple[int, ...]]) -> Proposal | None:
        """Return a random plan of few joins, for when many workers wait before anything is known."""
        rng = self._build_rng(taken)
        for _ in range(MAX_RANDOM_DRAWS):
            joins: set[int] = set()
            num_joins = int(rng.integers(2, max(3, self._useful_level + 1)))
            for join in rng.permutation(np.array(self._space.free_joins, dtype=np.int64)).tolist():
                if len(joins) < num_joins and self._space.is_valid(joins | {join}):
                    joins.add(join)
            if tuple(sorted(joins)) not in taken:
                return self._build_proposal(tuple(sorted(joins)), "random")
        return None

    def _propose_any(self, taken: Collection[tuple[int, ...]]) -> Proposal | None:
        """Return the first plan that is not taken, for when nothing is known or the candidates are used up."""
        for plan in self._space.enumerate_plans():
            if plan.joins not in taken:
                return Proposal(plan, "surrogate")
        return None

    def _build_proposal(self, joins: tuple[int, ...], origin: str) -> Proposal:
        return Proposal(Plan.from_joins(self._space.num_layers, joins), origin)

    def _build_rng(self, taken: Collection[tuple[int, ...]]) -> np.random.Generator:
        """Return a generator that depends on the seed and on which plans are taken, in no order."""
        digest = hashlib.sha256(json.dumps([self._seed, sorted(taken)]).encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:16], "big"))


@dataclass(frozen=True)
class _Fit:
    """What is learned from some results.

    Attributes:
        num_results: how many.
        surrogate: the model fitted to them.
        candidates: (plans, num_joins) promising plans by it, none of which was taken.
    """

    num_results: int
    surrogate: Surrogate
    candidates: BoolArray


@dataclass(frozen=True)
class Evaluated:
    """The finished plans as arrays, in an order of their own, without the baseline.

    Attributes:
        joined: (plans, num_joins) which joins each sets.
        delta_nll: (plans,) finite, at most ``WORST_DELTA_NATS``.
        sampling_error: (plans,) standard errors of ``delta_nll``; 0 where it is exact.
    """

    joined: BoolArray
    delta_nll: FloatArray
    sampling_error: FloatArray

    @classmethod
    def from_results(
        cls,
        results: Iterable[TrialResult],
        num_joins: int,
        metric: Metric,
        list_made: Callable[[Plan], tuple[int, ...]] = attrgetter("joins"),
    ) -> Evaluated:
        """Read what finished plans say about their losses on all windows.

        Args:
            results: finished plans.
            num_joins: number of joins, or of choices.
            metric: which loss.
            list_made: returns the joins of a plan, or the places of its choices.
        """
        results = list(results)
        num_tokens = max((result.proxy_tokens for result in results), default=0)  # the baseline's: all there are
        losses: dict[tuple[int, ...], tuple[float, float]] = {}
        for result in results:
            joins, loss = list_made(result.plan), result.get_cost(metric)
            if joins:
                # Windows are drawn without replacement: the error that is left falls to zero where all are there.
                share_missing = 1 - result.proxy_tokens / num_tokens
                sampling_error = (result.get_cost_se(metric) or 0.0) * math.sqrt(share_missing)
                measured = (min(loss, WORST_DELTA_NATS), sampling_error)
                losses[joins] = min(measured, losses.get(joins, measured))
        ordered = sorted(losses)
        values = np.array([losses[joins] for joins in ordered], dtype=np.float64).reshape(-1, 2)
        return cls(stack_joins(ordered, num_joins), values[:, 0], values[:, 1])

    def estimate_join_costs(self) -> tuple[FloatArray, BoolArray]:
        """Return (num_joins,) costs of the joins alone, interpolated where not measured, and which were measured."""
        num_joins = self.joined.shape[1]
        counts = self.joined.sum(axis=1)
        single = np.flatnonzero(counts == 1)
        joins = self.joined[single].argmax(axis=1)
        measured = np.zeros(num_joins, dtype=bool)
        measured[joins] = True
        if not len(single):
            return np.full(num_joins, float(np.median(self.delta_nll / counts))), measured
        order = joins.argsort()
        return np.interp(np.arange(num_joins), joins[order], self.delta_nll[single[order]]), measured

    def fit_surrogate(self) -> Surrogate:
        """Fit the model of the losses."""
        join_means, measured = self.estimate_join_costs()
        fitted = self._choose_fitted()
        return Surrogate(
            joined=self.joined[fitted],
            delta_nll=self.delta_nll[fitted],
            sampling_error=self.sampling_error[fitted],
            join_means=join_means,
            measured=measured,
        )

    def _choose_fitted(self) -> IntArray:
        """Return the places of the plans to fit, ascending: all, or of every number of joins as many of the best."""
        counts = self.joined.sum(axis=1)
        if len(counts) <= MAX_OBSERVATIONS:
            return np.arange(len(counts))
        order = np.lexsort((self.delta_nll, counts))
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order)) - np.searchsorted(counts[order], counts[order])
        rank[counts == 1] = 0  # what a join costs alone is told by nothing else
        return np.sort(np.lexsort((counts, rank))[:MAX_OBSERVATIONS])


def compute_expected_improvement(
    mean: FloatArray, deviation: FloatArray, levels: IntArray, *, front: FloatArray, weights: FloatArray
) -> FloatArray:
    """Return (plans,): the expected fall of the weighted front; a plan bears on its level and those below.

    This is the expected improvement of Jones, Schonlau and Welch (Efficient Global Optimization, 1998, equation 15),
    summed over the levels that a plan reaches.
    """
    fall = front[None, :] - mean[:, None]
    standard = fall / deviation[:, None]
    gain = fall * ndtr(standard) + deviation[:, None] * np.exp(-0.5 * standard**2) / np.sqrt(2 * np.pi)
    bears = (np.arange(len(front)) > 0) & (np.arange(len(front)) <= levels[:, None])
    return np.asarray((gain * bears) @ weights)


def find_least_by_level(values: FloatArray, levels: IntArray, per_level: int) -> IntArray:
    """Return the indices of the least few values of every level."""
    order = np.lexsort((values, levels))
    rank = np.arange(len(order)) - np.searchsorted(levels[order], levels[order])
    return order[rank < per_level]


def leave_taken(joined: BoolArray, taken: Iterable[tuple[int, ...]]) -> BoolArray:
    """Return the plans that are not taken, each once, in a fixed order."""
    known = {row.tobytes() for row in np.packbits(stack_joins(taken, joined.shape[1]), axis=1)}
    first = {row.tobytes(): index for index, row in enumerate(np.packbits(joined, axis=1))}
    return joined[sorted(index for key, index in first.items() if key not in known)]


def order_coarse_to_fine(joins: Sequence[int]) -> tuple[int, ...]:
    """Return the joins so that every beginning is spread evenly: by halving strides."""
    order: dict[int, None] = {}
    stride = 1 << max(len(joins) - 1, 0).bit_length()
    while stride:
        order.update(dict.fromkeys(joins[::stride]))
        stride //= 2
    return tuple(order)


def list_joins(joined: BoolArray) -> tuple[int, ...]:
    """Return the places that are set."""
    return tuple(np.flatnonzero(joined).tolist())


def stack_joins(plans: Iterable[Collection[int]], num_joins: int) -> BoolArray:
    """Return (plans, num_joins) flags."""
    listed = [tuple(joins) for joins in plans]
    joined = np.zeros((len(listed), num_joins), dtype=bool)
    rows = np.repeat(np.arange(len(listed)), list(map(len, listed)))
    joined[rows, np.fromiter(chain.from_iterable(listed), np.int64, len(rows))] = True
    return joined
