"""The tree of beginnings against a list of plans searched one by one, and against worths written out."""

from __future__ import annotations

import random

import pytest

from lpsearch.evaluation.prefix_tree import HALF_LIFE_PLANS, UNSEEN_COUNT, PrefixTree
from lpsearch.plan import Plan
from tests.tolerances import PREFIX_SAVINGS

NUM_LAYERS = 12


def _draw_plans(count: int, *, max_group: int, seed: int) -> list[Plan]:
    """Draw plans of which each changes a little in the one before it, as in a search."""
    rng = random.Random(seed)
    joins: set[int] = set()
    plans = []
    while len(plans) < count:
        changed = joins ^ set(rng.sample(range(NUM_LAYERS - 1), rng.randint(1, 3)))
        plan = Plan.from_joins(NUM_LAYERS, changed)
        if plan.max_group <= max_group:
            joins = changed
            plans.append(plan)
    return plans


def _run(tree: PrefixTree[str], plan: Plan, *, batch: str = "batch", state_bytes: int = 1) -> int:
    """Run a plan whose states say where they are from, and return how many layers had to run."""
    with tree.visit(batch, plan.groups, state_bytes=state_bytes) as visit:
        skipped = 0 if visit.resume is None else visit.resume.num_layers
        if visit.resume is not None:
            assert visit.state == f"{batch} {[group for group in plan.groups if group[-1] < skipped]}"
        for boundary in visit.keep:
            assert boundary.num_layers > skipped
            groups = [group for group in plan.groups if group[-1] < boundary.num_layers]
            tree.hold(boundary, f"{batch} {groups}", nbytes=state_bytes)
    assert tree.held_bytes == state_bytes * len(tree) <= tree.budget_bytes
    assert len(tree.list_states()) == len(tree)
    return plan.num_layers - skipped


def _count_shared_layers(plan: Plan, other: Plan) -> int:
    shared = 0
    for group, other_group in zip(plan.groups[:-1], other.groups[:-1], strict=False):
        if group != other_group:
            break
        shared += len(group)
    return shared


@pytest.mark.parametrize("max_group", [2, 3])
def test_without_pressure_a_plan_resumes_where_it_leaves_every_earlier_plan(max_group):
    tree: PrefixTree[str] = PrefixTree(budget_bytes=1 << 40)
    before: list[Plan] = []
    for plan in _draw_plans(80, max_group=max_group, seed=1):
        shared = max((_count_shared_layers(plan, other) for other in before), default=0)
        assert _run(tree, plan) == NUM_LAYERS - shared
        before.append(plan)


@pytest.mark.parametrize("budget", [0, 1, 2, 7, 30])
def test_a_budget_holds_at_every_moment_and_more_of_it_saves_more(budget):
    plans = _draw_plans(120, max_group=2, seed=2)
    tree, larger = (PrefixTree[str](budget_bytes=size) for size in (budget, 4 * budget + 4))
    run = sum(_run(tree, plan) for plan in plans)
    assert sum(_run(larger, plan) for plan in plans) < run <= NUM_LAYERS * len(plans)
    assert (run < NUM_LAYERS * len(plans)) == (budget > 0)


def test_batches_share_the_budget_but_no_state():
    tree: PrefixTree[str] = PrefixTree(budget_bytes=20)
    for plan in _draw_plans(40, max_group=3, seed=3):
        for batch, size in (("first", 2), ("second", 1)):
            with tree.visit(batch, plan.groups, state_bytes=size) as visit:
                assert visit.state is None or visit.state == batch
                for boundary in visit.keep:
                    tree.hold(boundary, batch, nbytes=size)
            assert tree.held_bytes <= 20
    assert {"first", "second"} == set(tree.list_states())


def test_a_batch_that_is_no_longer_asked_for_makes_room():
    tree: PrefixTree[str] = PrefixTree(budget_bytes=30)
    plans = _draw_plans(100, max_group=2, seed=4)
    for plan in plans[:20]:
        _run(tree, plan, batch="old")
    for plan in plans[20:]:
        _run(tree, plan, batch="new")
    assert {state.split()[0] for state in tree.list_states()} == {"new"}


def _compute_chance(groups: tuple[tuple[int, ...], ...], seen: list[Plan]) -> float:
    """Chance that the next plan begins with these groups, by the definition: a sum over every plan seen a group."""
    ages = {plan: age for age, plan in enumerate(reversed(seen))}
    weights = {plan: 0.5 ** (age / HALF_LIFE_PLANS) for plan, age in ages.items()}
    chance = sum(weights.values())
    longest_group = max(2, *(plan.max_group for plan in seen))
    for group in groups:
        count = sum(weight for plan, weight in weights.items() if group in plan.groups)
        started = sum(weight for plan, weight in weights.items() if group[0] in [g[0] for g in plan.groups])
        chance *= (count + UNSEEN_COUNT) / (started + longest_group * UNSEEN_COUNT)
    return chance


def _compute_savings(held: set[tuple[tuple[int, ...], ...]], seen: list[Plan]) -> float:
    """Layers that the next plan is expected to save by a set of beginnings: each saves what those above it do not."""
    savings = 0.0
    for groups in held:
        above = max((len(other) for other in held if other == groups[: len(other)] != groups), default=0)
        layers_above = groups[above - 1][-1] + 1 if above else 0
        savings += (groups[-1][-1] + 1 - layers_above) * _compute_chance(groups, seen)
    return savings


@pytest.mark.parametrize("max_group", [2, 3])
def test_what_is_given_up_costs_the_least_expected_savings(max_group):
    budget = 6
    tree: PrefixTree[tuple[tuple[int, ...], ...]] = PrefixTree(budget_bytes=budget)
    plans = list(dict.fromkeys(_draw_plans(40, max_group=max_group, seed=5)))
    for index, plan in enumerate(plans):
        seen = plans[: index + 1]
        held = set(tree.list_states())
        with tree.visit("batch", plan.groups, state_bytes=1) as visit:
            for boundary in visit.keep:
                tree.hold(boundary, tuple(g for g in plan.groups if g[-1] < boundary.num_layers), nbytes=1)
            skipped = 0 if visit.resume is None else visit.resume.num_layers
        held |= {plan.groups[:end] for end in range(1, plan.depth) if plan.groups[end - 1][-1] >= skipped}
        while len(held) > budget:
            held.remove(max(held, key=lambda groups: _compute_savings(held - {groups}, seen)))
        savings = _compute_savings(set(tree.list_states()), seen)
        assert savings == pytest.approx(_compute_savings(held, seen), rel=PREFIX_SAVINGS)
