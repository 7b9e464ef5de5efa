"""Baselines to compare a search with: random plans, evolution, and the published method's blocks."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache

from lpsearch.plan import Plan
from lpsearch.search.results import Metric, TrialResult
from lpsearch.search.samplers.sampler import Proposal
from lpsearch.search.samplers.time_levels import TimeLevels
from lpsearch.search.space import PlanSpace

__all__ = ["BlockProposer", "EvolutionProposer", "RandomProposer"]

GENERATION_PLANS = 4
"""Offspring of a generation, and random plans of the first one, for each number of joins."""

SURVIVORS = 1
"""Plans of least loss that have offspring."""

MAX_SWITCHES = 3
"""Most exchanges in a mutation."""

MAX_EXCHANGES = 64
"""Exchanges of choices of several kinds to try until one leaves a plan in its level of time."""

MAX_REDRAWS = 16
"""Mutations that may repeat a known plan before a random unknown one takes their place."""

_KEPT_ANSWERS = 1 << 16
"""Plans of which it is kept where they belong."""


class RandomProposer:
    """Draws plans at random, evenly over the numbers of joins: each goes to one with the fewest plans so far.

    Uniform draws over the whole space would nearly all have about the same number of joins.

    Args:
        space: the plans to draw from.
        seed: decides the draws.
    """

    def __init__(self, *, space: PlanSpace, seed: int, levels: TimeLevels | None = None) -> None:
        self._space = space
        self._seed = seed
        self._counts = _build_counts(space, levels)

    def propose(self, results: Sequence[TrialResult], pending: Collection[Plan]) -> Proposal | None:
        """Draw a plan that is neither finished nor pending; None when the space has no other."""
        taken = {result.plan for result in results}.union(pending)
        rng = random.Random(f"{self._seed}:{len(taken)}")
        open_counts = _find_open_counts(self._counts, taken)
        if not open_counts:
            return None
        return Proposal(_draw_untaken(self._counts, rng.choice(open_counts), taken, rng), "random")


class EvolutionProposer:
    """Evolves plans by level-switch mutation, for every number of joins on its own.

    This is the search of EvoPress (Sieberling et al., arXiv 2410.14649, section 3) over pairs or larger groups: a
    mutation exchanges a few joins for others, so that their number stays; the first generation is random; the plan of
    least loss so far is the parent of the next generation. Its selection in stages, more tokens for fewer survivors, is
    the study's own: an offspring that loses on the first windows is evaluated on no others. The numbers of joins take
    turns, so that each has about as many evaluations.

    Args:
        space: the plans to choose from.
        seed: decides the draws.
        metric: which loss.
    """

    def __init__(
        self, *, space: PlanSpace, seed: int, metric: Metric = "nll", levels: TimeLevels | None = None
    ) -> None:
        self._space = space
        self._counts = _build_counts(space, levels)
        self._seed = seed
        self._metric: Metric = metric

    def propose(self, results: Sequence[TrialResult], pending: Collection[Plan]) -> Proposal | None:
        """Mutate a parent of the number of joins whose turn it is; None when the space has no other plan."""
        taken = {result.plan for result in results}.union(pending)
        rng = random.Random(f"{self._seed}:{len(taken)}")
        open_counts = _find_open_counts(self._counts, taken)
        if not open_counts:
            return None
        num_joins = open_counts[0]
        num_taken = sum(self._counts.find(plan) == num_joins for plan in taken)
        # A generation descends from what was known when it began, whichever of its plans are finished by now.
        num_before = num_taken // GENERATION_PLANS * GENERATION_PLANS
        before = [result for result in results if self._is_member(result.plan, num_joins)][:num_before]
        parents = sorted(before, key=lambda result: result.get_cost(self._metric))[:SURVIVORS]
        for _ in range(MAX_REDRAWS if parents else 0):
            plan = self._mutate(rng.choice(parents).plan, rng)
            if plan not in taken:
                return Proposal(plan, "mutation")
        return Proposal(_draw_untaken(self._counts, num_joins, taken, rng), "random")

    def _is_member(self, plan: Plan, num_joins: int) -> bool:
        return self._counts.find(plan) == num_joins

    def _mutate(self, plan: Plan, rng: random.Random) -> Plan:
        """Exchange one to ``MAX_SWITCHES`` joins, mostly one, as EvoPress draws it."""
        if self._space.allows_drops:
            return self._mutate_choices(plan, rng)
        joins = set(plan.joins)
        for _ in range(min(rng.randint(1, MAX_SWITCHES), rng.randint(1, MAX_SWITCHES))):
            joins = self._switch(joins, rng)
        return Plan.from_joins(plan.num_layers, joins)

    def _mutate_choices(self, plan: Plan, rng: random.Random) -> Plan:
        """Exchange one to ``MAX_SWITCHES`` choices so that the plan stays in its level of time."""
        level = self._counts.find(plan)
        for _ in range(min(rng.randint(1, MAX_SWITCHES), rng.randint(1, MAX_SWITCHES))):
            bits = list(self._space.encode(plan))
            for _ in range(MAX_EXCHANGES):
                changed = list(bits)
                for is_made in (True, False):  # nothing leaves the baseline, and nothing enters where all are made
                    places = [place for place, bit in enumerate(bits) if bit == is_made]
                    if places:
                        changed[rng.choice(places)] = not is_made
                switched = self._space.decode(changed)
                if switched != plan and self._counts.find(switched) == level:
                    plan = switched
                    break
        return plan

    def _switch(self, joins: set[int], rng: random.Random) -> set[int]:
        """Exchange a random join for another that gives a plan of the space; unchanged where there is none."""
        for leaving in rng.sample(sorted(joins), len(joins)):
            rest = joins - {leaving}
            entering = [
                join for join in self._space.free_joins if join not in joins and self._space.is_valid(rest | {join})
            ]
            if entering:
                return rest | {rng.choice(entering)}
        return joins


class BlockProposer:
    """Proposes blocks, contiguous runs of groups: fewest joins first, each number from the last layer downwards.

    This is the published method (arXiv 2502.02790, section 4), with pairs at ``max_group`` 2. When every block is
    evaluated it goes on with random plans.

    Args:
        space: the plans to choose from; blocks that touch a frozen layer are left out.
        seed: decides the random plans.
    """

    def __init__(self, *, space: PlanSpace, seed: int, levels: TimeLevels | None = None) -> None:
        self._space = space
        self._random = RandomProposer(space=space, seed=seed, levels=levels)

    def propose(self, results: Sequence[TrialResult], pending: Collection[Plan]) -> Proposal | None:
        """Choose the next block, or a random plan after the last; None when the space has no other."""
        taken = {result.plan for result in results}.union(pending)
        for plan in self._iterate_blocks():
            if plan not in taken:
                return Proposal(plan, "window")
        return self._random.propose(results, pending)

    def _iterate_blocks(self) -> Iterator[Plan]:
        space = self._space
        free = set(space.free_joins)
        for num_layers in range(2, space.num_layers + 1):
            if num_layers % space.max_group == 1:
                continue  # its last layer would stand alone, which is the block of one layer less
            for first in reversed(range(space.num_layers - num_layers + 1)):
                joins = range(first, first + num_layers - 1)
                if free.issuperset(joins):
                    yield Plan.from_joins(space.num_layers, space.repair(joins))


@dataclass(frozen=True)
class _Counts:
    """The plans that are compared with each other: those with as many joins, or, with drops, of one level of time.

    Attributes:
        sizes: number of plans of each.
        find: returns which of them a plan belongs to; None for a plan of none.
        draw: draws uniformly among the plans of one.
        iterate: yields them.
    """

    sizes: tuple[int, ...]
    find: Callable[[Plan], int | None]
    draw: Callable[[int, random.Random], Plan]
    iterate: Callable[[int], Iterator[Plan]]


def _build_counts(space: PlanSpace, levels: TimeLevels | None) -> _Counts:
    # Every proposal asks of every plan so far.
    if levels is None:
        return _Counts(
            sizes=space.plan_counts,
            find=lru_cache(_KEPT_ANSWERS)(lambda plan: plan.num_joins if plan in space else None),
            draw=space.draw_plan,
            iterate=space.enumerate_plans_with,
        )
    return _Counts(
        sizes=levels.count_plans(),
        find=lru_cache(_KEPT_ANSWERS)(lambda plan: levels.find_drawn_level(plan) if plan in space else None),
        draw=levels.draw_plan,
        iterate=levels.iterate_level,
    )


def _find_open_counts(counts: _Counts, taken: Set[Plan]) -> list[int]:
    """Return the numbers of joins with the fewest taken plans among those that have untaken ones, ascending."""
    num_taken = [0] * len(counts.sizes)
    for plan in taken:
        place = counts.find(plan)
        if place is not None:
            num_taken[place] += 1
    untaken = [k for k, count in enumerate(counts.sizes) if num_taken[k] < count]
    fewest = min((num_taken[k] for k in untaken), default=0)
    return [k for k in untaken if num_taken[k] == fewest]


def _draw_untaken(counts: _Counts, place: int, taken: Set[Plan], rng: random.Random) -> Plan:
    """Draw uniformly among the plans of one place that are not taken; there is one."""
    num_taken = sum(counts.find(plan) == place for plan in taken)
    if 2 * num_taken >= counts.sizes[place]:
        return rng.choice([plan for plan in counts.iterate(place) if plan not in taken])
    while True:  # at least half of them are untaken, so two draws are expected at most
        plan = counts.draw(place, rng)
        if plan not in taken:
            return plan
