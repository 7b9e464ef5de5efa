"""Minimising a quadratic cost over plans: an exact dynamic program, and exchanges of joins where it cannot reach.

The program's cost of a plan is a sum of group costs plus, where asked for, a sum over pairs of joins at most
``reach`` apart. It solves at once for every number of joins, or for every whole number of units that groups save,
whatever the size of the groups (Bellman's recursion over joins; the state is what later costs depend on: the last
``reach`` joins and how long the open group is). Interactions of joins farther apart are left to
:func:`exchange_joins`, a descent by swaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lpsearch.search.space import PlanSpace

__all__ = [
    "CheapestPlans",
    "PlanCosts",
    "build_group_costs",
    "exchange_joins",
    "find_valid",
    "list_exchanges",
    "solve_dynamic_program",
]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class PlanCosts:
    """A batch of quadratic cost functions of a plan.

    Attributes:
        join_costs: (batch, num_joins) in nats per token.
        product_costs: (batch, num_joins, num_joins) of both joins being set; symmetric, zero diagonal.
    """

    join_costs: FloatArray
    product_costs: FloatArray

    def evaluate(self, joined: FloatArray) -> FloatArray:
        """Return the (batch, plans) costs of (plans, num_joins) plans."""
        products = np.einsum("bpi,pi->bp", joined @ self.product_costs, joined)
        return np.asarray(self.join_costs @ joined.T + 0.5 * products)

    def concatenate(self, other: PlanCosts) -> PlanCosts:
        """Return one batch of both."""
        return PlanCosts(
            np.concatenate([self.join_costs, other.join_costs]),
            np.concatenate([self.product_costs, other.product_costs]),
        )

    def build_bands(self, reach: int) -> FloatArray:
        """Return the (batch, reach, num_joins) products of joins at most ``reach`` apart, for the dynamic program."""
        batch, num_joins = self.join_costs.shape
        bands = np.zeros((batch, reach, num_joins))
        for distance in range(1, min(reach, num_joins - 1) + 1):
            bands[:, distance - 1, : num_joins - distance] = self.product_costs.diagonal(distance, 1, 2)
        return bands


@dataclass(frozen=True)
class CheapestPlans:
    """Cheapest plans of a batch of cost functions.

    Attributes:
        joined: (batch, max_saving + 1, num_joins) whether each join is set in the plan that saves so much.
        cost: (batch, max_saving + 1) its cost; infinite where no plan saves so much.
    """

    joined: BoolArray
    cost: FloatArray


@dataclass(frozen=True)
class _States:
    """The finite automaton that reads joins from the first layer on.

    A state is the pattern of the last ``reach`` joins and the number of joins at the end of the open group.

    Attributes:
        recent: (states, reach) whether the join d + 1 before the next one is set.
        run: (states,) joins of the open group.
        sources: (states, sources) the states that lead to each state; padded with ``len(run)``, a state of no return.
        by_join: (states,) whether a state is entered by setting a join.
    """

    recent: FloatArray
    run: IntArray
    sources: IntArray
    by_join: BoolArray


def build_group_costs(join_costs: FloatArray, *, max_group: int) -> FloatArray:
    """Give every group the sum of its joins' costs.

    Args:
        join_costs: (..., num_joins) cost of each join.
        max_group: most layers in a group.

    Returns:
        (..., max_group - 1, num_joins) costs in the form of :func:`solve_dynamic_program`.
    """
    num_joins = join_costs.shape[-1]
    group_costs = np.zeros((*join_costs.shape[:-1], max_group - 1, num_joins))
    for extra in range(min(max_group - 1, num_joins)):
        group_costs[..., extra:, : num_joins - extra] += join_costs[..., None, extra:]
    return group_costs


def solve_dynamic_program(
    group_costs: FloatArray,
    *,
    free_joins: Sequence[int],
    max_saving: int,
    product_costs: FloatArray | None = None,
    group_units: IntArray | None = None,
) -> CheapestPlans:
    """Minimise the cost of a plan exactly, for every saving from 0 to ``max_saving``.

    Args:
        group_costs: (batch, max_group - 1, num_joins); entry [b, m, i] is the cost of the group of m + 2 layers that
            begins at layer i. A layer alone costs nothing. Groups that overrun the model are ignored.
        free_joins: the joins that may be set.
        max_saving: largest saving to solve for.
        product_costs: (batch, reach, num_joins); entry [b, d, i] is added when joins i and i + d + 1 are both set.
        group_units: (max_group - 1, num_joins) whole units that a group saves; None saves one for each join. The
            savings of a plan's groups, added from the first layer on, never pass below 0 or above ``max_saving``.

    Returns:
        The cheapest plan for each saving; ties go to the same plan in every run.
    """
    batch, most_joined, num_joins = group_costs.shape
    reach = 0 if product_costs is None else product_costs.shape[1]
    states = _build_states(most_joined + 1, reach)
    num_states = len(states.run)
    free = set(free_joins)
    step_units = _compute_step_units(group_units, states, num_joins)

    # best[b, s, k]: least cost of the joins read so far that end in state s and save k; the extra state stays infinite.
    best = np.full((batch, num_states + 1, max_saving + 1), np.inf)
    best[:, 0, 0] = 0.0
    choices = np.zeros((num_joins, batch, num_states, max_saving + 1), dtype=np.int16)
    for join in range(num_joins):
        entered = np.full_like(best, np.inf)
        if join in free:
            saved = np.arange(max_saving + 1) - step_units[:, join, None]  # (states, max_saving + 1), before the join
            shifted = best[:, np.arange(num_states)[:, None], saved.clip(0, max_saving)]
            step = _compute_step_costs(group_costs, product_costs, states, join)
            entered[:, :-1] = np.where((saved >= 0) & (saved <= max_saving), shifted + step[:, :, None], np.inf)
        # (batch, states, sources, max_saving + 1)
        options = np.where(states.by_join[None, :, None, None], entered[:, states.sources], best[:, states.sources])
        choices[join] = options.argmin(axis=2)
        best[:, :-1] = options.min(axis=2)
    return _trace_back(best[:, :-1], choices, states, step_units)


def find_valid(joined: BoolArray, space: PlanSpace) -> BoolArray:
    """Return (...,): which of the (..., num_joins) sets of joins are plans of the space."""
    members = _build_constraints(space)
    num_made = joined.astype(np.float32) @ members.T  # (..., constraints)
    return np.asarray((num_made < members.sum(axis=1)).all(axis=-1))


def list_exchanges(
    costs: PlanCosts, joined: BoolArray, *, space: PlanSpace, width: int
) -> tuple[BoolArray, FloatArray]:
    """List the exchanges of one join for another that lower each plan's cost most.

    Args:
        costs: a batch of cost functions.
        joined: (batch, plans, num_joins) plans.
        space: the plans to stay among.
        width: most exchanges to list for a plan.

    Returns:
        (batch, plans, width, num_joins) exchanged plans, and (batch, plans, width) changes of cost, infinite where
        the plan is not of the space.
    """
    batch, plans, num_joins = joined.shape
    flags = joined.astype(np.float64)
    slope = costs.join_costs[:, None] + flags @ costs.product_costs
    num_set = max(int(joined.sum(axis=2).max(initial=0)), 1)
    leaving = np.argsort(~joined, axis=2, kind="stable")[:, :, :num_set]  # (batch, plans, num_set)
    rows = np.arange(batch)[:, None, None]
    change = slope[:, :, None, :] - np.take_along_axis(slope, leaving, axis=2)[..., None]
    change -= costs.product_costs[rows, leaving]
    close = np.abs(leaving[..., None] - np.arange(num_joins)) < space.max_group
    possible = (_find_extendable(joined, space.max_group)[:, :, None, :] | close) & ~joined[:, :, None, :]
    possible &= np.take_along_axis(joined, leaving, axis=2)[..., None]
    change = np.where(possible, change, np.inf).reshape(batch, plans, num_set * num_joins)

    width = min(width, change.shape[2])
    best = np.argpartition(change, width - 1, axis=2)[:, :, :width]
    change = np.take_along_axis(change, best, axis=2)
    position, entering = np.divmod(best, num_joins)
    moved = np.repeat(joined[:, :, None], width, axis=2)
    np.put_along_axis(moved, np.take_along_axis(leaving, position, axis=2)[..., None], False, axis=3)
    np.put_along_axis(moved, entering[..., None], True, axis=3)
    return moved, np.where(find_valid(moved, space), change, np.inf)


def exchange_joins(costs: PlanCosts, joined: BoolArray, *, space: PlanSpace, width: int, max_steps: int) -> BoolArray:
    """Exchange one join for another, the best exchange first, while that lowers the cost.

    Args:
        costs: a batch of cost functions.
        joined: (batch, plans, num_joins) plans to begin from.
        space: the plans to stay among.
        width: exchanges to look at in each step.
        max_steps: most exchanges for a plan.

    Returns:
        (batch, plans, num_joins) plans with as many joins and no higher cost.
    """
    for _ in range(max_steps):
        moved, change = list_exchanges(costs, joined, space=space, width=width)
        best = change.argmin(axis=2)[..., None]
        better = np.take_along_axis(change, best, axis=2) < 0
        if not better.any():
            break
        joined = np.where(better, np.take_along_axis(moved, best[..., None], axis=2)[:, :, 0], joined)
    return joined


def _find_extendable(joined: BoolArray, max_group: int) -> BoolArray:
    """Return where one more join keeps its group within the limit."""
    num_joins = joined.shape[-1]
    run = np.ones(joined.shape, dtype=np.int64)
    before, after = np.ones_like(joined), np.ones_like(joined)
    for distance in range(1, min(max_group, num_joins)):
        before[..., distance:] &= joined[..., :-distance]
        before[..., :distance] = False
        after[..., :-distance] &= joined[..., distance:]
        after[..., -distance:] = False
        run += before.astype(np.int64) + after
    return np.asarray(run < max_group)


def _compute_step_costs(
    group_costs: FloatArray, product_costs: FloatArray | None, states: _States, join: int
) -> FloatArray:
    """Return (batch, states): what setting a join adds to the cost in each state."""
    start = np.maximum(join - states.run, 0)
    within = np.minimum(states.run, group_costs.shape[1] - 1)  # a full group is no source of a set join
    step = group_costs[:, within, start].copy()
    grown = within > 0
    step[:, grown] -= group_costs[:, within[grown] - 1, start[grown]]
    if product_costs is not None:
        reach = min(product_costs.shape[1], join)
        distances = np.arange(reach)
        step += product_costs[:, distances, join - 1 - distances] @ states.recent[:, :reach].T
    return step


def _compute_step_units(group_units: IntArray | None, states: _States, num_joins: int) -> IntArray:
    """Return (states, num_joins): what setting a join adds to the saving in each state."""
    if group_units is None:
        return np.ones((len(states.run), num_joins), dtype=np.int64)
    start = np.maximum(np.arange(num_joins) - states.run[:, None], 0)
    within = np.minimum(states.run, len(group_units) - 1)[:, None]  # a full group is no source of a set join
    return np.asarray(group_units[within, start] - np.where(within > 0, group_units[within - 1, start], 0))


def _trace_back(best: FloatArray, choices: NDArray[np.int16], states: _States, step_units: IntArray) -> CheapestPlans:
    """Follow the recorded choices from the last join to the first."""
    num_joins, batch, _, num_savings = choices.shape
    rows = np.arange(batch)[:, None]
    cost = best.min(axis=1)
    state = best.argmin(axis=1)  # (batch, max_saving + 1)
    saving = np.broadcast_to(np.arange(num_savings), (batch, num_savings)).copy()
    joined = np.zeros((batch, num_savings, num_joins), dtype=bool)
    alive = np.isfinite(cost)
    for join in reversed(range(num_joins)):
        is_set = states.by_join[state] & alive
        joined[:, :, join] = is_set
        source = states.sources[state, choices[join, rows, state, saving]]
        state = np.where(alive, source, 0)
        saving = saving - np.where(is_set, step_units[state, join], 0)
    return CheapestPlans(joined=joined, cost=cost)


@lru_cache(maxsize=32)
def _build_constraints(space: PlanSpace) -> NDArray[np.float32]:
    """Return (constraints, num_joins) flags: the choices of each set that a plan may not make as a whole."""
    members = np.zeros((len(space.constraints), len(space.choices)), dtype=np.float32)
    for row, places in enumerate(space.constraints):
        members[row, list(places)] = 1
    return members


@lru_cache(maxsize=32)
def _build_states(max_group: int, reach: int) -> _States:
    """Enumerate the states that can be reached from the empty one."""
    empty = ((False,) * reach, 0)
    index = {empty: 0}
    sources: list[list[int]] = [[]]
    frontier = [empty]
    while frontier:
        state = frontier.pop(0)
        recent, run = state
        following = [((False, *recent)[:reach], 0)]
        if run + 1 < max_group:
            following.append(((True, *recent)[:reach], run + 1))
        for successor in following:
            if successor not in index:
                index[successor] = len(index)
                sources.append([])
                frontier.append(successor)
            sources[index[successor]].append(index[state])
    width = max(map(len, sources))
    padded = [row + [len(index)] * (width - len(row)) for row in sources]
    run_lengths = np.array([run for _, run in index], dtype=np.int64)
    return _States(
        recent=np.array([recent for recent, _ in index], dtype=np.float64).reshape(len(index), reach),
        run=run_lengths,
        sources=np.array(padded, dtype=np.int64),
        by_join=run_lengths > 0,
    )
