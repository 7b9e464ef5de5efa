"""The proposer behind ``pairset`` in a space with drops: joins and drops compared by the time that they save.

It follows :mod:`lpsearch.search.samplers.pairset` in its steps: a scan of single choices, the cheapest plan of every
level by the dynamic program, then the candidate of largest expected improvement of the front (Jones, Schonlau and Welch
1998). The surrogate is the same, over choices instead of joins: one cost a choice, and products, strongest between
neighbours (of a layer's attention and MLP, of a join and the drops within it).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lpsearch.plan import Plan
from lpsearch.search.results import Metric, TrialResult
from lpsearch.search.samplers.dynamic_program import PlanCosts, find_valid
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
from lpsearch.search.samplers.surrogate import ChoiceLayout, Strengths, Surrogate
from lpsearch.search.samplers.time_levels import TimeLevels
from lpsearch.search.space import PlanSpace

__all__ = ["Levels", "MixedProposer", "build_layout", "fit_choices"]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

NUM_EXCHANGES = 12
MAX_EXCHANGE_STEPS = 3
ENUMERABLE_PLANS = 8192

LEVELS_PER_LAYER = 2
"""Levels of time for each layer: a level's width is what a plan may save for nothing."""


class Levels(Protocol):
    """Sorts the plans of a space into levels; a plan of a level saves at least as much as those of the levels below.

    Attributes:
        num_levels: the number of levels but for the lowest, that of the baseline.
        useful_level: the last level of the useful range, in which every level is tried.
        exchangeable: (leaving, entering) choices that may be exchanged, so that a plan saves about as much as before.
    """

    num_levels: int
    useful_level: int
    exchangeable: BoolArray

    def classify(self, made: BoolArray) -> IntArray:
        """Return the (plans,) levels of (plans, choices) plans of the space."""

    def solve(self, costs: PlanCosts) -> BoolArray:
        """Return (batch, num_levels, choices): the cheapest plan of each level from the first on, as far as known."""

    def weigh(self, front: FloatArray, *, num_evaluated: int) -> FloatArray:
        """Return the (num_levels + 1,) weights of the levels in the front, whose least losses are given."""


