"""The dynamic program against brute force over every plan."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpsearch.plan import Plan
from lpsearch.search.samplers.dynamic_program import (
    PlanCosts,
    build_group_costs,
    exchange_joins,
    find_valid,
    solve_dynamic_program,
)
from lpsearch.search.space import PlanSpace
from tests.tolerances import FLOAT64_COSTS


@st.composite
def _spaces(draw: st.DrawFn) -> PlanSpace:
    num_layers = draw(st.integers(1, 9))
    frozen = draw(st.lists(st.integers(0, num_layers - 1), max_size=2))
    return PlanSpace(num_layers, draw(st.integers(2, max(2, num_layers))), tuple(frozen))


def _sum_costs(plan: Plan, group_costs: np.ndarray, product_costs: np.ndarray | None) -> float:
    total = sum(group_costs[len(group) - 2, group[0]] for group in plan.groups if len(group) > 1)
    if product_costs is not None:
        for first, second in combinations(plan.joins, 2):
            if second - first <= len(product_costs):
                total += product_costs[second - first - 1, first]
    return float(total)


@settings(max_examples=60, deadline=None)
@given(space=_spaces(), reach=st.integers(0, 5), seed=st.integers(0, 2**32 - 1))
def test_program_equals_brute_force(space: PlanSpace, reach: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_joins = space.num_layers - 1
    group_costs = rng.normal(size=(2, space.max_group - 1, num_joins))
    product_costs = rng.normal(size=(2, reach, num_joins)) if reach else None
    result = solve_dynamic_program(
        group_costs, free_joins=space.free_joins, max_saving=space.max_choices + 1, product_costs=product_costs
    )
    for row in range(2):
        costs = {
            plan: _sum_costs(plan, group_costs[row], None if product_costs is None else product_costs[row])
            for plan in space.enumerate_plans()
        }
        for count in range(space.max_choices + 1):
            best = min((plan for plan in costs if plan.num_joins == count), key=costs.__getitem__)
            assert tuple(np.flatnonzero(result.joined[row, count])) == best.joins
            assert result.cost[row, count] == pytest.approx(costs[best], abs=FLOAT64_COSTS)
        assert result.cost[row, space.max_choices + 1] == np.inf


@settings(max_examples=60, deadline=None)
@given(space=_spaces(), reach=st.integers(0, 2), seed=st.integers(0, 2**32 - 1))
def test_program_over_units_equals_brute_force(space: PlanSpace, reach: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_joins = space.num_layers - 1
    group_costs = rng.normal(size=(2, space.max_group - 1, num_joins))
    product_costs = rng.normal(size=(2, reach, num_joins)) if reach else None
    group_units = rng.integers(0, 4, size=(space.max_group - 1, num_joins))
    max_saving = 4 * space.num_layers
    result = solve_dynamic_program(
        group_costs,
        free_joins=space.free_joins,
        max_saving=max_saving,
        product_costs=product_costs,
        group_units=group_units,
    )
    best = np.full((2, max_saving + 1), np.inf)
    for plan in space.enumerate_plans():
        saving = sum(group_units[len(group) - 2, group[0]] for group in plan.groups if len(group) > 1)
        for row in range(2):
            products = None if product_costs is None else product_costs[row]
            best[row, saving] = min(best[row, saving], _sum_costs(plan, group_costs[row], products))
    np.testing.assert_allclose(result.cost, best, atol=FLOAT64_COSTS)
    for row, saving in np.argwhere(np.isfinite(best)):
        plan = Plan.from_joins(space.num_layers, np.flatnonzero(result.joined[row, saving]).tolist())
        assert space.is_valid(plan.joins)
        products = None if product_costs is None else product_costs[row]
        assert _sum_costs(plan, group_costs[row], products) == pytest.approx(best[row, saving], abs=FLOAT64_COSTS)


@pytest.mark.parametrize("max_group", [2, 3, 9])
def test_group_costs_are_sums_of_join_costs(max_group: int) -> None:
    join_costs = np.array([[1.0, 2.0, 4.0, 8.0]])
    group_costs = build_group_costs(join_costs, max_group=max_group)
    assert group_costs.shape == (1, max_group - 1, 4)
    for size in range(2, min(max_group, 5) + 1):
        for start in range(5 - size + 1):
            assert group_costs[0, size - 2, start] == join_costs[0, start : start + size - 1].sum()


def _build_costs(space: PlanSpace, seed: int) -> PlanCosts:
    rng = np.random.default_rng(seed)
    num_joins = space.num_layers - 1
    products = np.triu(rng.normal(size=(2, num_joins, num_joins)), 1)
    return PlanCosts(rng.normal(size=(2, num_joins)), products + products.swapaxes(1, 2))


@settings(max_examples=40, deadline=None)
@given(space=_spaces(), seed=st.integers(0, 2**32 - 1))
def test_exchanges_end_where_no_exchange_helps(space: PlanSpace, seed: int) -> None:
    if not space.max_choices:
        return
    costs = _build_costs(space, seed)
    num_joins = space.num_layers - 1
    starts = [plan.joins for plan in space.enumerate_plans() if plan.num_joins]
    joined = np.zeros((2, len(starts), num_joins), dtype=bool)
    for row, joins in enumerate(starts):
        joined[:, row, list(joins)] = True
    ends = exchange_joins(costs, joined, space=space, width=num_joins**2, max_steps=100)
    assert find_valid(ends, space).all()
    assert (ends.sum(axis=2) == joined.sum(axis=2)).all()
    for row in range(2):
        single = PlanCosts(costs.join_costs[row : row + 1], costs.product_costs[row : row + 1])
        for end in np.unique(ends[row], axis=0):
            neighbours = [
                sorted({*np.flatnonzero(end).tolist(), entering} - {leaving})
                for leaving in np.flatnonzero(end).tolist()
                for entering in np.flatnonzero(~end).tolist()
            ]
            flags = np.zeros((len(neighbours), num_joins))
            for index, joins in enumerate(neighbours):
                flags[index, joins] = 1.0
            valid = [space.is_valid(joins) for joins in neighbours]
            reached = single.evaluate(end[None].astype(float))[0, 0]
            assert (single.evaluate(flags)[0][valid] >= reached - FLOAT64_COSTS).all()


@settings(max_examples=40, deadline=None)
@given(space=_spaces())
def test_find_valid_agrees_with_the_space(space: PlanSpace) -> None:
    num_joins = space.num_layers - 1
    every = np.array(list(product([False, True], repeat=num_joins)), dtype=bool).reshape(2**num_joins, num_joins)
    expected = [space.is_valid(np.flatnonzero(row).tolist()) for row in every]
    assert find_valid(every, space).tolist() == expected
