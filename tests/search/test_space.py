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
    assert space.plan_counts == tuple(by_size[k] for k in range(space.max_choices + 1))
    assert max(by_size) == space.max_choices


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


# ---- Spaces with drops -----------------------------------------------------------------------------------------------

mixed_spaces = st.builds(
    PlanSpace,
    num_layers=st.just(3),
    max_group=st.integers(2, 3),
    frozen_layers=st.lists(st.integers(0, 2), max_size=1).map(tuple),
    allow=st.sampled_from(
        [
            ("joins", "drop-attention", "drop-mlp"),
            ("drop-attention", "drop-mlp"),
            ("joins", "drop-attention"),
            ("drop-mlp",),
        ]
    ),
)


def list_every_plan():
    """Every plan of three layers, whatever it joins or drops."""
    subsets = [s for k in range(4) for s in itertools.combinations(range(3), k)]
    for joins, attention, mlp in itertools.product([(), (0,), (1,), (0, 1)], subsets, subsets):
        yield Plan.from_joins(3, joins).drop({"attention": attention, "mlp": mlp})


def is_obviously_inside(space, plan):
    attention, mlp = map(set, plan.dropped.values())
    touched = attention | mlp | {layer_idx for i in plan.joins for layer_idx in (i, i + 1)}
    shares_branch = all(not attention & {i, i + 1} or not mlp & {i, i + 1} for i in plan.joins)
    return (
        ("joins" in space.allow or not plan.num_joins)
        and ("drop-attention" in space.allow or not attention)
        and ("drop-mlp" in space.allow or not mlp)
        and touched.isdisjoint(space.frozen_layers)
        and plan.max_group <= space.max_group
        and plan.num_dropped < 6
        and shares_branch
    )


@given(mixed_spaces)
def test_a_space_with_drops_holds_what_its_rules_say(space):
    expected = {plan for plan in list_every_plan() if is_obviously_inside(space, plan)}
    enumerated = list(space.enumerate_plans())
    assert enumerated[0] == Plan.baseline(3)
    assert len(enumerated) == len(set(enumerated)) == space.count_plans()
    assert set(enumerated) == expected
    made = [sum(space.encode(plan)) for plan in enumerated]
    assert made == sorted(made)
    assert space.plan_counts == tuple(Counter(made)[k] for k in range(max(made) + 1))
    for plan in list_every_plan():
        assert (plan in space) == (plan in expected)
        if plan in expected:
            assert space.build_plan(space.build_params(plan)) == plan
            assert not any(all(space.encode(plan)[place] for place in places) for places in space.constraints)
        else:
            with pytest.raises(PlanError, match="outside the space"):
                space.check_plan(plan, where="--enqueue plan")


@given(mixed_spaces, st.data())
def test_every_point_of_a_space_with_drops_is_repaired_to_a_plan(space, data):
    bits = data.draw(st.lists(st.booleans(), min_size=len(space.choices), max_size=len(space.choices)))
    plan = space.decode(bits)
    assert plan in space
    made = space.encode(plan)
    assert all(not after or before for before, after in zip(bits, made, strict=True)), "repair only takes away"
    assert space.decode(made) == plan
    if not any(all(bits[place] for place in places) for places in space.constraints):
        assert made == tuple(bits)


def test_draws_with_drops_are_uniform():
    space, rng = PlanSpace(3, allow=("joins", "drop-attention", "drop-mlp")), random.Random(0)
    plans = list(space.enumerate_plans_with(2))
    draws = Counter(space.draw_plan(2, rng) for _ in range(200 * len(plans)))
    assert set(draws) == set(plans)
    assert max(draws.values()) < 2 * min(draws.values())


def test_the_reason_is_named_why_a_plan_is_outside():
    space = PlanSpace(4, frozen_layers=(3,), allow=("joins", "drop-attention"))
    for dropped, reason in [({"mlp": [1]}, "drops the mlp of layers .1. "), ({"attention": [3]}, "frozen ones")]:
        with pytest.raises(PlanError, match=reason):
            space.check_plan(Plan.baseline(4).drop(dropped), where="a plan")
    whole = {"attention": range(4), "mlp": range(4)}
    with pytest.raises(PlanError, match="every branch of the model"):
        PlanSpace(4, allow=("drop-attention", "drop-mlp")).check_plan(Plan.baseline(4).drop(whole), where="a plan")