class MixedProposer:
    """Proposes plans; a pure function of the results, the pending plans, the space, the budget and the seed.

    Args:
        space: the plans to search.
        budget: evaluations of the whole study, the baseline included; None when unknown.
        seed: decides the draws and nothing else.
        metric: which loss.
        estimate_latency_ms: latency that plans are compared by, additive over groups; None compares by depth.
        levels: what plans are compared by in its place.
    """

    def __init__(
        self,
        *,
        space: PlanSpace,
        budget: int | None,
        seed: int,
        metric: Metric = "nll",
        estimate_latency_ms: Callable[[Plan], float] | None = None,
        levels: Levels | None = None,
    ) -> None:
        self._space = space
        self._seed = seed
        self._metric: Metric = metric
        self._num_choices = len(space.choices)
        if levels is None:
            levels = TimeLevels(space, estimate_latency_ms, levels_per_layer=LEVELS_PER_LAYER)
        self._levels = levels
        self._fits = Fits()
        self._is_inside = lru_cache(maxsize=None)(space.__contains__)
        self._list_made = lru_cache(maxsize=None)(lambda plan: list_joins(np.array(space.encode(plan), dtype=bool)))
        self._scan, _ = shorten_scan(self._order_scan(), budget)

    def propose(self, results: Sequence[TrialResult], pending: Collection[Plan]) -> Proposal | None:
        """Choose a plan that is neither finished nor pending; None when the space has no other."""
        results = [result for result in results if self._is_inside(result.plan)]
        pending = [plan for plan in pending if self._is_inside(plan)]
        taken = {self._list_made(result.plan) for result in results}.union(map(self._list_made, pending))
        if () not in taken:
            return self._build_proposal((), "baseline")
        for place in self._scan:
            if (place,) not in taken:
                return self._build_proposal((place,), "scan")
        if len(taken) >= self._space.count_plans():
            return None
        evaluated = Evaluated.from_results(results, self._num_choices, self._metric, self._list_made)
        if not len(evaluated.delta_nll):
            return self._propose_any(taken)
        made = self._stack(pending)
        proposal = self._fits.propose(
            num_results=len(results),
            num_pending=len(pending),
            fit_surrogate=lambda strengths: fit_choices(evaluated, self._layout, strengths),
            list_candidates=lambda surrogate: self._list_candidates(surrogate, evaluated, taken),
            choose=lambda fit: self._propose_candidate(fit, evaluated, taken, made),
        )
        return proposal or self._propose_any(taken)

    def _stack(self, plans: Collection[Plan]) -> BoolArray:
        """Return the (plans, choices) choices of plans."""
        return stack_joins(map(self._list_made, plans), self._num_choices)

    def _order_scan(self) -> tuple[int, ...]:
        """Return the places of the choices that may be made alone, of every kind in turn, each spread evenly."""
        frozen = set(self._space.frozen_layers)
        by_kind: dict[str, list[int]] = {}
        for place, choice in enumerate(self._space.choices):
            is_all = self._num_choices == 1 and choice.kind != "join"
            if frozen.isdisjoint(choice.layers) and not is_all:
                by_kind.setdefault(choice.kind, []).append(place)
        orders = [order_coarse_to_fine(places) for places in by_kind.values()]
        longest = max(map(len, orders), default=0)
        return tuple(order[index] for index in range(longest) for order in orders if index < len(order))

    @cached_property
    def _layout(self) -> ChoiceLayout:
        return build_layout(self._space)

    def _propose_candidate(
        self, fit: Fit, evaluated: Evaluated, taken: Collection[tuple[int, ...]], pending: BoolArray
    ) -> Proposal | None:
        """Return the best candidate: the dynamic program's where a level is yet untried, else by improvement."""
        surrogate, candidates = fit.surrogate, leave_taken(fit.candidates, taken)
        if not len(candidates):
            return None
        levels = self._levels.classify(candidates)
        mean = surrogate.estimate_mean(candidates)
        front = self._estimate_front(surrogate, evaluated, pending)
        useful = self._levels.useful_level
        tried = set(self._levels.classify(stack_joins(taken, self._num_choices)).tolist())
        for level in range(1, useful + 1):
            rows = np.flatnonzero(levels == level)
            if level not in tried and len(rows) and mean[rows].min() < front[level]:
                return self._build_proposal(list_joins(candidates[rows[mean[rows].argmin()]]), "programme")
        kept = find_least_by_level(mean, levels, CANDIDATES_PER_LEVEL)
        candidates, levels, mean = candidates[kept], levels[kept], mean[kept]
        gain = compute_expected_improvement(
            mean,
            estimate_deviation(surrogate, candidates, mean, pending=pending),
            levels,
            front=front,
            weights=self._levels.weigh(front, num_evaluated=len(taken)),
        )
        return self._build_proposal(list_joins(candidates[gain.argmax()]), "surrogate")

    def _list_candidates(
        self, surrogate: Surrogate, evaluated: Evaluated, taken: Collection[tuple[int, ...]]
    ) -> BoolArray:
        """Return (plans, choices) promising plans that are not taken, each once."""
        if self._space.count_plans() <= ENUMERABLE_PLANS:
            return leave_taken(self._everything, taken)
        mean_costs = surrogate.mean_costs
        costs = mean_costs.concatenate(surrogate.draw_costs(NUM_DRAWS, build_rng(self._seed, taken)))
        cheapest = self._levels.solve(costs)
        descended = self._descend(costs, cheapest[:, : self._levels.useful_level])
        levels = self._levels.classify(evaluated.joined)
        incumbents = evaluated.joined[find_least_by_level(evaluated.delta_nll, levels, INCUMBENTS_PER_LEVEL)]
        centres = np.concatenate([incumbents, descended[0]])[None]
        neighbours, _ = self._list_exchanges(mean_costs, centres)
        flipped = incumbents[:, None] ^ np.eye(self._num_choices, dtype=bool)
        sources = [cheapest, descended, neighbours, flipped]
        candidates = np.concatenate([source.reshape(-1, self._num_choices) for source in sources])
        return leave_taken(candidates[find_valid(candidates, self._space)], taken)

    @cached_property
    def _everything(self) -> BoolArray:
        return np.array([self._space.encode(plan) for plan in self._space.enumerate_plans()], dtype=bool)

    def _descend(self, costs: PlanCosts, made: BoolArray) -> BoolArray:
        """Exchange one choice for another that saves as much, the best exchange first, while that lowers the cost."""
        for _ in range(MAX_EXCHANGE_STEPS):
            moved, change = self._list_exchanges(costs, made)
            best = change.argmin(axis=2)[..., None]
            better = np.take_along_axis(change, best, axis=2) < 0
            if not better.any():
                break
            made = np.where(better, np.take_along_axis(moved, best[..., None], axis=2)[:, :, 0], made)
        return made

    def _list_exchanges(self, costs: PlanCosts, made: BoolArray) -> tuple[BoolArray, FloatArray]:
        """List the exchanges of one choice for another, which alone saves as much, that lower each plan's cost most.

        Args:
            costs: a batch of cost functions.
            made: (batch, plans, choices) plans.

        Returns:
            (batch, plans, exchanges, choices) exchanged plans, and (batch, plans, exchanges) changes of cost, infinite
            where the plan is not of the space.
        """
        batch, plans, num_choices = made.shape
        slope = costs.join_costs[:, None] + made.astype(np.float64) @ costs.product_costs
        change = slope[:, :, None, :] - slope[:, :, :, None] - costs.product_costs[:, None]  # leaving, entering
        change = np.where(self._levels.exchangeable & made[..., :, None] & ~made[..., None, :], change, np.inf)
        change = change.reshape(batch, plans, num_choices**2)
        width = min(NUM_EXCHANGES, change.shape[2])
        best = np.argpartition(change, width - 1, axis=2)[:, :, :width]
        change = np.take_along_axis(change, best, axis=2)
        leaving, entering = np.divmod(best, num_choices)
        moved = np.repeat(made[:, :, None], width, axis=2)
        np.put_along_axis(moved, leaving[..., None], False, axis=3)
        np.put_along_axis(moved, entering[..., None], True, axis=3)
        return moved, np.where(find_valid(moved, self._space), change, np.inf)

    def _estimate_front(self, surrogate: Surrogate, evaluated: Evaluated, pending: BoolArray) -> FloatArray:
        """Return (num_levels + 1,): the least loss of plans that save so much, pending ones at what is expected."""
        return estimate_front(
            self._levels.num_levels,
            (self._levels.classify(evaluated.joined), evaluated.delta_nll),
            (self._levels.classify(pending), surrogate.estimate_mean(pending)),
        )

    def _propose_any(self, taken: Collection[tuple[int, ...]]) -> Proposal | None:
        """Return the first plan that is not taken, for when nothing is known or the candidates are used up."""
        for plan in self._space.enumerate_plans():
            if self._list_made(plan) not in taken:
                return Proposal(plan, "surrogate")
        return None

    def _build_proposal(self, places: tuple[int, ...], origin: str) -> Proposal:
        made = set(places)
        return Proposal(self._space.decode(place in made for place in range(self._num_choices)), origin)


