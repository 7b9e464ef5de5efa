"""The search over joins and drops: the dynamic program, the draws, and that it finds fronts."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter

import numpy as np
import pytest

from lpsearch.plan import Plan
from lpsearch.search import SAMPLER_NAMES, StudyStore, run_study
from lpsearch.search.samplers.baselines import BlockProposer, EvolutionProposer, RandomProposer
from lpsearch.search.samplers.dynamic_program import PlanCosts
from lpsearch.search.samplers.mixed import MixedProposer
from lpsearch.search.samplers.time_levels import TimeLevels
from lpsearch.search.space import PlanSpace
from tests.results import build_result
from tests.search.evaluators import SyntheticEvaluator
from tests.tolerances import FLOAT64_COSTS

EVERYTHING = ("joins", "drop-attention", "drop-mlp")
SPACES = [
    PlanSpace(4, allow=EVERYTHING),
    PlanSpace(4, 3, (1,), allow=EVERYTHING),
    PlanSpace(5, allow=("drop-attention", "drop-mlp")),
    PlanSpace(4, allow=("joins", "drop-mlp")),
]


def estimate_latency_ms(plan):
    """Attention takes half of an MLP, and what joins an attention or an MLP saves a fifth of it."""
    total = 1.0
    for group in plan.groups:
        for kept, cost in ((group.attention_layers, 0.5), (group.mlp_layers, 1.0)):
            total += cost * (0.2 * bool(kept) + 0.8 * len(kept))
    return total


def build_landscape(space, seed=0):
    """Return a loss that is quadratic in the choices, with strong interactions of neighbours, and its costs."""
    rng = np.random.default_rng(seed)
    cost = 0.05 * rng.lognormal(sigma=0.7, size=len(space.choices))
    positions = np.array([np.mean(choice.layers) for choice in space.choices])
    fade = np.exp(-np.abs(np.subtract.outer(positions, positions)))
    products = np.triu(rng.normal(0.1, 0.3, size=fade.shape) * fade * np.sqrt(np.outer(cost, cost)), 1)
    products += products.T

    def measure(plan):
        made = np.array(space.encode(plan), dtype=float)
        total = cost @ made + 0.5 * made @ products @ made
        return float(total + 0.1 * total**2)

    return measure, PlanCosts(cost[None], products[None])


@pytest.mark.parametrize("levels_per_layer", [1, 4])
@pytest.mark.parametrize("space", SPACES)
def test_levels_are_those_of_the_time_saved(space, levels_per_layer):
    levels = TimeLevels(space, estimate_latency_ms, levels_per_layer=levels_per_layer)
    assert levels.useful_level == max(8, levels_per_layer * (space.num_layers - len(space.frozen_layers)))
    plans = list(space.enumerate_plans())
    made = np.array([space.encode(plan) for plan in plans])
    saved = [estimate_latency_ms(plans[0]) - estimate_latency_ms(plan) for plan in plans]
    free = set(range(space.num_layers)) - set(space.frozen_layers)
    everything = {"attention": free, "mlp": free}
    most = saved[-1] if len(space.allow) == 2 and "joins" in space.allow else None
    if most is None:
        whole = Plan.baseline(space.num_layers)
        most = estimate_latency_ms(whole) - estimate_latency_ms(whole.drop(everything))
    else:
        most = max(saved)
    width = most / 3 / levels.useful_level
    expected = [min(int(item / width + 1e-6), levels.num_levels) for item in saved]
    assert levels.classify(made).tolist() == expected == [levels.find_level(plan) for plan in plans]


@pytest.mark.parametrize("levels_per_layer", [1, 4])
@pytest.mark.parametrize("space", SPACES)
def test_the_dynamic_program_is_exact_where_only_neighbours_interact(space, levels_per_layer):
    """Products of choices at most a layer apart, at every level, against every plan of the space."""
    levels = TimeLevels(space, estimate_latency_ms, levels_per_layer=levels_per_layer)
    _, costs = build_landscape(space, seed=3)
    layers = [choice.layers for choice in space.choices]
    near = np.array([[max(a[-1], b[-1]) - min(a[0], b[0]) <= 1 for b in layers] for a in layers])
    costs = PlanCosts(costs.join_costs, costs.product_costs * near)
    plans = list(space.enumerate_plans())
    value = costs.evaluate(np.array([space.encode(plan) for plan in plans], dtype=float))[0]
    solved = levels.solve(costs)[0]
    for level in range(1, levels.num_levels):
        alike = [item for plan, item in zip(plans, value, strict=True) if levels.find_drawn_level(plan) == level]
        if alike:
            assert costs.evaluate(solved[level - 1][None].astype(float))[0, 0] == pytest.approx(
                min(alike), abs=FLOAT64_COSTS
            )
        else:
            assert not solved[level - 1].any()


@pytest.mark.parametrize("space", SPACES)
def test_draws_are_uniform_within_a_level(space):
    levels = TimeLevels(space, estimate_latency_ms)
    places = Counter(levels.find_drawn_level(plan) for plan in space.enumerate_plans())
    del places[None]
    counts = levels.count_plans()
    assert {level: count for level, count in enumerate(counts) if count} == dict(places)
    level = max(places, key=lambda place: places[place])
    plans = [plan for plan in space.enumerate_plans() if levels.find_drawn_level(plan) == level]
    assert set(levels.iterate_level(level)) == set(plans)
    rng = random.Random(0)
    draws = Counter(levels.draw_plan(level, rng) for _ in range(200 * len(plans)))
    assert set(draws) == set(plans)
    assert max(draws.values()) < 2 * min(draws.values())


def search(space, measure, *, budget, estimate=estimate_latency_ms, seed=0):
    proposer = MixedProposer(space=space, budget=budget, seed=seed, estimate_latency_ms=estimate)
    results = []
    while len(results) < budget:
        proposal = proposer.propose(results, ())
        if proposal is None:
            break
        assert proposal.plan in space
        results.append(build_result(proposal.plan, measure(proposal.plan), trial=len(results)))
    assert len({result.plan for result in results}) == len(results)
    return results


@pytest.mark.parametrize("space", SPACES)
def test_a_small_space_is_used_up(space):
    measure, _ = build_landscape(space)
    assert len(search(space, measure, budget=10_000 if space.count_plans() < 400 else 60)) in (
        space.count_plans(),
        60,
    )


def test_the_front_of_a_small_space_is_found():
    space = PlanSpace(5, allow=EVERYTHING)
    measure, _ = build_landscape(space, seed=1)
    plans = list(space.enumerate_plans())
    results = search(space, measure, budget=200)
    base_ms = estimate_latency_ms(plans[0])
    most_ms = base_ms - 1.0
    for share in (0.05, 0.1, 0.2, 0.3):
        limit = base_ms - share * most_ms + FLOAT64_COSTS
        best = min(measure(plan) for plan in plans if estimate_latency_ms(plan) <= limit)
        found = min(item.loss.delta_nll for item in results if estimate_latency_ms(item.plan) <= limit)
        assert found == pytest.approx(best, abs=FLOAT64_COSTS)


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_every_sampler_works_in_the_space(sampler, tmp_path):
    space = PlanSpace(6, 2, (0,), allow=EVERYTHING)
    evaluator = SyntheticEvaluator(6)
    with StudyStore(f"sqlite:///{tmp_path / 'study.db'}", study_name="demo") as store:
        result = run_study(
            evaluator=evaluator,
            space=space,
            budget=30,
            store=store,
            sampler=sampler,
            objective="latency",
            estimate_latency_ms=estimate_latency_ms,
        )
    assert len(result.results) == 30
    assert all(found.plan in space for found in result.results)
    assert len({found.plan for found in result.results}) == 30
    assert any(found.plan.num_dropped for found in result.results)
    times = [found.latency_ms for found in result.front]
    assert times == sorted(times, reverse=True)


def test_evolution_goes_on_from_the_baseline_where_plans_of_its_level_make_choices():
    """A join saves less than a level is wide, so the baseline is a parent, which has no choice to exchange."""
    space = PlanSpace(12, allow=EVERYTHING)
    levels = TimeLevels(space, estimate_latency_ms)
    measure, _ = build_landscape(space)
    assert levels.find_drawn_level(Plan.from_joins(12, [3])) == levels.find_drawn_level(Plan.baseline(12)) == 0
    proposer = EvolutionProposer(space=space, seed=1, levels=levels)
    results = [build_result(Plan.baseline(12), 0.0, trial=0)]
    while len(results) < 150:
        proposal = proposer.propose(results, ())
        assert proposal.plan in space
        results.append(build_result(proposal.plan, measure(proposal.plan), trial=len(results)))
    assert len({result.plan for result in results}) == 150


def test_joins_alone_are_searched_as_before_there_were_drops():
    """The plans that each proposer chose before, as a hash: a study that was begun then goes on the same way."""
    space = PlanSpace(27)
    measure, _ = build_landscape(space)
    expected = {"random": "c3922535fce7", "evolution": "034d83fd1ed2", "window": "6fc0207aeba4"}
    proposers = {
        "random": RandomProposer(space=space, seed=1),
        "evolution": EvolutionProposer(space=space, seed=1),
        "window": BlockProposer(space=space, seed=1),
    }
    for name, proposer in proposers.items():
        results = []
        while len(results) < 70:
            plan = proposer.propose(results, ()).plan
            results.append(build_result(plan, measure(plan), trial=len(results)))
        keys = json.dumps([result.plan.key for result in results])
        assert hashlib.sha256(keys.encode()).hexdigest()[:12] == expected[name], name
