"""The proposer behind the ``pairset`` sampler: which plan to evaluate next, given every plan evaluated so far.

1. The baseline, then every single join; with groups of more than two layers, then the most promising single groups.
2. The cheapest plan for each number of joins, by the dynamic program over the costs known by then.
3. From then on the plan that promises the largest expected fall of the front. Candidates are the minimisers of the
   surrogate's mean and of draws from it, by the dynamic program then exchanges of joins, and the neighbours of the
   best plans so far.

Where plans are compared by time, levels of what they save take the place of the numbers of joins.

With few plans pending the proposer keeps no state: any process that sees the same results proposes the same plan. With
many, one fit serves for several proposals (:mod:`lpsearch.search.samplers.fits`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

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
from lpsearch.search.samplers.evaluated import Evaluated, leave_taken, list_joins, stack_joins
from lpsearch.search.samplers.fits import Fit, Fits, estimate_deviation
from lpsearch.search.samplers.proposing import (
    CANDIDATES_PER_LEVEL,
    INCUMBENTS_PER_LEVEL,
    NUM_DRAWS,
    build_rng,
    compute_expected_improvement,
    estimate_front,
    find_least_by_level,
    order_coarse_to_fine,
    shorten_scan,
)
from lpsearch.search.samplers.sampler import Proposal
from lpsearch.search.samplers.savings import build_levels
from lpsearch.search.samplers.surrogate import Surrogate
from lpsearch.search.space import PlanSpace

__all__ = ["PairsetProposer"]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

GROUP_SCAN_SHARE = 0.25
"""Share of the budget beyond the joins that single groups of more than two layers may take."""

DEEP_AFTER = 4
"""Evaluations a join after which plans of more than a third less depth are looked for as well."""

DEEP_WEIGHT = 0.01
"""Weight of these in the front, whose losses are many times larger."""

REACH_JOINS = 4
NUM_EXCHANGES = 24
MAX_EXCHANGE_STEPS = 6
MAX_RANDOM_DRAWS = 16
ENUMERABLE_PLANS = 256


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
        self._scan, budget = shorten_scan(order_coarse_to_fine(space.free_joins), budget)
        self._fits = Fits()
        self._is_inside = lru_cache(maxsize=None)(space.__contains__)
        self._num_scanned_groups = max(0, int(GROUP_SCAN_SHARE * (budget - len(self._scan) - 1)))

    def propose(self, results: Sequence[TrialResult], pending: Collection[Plan]) -> Proposal | None:
        """Choose the next plan.

        Args:
            results: every finished plan, in any order.
            pending: plans that are being evaluated.

        Returns:
            A plan that is neither evaluated nor pending; None when the space has no other.
        """
        # a study may hold plans of another space, enqueued by the user
        results = [result for result in results if self._is_inside(result.plan)]
        pending = [plan for plan in pending if self._is_inside(plan)]
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
        proposal = self._fits.propose(
            num_results=len(results),
            num_pending=len(pending),
            fit_surrogate=evaluated.fit_surrogate,
            list_candidates=lambda surrogate: self._list_candidates(surrogate, evaluated, taken),
            choose=lambda fit: self._propose_candidate(fit, evaluated, taken, pending),
        )
        return proposal or self._propose_any(taken)

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
        self, fit: Fit, evaluated: Evaluated, taken: Collection[tuple[int, ...]], pending: Collection[Plan]
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
            estimate_deviation(surrogate, candidates, mean, pending=self._stack(pending)),
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
        costs = mean_costs.concatenate(surrogate.draw_costs(NUM_DRAWS, build_rng(self._seed, taken)))
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

    def _estimate_front(self, surrogate: Surrogate, evaluated: Evaluated, pending: Collection[Plan]) -> FloatArray:
        """Return (num_levels + 1,): the least loss of plans that save so much, pending ones at what is expected."""
        joined = self._stack(pending)
        return estimate_front(
            self._max_level,
            (self._levels.classify(evaluated.joined), evaluated.delta_nll),
            (self._levels.classify(joined), surrogate.estimate_mean(joined)),
        )

    def _stack(self, plans: Collection[Plan]) -> BoolArray:
        """Return the (plans, num_joins) joins of plans."""
        return stack_joins((plan.joins for plan in plans), self._num_joins)

    def _propose_random(self, taken: Collection[tuple[int, ...]]) -> Proposal | None:
        """Return a random plan of few joins, for when many workers wait before anything is known."""
        rng = build_rng(self._seed, taken)
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