def build_layout(space: PlanSpace) -> ChoiceLayout:
    """Return where the choices of a space stand, and of which kind each is."""
    names = ("join", "drop_attention", "drop_mlp")
    positions = np.array([float(np.mean(choice.layers)) for choice in space.choices])
    kinds = np.array([names.index(choice.kind) for choice in space.choices])
    touching = np.abs(np.subtract.outer(positions, positions)) == 0.5
    ordered = [touching & np.outer(kinds == 0, kinds == kind) for kind in (1, 2)]
    return ChoiceLayout(positions, kinds, within=tuple(pairs | pairs.T for pairs in ordered))


def fit_choices(evaluated: Evaluated, layout: ChoiceLayout, strengths: Strengths | None = None) -> Surrogate:
    """Fit the model of the losses; a choice that was not measured alone has what its kind's neighbours cost.

    Args:
        evaluated: finished plans by the choices that they make; at least one.
        layout: of the space.
        strengths: of the parts of the model; None chooses those of most evidence.
    """
    num_choices = len(layout.kinds)
    counts = evaluated.joined.sum(axis=1)
    single = np.flatnonzero(counts == 1)
    places = evaluated.joined[single].argmax(axis=1)
    measured = np.zeros(num_choices, dtype=bool)
    measured[places] = True
    losses = np.zeros(num_choices)
    losses[places] = evaluated.delta_nll[single]
    means = np.full(num_choices, float(np.median(evaluated.delta_nll / counts)))
    for kind in np.unique(layout.kinds):
        members = np.flatnonzero(layout.kinds == kind)
        known = members[measured[members]]
        if len(known):
            means[members] = np.interp(members, known, losses[known])
    fitted = evaluated.choose_fitted()
    return Surrogate(
        joined=evaluated.joined[fitted],
        delta_nll=evaluated.delta_nll[fitted],
        sampling_error=evaluated.sampling_error[fitted],
        join_means=means,
        measured=measured,
        layout=layout,
        strengths=strengths,
    )
