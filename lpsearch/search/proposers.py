"""Baselines to compare a search with: stratified random plans, and the contiguous windows of the published method."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

from lpsearch.plan import Plan
from lpsearch.search.pairset import Observation, Proposal
from lpsearch.search.space import JoinSpace

__all__ = ["Proposer", "RandomProposer", "WindowProposer"]


class Proposer(Protocol):
    """Chooses the next plan from what is known; a pure function, so that any process continues the search."""

    def propose(self, observations: Sequence[Observation], pending: Collection[Plan]) -> Proposal | None:
        """Choose a plan that is neither observed nor pending; None when the space has no other.

        Args:
            observations: every evaluated plan.
            pending: plans that are being evaluated.
        """


class RandomProposer:
    """Draws plans at random, stratified: each goes to a number of joins with the fewest plans so far.

    Uniform draws over the whole space would nearly all have about the same number of joins.

    Args:
        space: the plans to draw from.
        seed: decides the draws.
    """

    def __init__(self, *, space: JoinSpace, seed: int) -> None:
        """Store the settings."""
        self._space = space
        self._seed = seed

    def propose(self, observations: Sequence[Observation], pending: Collection[Plan]) -> Proposal | None:
        """Draw a plan that is neither observed nor pending; None when the space has no other."""
        taken = {observation.plan for observation in observations}.union(pending)
        rng = random.Random(f"{self._seed}:{len(taken)}")
        num_taken = [0] * (self._space.max_joins + 1)
        for plan in taken:
            if self._space.is_valid(plan.joins):
                num_taken[plan.num_joins] += 1
        open_strata = [k for k, count in enumerate(self._space.plan_counts) if num_taken[k] < count]
        if not open_strata:
            return None
        fewest = min(num_taken[k] for k in open_strata)
        num_joins = rng.choice([k for k in open_strata if num_taken[k] == fewest])
        if 2 * num_taken[num_joins] >= self._space.plan_counts[num_joins]:
            untaken = [plan for plan in self._space.enumerate_plans_with(num_joins) if plan not in taken]
            return Proposal(rng.choice(untaken), "random")
        while True:  # at least half of the stratum is untaken, so two draws are expected at most
            plan = self._space.draw_plan(num_joins, rng)
            if plan not in taken:
                return Proposal(plan, "random")


class WindowProposer:
    """Proposes contiguous windows of layers cut into groups: fewest joins first, each from the last layer downwards.

    This is the published method (arXiv 2502.02790, section 4), with pairs at ``max_group`` 2. When every window is
    evaluated it goes on with random plans.

    Args:
        space: the plans to choose from; windows that touch a frozen layer are left out.
        seed: decides the random plans.
    """

    def __init__(self, *, space: JoinSpace, seed: int) -> None:
        """Store the settings."""
        self._space = space
        self._random = RandomProposer(space=space, seed=seed)

    def propose(self, observations: Sequence[Observation], pending: Collection[Plan]) -> Proposal | None:
        """Choose the next window, or a random plan after the last; None when the space has no other."""
        taken = {observation.plan for observation in observations}.union(pending)
        for plan in self._iterate_windows():
            if plan not in taken:
                return Proposal(plan, "window")
        return self._random.propose(observations, pending)

    def _iterate_windows(self) -> Iterator[Plan]:
        space = self._space
        free = set(space.free_joins)
        for num_layers in range(2, space.num_layers + 1):
            if num_layers % space.max_group == 1:
                continue  # its last layer would stand alone, which is the window of one layer less
            for first in reversed(range(space.num_layers - num_layers + 1)):
                joins = range(first, first + num_layers - 1)
                if free.issuperset(joins):
                    yield Plan.from_joins(space.num_layers, space.repair(joins))
