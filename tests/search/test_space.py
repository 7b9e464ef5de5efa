"""The space of plans."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpsearch.errors import ConfigError, PlanError
from lpsearch.plan import Plan
from lpsearch.search.space import PlanSpace

spaces = st.builds(
    PlanSpace,
    num_layers=st.just(9),
    max_group=st.integers(2, 9),
    frozen_layers=st.lists(st.integers(0, 8), max_size=3).map(tuple),
)
join_sets = st.frozensets(st.integers(0, 7))


def is_obviously_valid(space: PlanSpace, plan: Plan) -> bool:
    alone = all([layer_idx] in plan.to_lists() for layer_idx in space.frozen_layers)
    return alone and plan.max_group <= space.max_group


@given(spaces, join_sets)
def test_validity_is_what_the_groups_say(space, joins):
    plan = Plan.from_joins(space.num_layers, joins)
    expected = is_obviously_valid(space, plan)
    assert space.is_valid(joins) == (plan in space) == expected
    bits = space.encode(plan)
    assert any(all(bits[place] for place in places) for places in space.constraints) != expected
    if not expected:
        with pytest.raises(PlanError, match="--enqueue plan is outside the space"):
            space.check_plan(plan, where="--enqueue plan")


def test_a_plan_that_drops_a_branch_or_is_of_another_model_is_outside():
    space = PlanSpace(4)
    assert Plan.from_joins(4, (1,)) in space
    assert Plan.from_joins(4, (1,)).drop({"mlp": [2]}) not in space
    assert Plan.from_joins(5, (1,)) not in space
    with pytest.raises(PlanError, match="has 5 layers, the model 4"):
        space.check_plan(Plan.baseline(5), where="a plan")


@given(spaces, join_sets)
def test_repair_gives_a_plan_of_the_space_from_the_joins_it_was_given(space, joins):
    repaired = space.repair(joins)
    assert space.is_valid(repaired)
    assert set(repaired) <= joins
    assert space.repair(repaired) == repaired
    if space.is_valid(joins):
        assert repaired == tuple(sorted(joins))


def test_repair_cuts_from_the_left():
    assert PlanSpace(8, 2).repair([0, 1, 2, 3, 6]) == (0, 2, 6)
    assert PlanSpace(8, 3).repair(range(7)) == (0, 1, 3, 4, 6)
    assert PlanSpace(8, 3, frozen_layers=(2,)).repair(range(7)) == (0, 3, 4, 6)


@given(spaces, join_sets)
def test_parameters_and_plans_round_trip(space, joins):
    plan = Plan.from_joins(space.num_layers, space.repair(joins))
    assert [(choice.kind, choice.layers) for choice in space.choices] == [("join", (i, i + 1)) for i in range(8)]
    assert space.encode(plan) == tuple(i in plan.joins for i in range(8))
    assert space.decode(space.encode(plan)) == plan
    assert space.decode(i in joins for i in range(8)) == plan, "what breaks a constraint is repaired"
    params = space.build_params(plan)
    assert list(params) == [f"join_{i:03d}" for i in range(8)] == list(space.distributions)
    assert space.build_plan(params) == plan
    assert Plan.from_groups(plan.groups).joins == plan.joins


@given(spaces)
def test_counts_and_enumeration_match_every_set_of_joins(space):
    every_set = itertools.chain.from_iterable(itertools.combinations(range(8), k) for k in range(9))
    expected = {joins for joins in every_set if is_obviously_valid(space, Plan.from_joins(9, joins))}
    enumerated = [plan.joins for plan in space.enumerate_plans()]
    assert enumerated[0] == ()
    assert [len(joins) for joins in enumerated] == sorted(len(joins) for joins in enumerated)
    assert len(enumerated) == space.count_plans()
    assert set(enumerated) == expected
    by_size = Counter(map(len, expected))
    assert space.plan_counts == tuple(by_size[k] for k in range(space.max_joins + 1))
    assert max(by_size) == space.max_joins


def test_counts_of_real_models():
    assert PlanSpace(18).count_plans() == 4181
    assert PlanSpace(27).count_plans() == 317_811
    assert PlanSpace(80, 4).count_plans() > 10**20
    assert next(PlanSpace(80, 4).enumerate_plans()) == Plan.baseline(80)


def test_draws_are_uniform_over_plans_with_as_many_joins():
    space, rng = PlanSpace(7, 3), random.Random(0)
    plans = list(space.enumerate_plans_with(3))
    draws = Counter(space.draw_plan(3, rng) for _ in range(200 * len(plans)))
    assert set(draws) == set(plans)
    # A count of mean 200 has a standard deviation of about 14; five of them on either side.
    assert all(130 <= count <= 270 for count in draws.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 0}, "at least one layer"),
        ({"num_layers": 4, "max_group": 1}, "at least 2 layers"),
        ({"num_layers": 4, "max_group": 5}, "only 4 layers"),
        ({"num_layers": 4, "frozen_layers": (4,)}, "layers 0 to 3"),
    ],
)
def test_impossible_spaces_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        PlanSpace(**arguments)
