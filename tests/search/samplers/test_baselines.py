"""The baselines: what none of them may do, and that evolution descends from the fittest."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpsearch.plan import Plan
from lpsearch.search import TrialResult
from lpsearch.search.samplers.baselines import (
    GENERATION_PLANS,
    MAX_SWITCHES,
    BlockProposer,
    EvolutionProposer,
    RandomProposer,
)
from lpsearch.search.space import PlanSpace
from tests.results import build_result
from tests.search.evaluators import SyntheticEvaluator

PROPOSERS = (EvolutionProposer, RandomProposer, BlockProposer)


def search(proposer, measure, *, budget, workers=1):
    """Run a proposer, the oldest running plan finishing first; return the results and the origins."""
    results, running, origins = [], [], []
    while len(results) < budget:
        while len(running) < workers:
            proposal = proposer.propose(results, running)
            if proposal is None:
                break
            running.append(proposal.plan)
            origins.append(proposal.origin)
        if not running:
            break
        plan = running.pop(0)
        results.append(build_result(plan, measure(plan)))
    return results, origins


@pytest.mark.parametrize("build", PROPOSERS)
@settings(max_examples=25, deadline=None)
@given(
    num_layers=st.integers(1, 8),
    max_group=st.integers(2, 4),
    frozen=st.lists(st.integers(0, 7), max_size=2),
    workers=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_never_repeats_and_exhausts_the_space(build, num_layers, max_group, frozen, workers, seed):
    space = PlanSpace(
        num_layers, min(max_group, max(2, num_layers)), tuple(layer for layer in frozen if layer < num_layers)
    )
    proposer = build(space=space, seed=seed)
    results, _ = search(proposer, lambda plan: math.nan if 2 in plan.joins else 0.1, budget=500, workers=workers)
    plans = [item.plan for item in results]
    assert len(plans) == len(set(plans)) == space.count_plans()
    assert all(space.is_valid(plan.joins) for plan in plans)


@pytest.mark.parametrize("max_group", [2, 3])
def test_evolution_mutates_the_best_plan_of_each_number_of_joins(max_group):
    space = PlanSpace(20, max_group)
    measure = SyntheticEvaluator(20).compute_delta
    results, origins = search(EvolutionProposer(space=space, seed=1), measure, budget=150)
    assert origins.count("mutation") > 75
    by_count: dict[int, list[TrialResult]] = {}
    for item, origin in zip(results, origins, strict=True):
        earlier = by_count.setdefault(item.plan.num_joins, [])
        before = earlier[: len(earlier) // GENERATION_PLANS * GENERATION_PLANS]
        if origin == "mutation":
            parent = min(before, key=lambda known: known.loss.delta_nll).plan
            assert 1 <= len(set(parent.joins) - set(item.plan.joins)) <= MAX_SWITCHES
        earlier.append(item)
    sizes = {k: len(items) for k, items in by_count.items()}
    open_sizes = [size for k, size in sizes.items() if size < space.plan_counts[k]]
    assert max(sizes.values()) - min(open_sizes) <= 1


def test_evolution_improves_on_random():
    space = PlanSpace(24)
    measure = SyntheticEvaluator(24).compute_delta
    best = {}
    for build in (EvolutionProposer, RandomProposer):
        found = []
        for seed in range(3):
            results, _ = search(build(space=space, seed=seed), measure, budget=200)
            found += [min(item.loss.delta_nll for item in results if item.plan.num_joins == k) for k in range(2, 9)]
        best[build] = sum(found)
    assert best[EvolutionProposer] < best[RandomProposer]


def test_a_proposal_is_decided_by_what_is_known():
    space = PlanSpace(12)
    measure = SyntheticEvaluator(12).compute_delta
    for build in PROPOSERS:
        results, _ = search(build(space=space, seed=2), measure, budget=30)
        first = build(space=space, seed=2).propose(results, [])
        assert first == build(space=space, seed=2).propose(list(results), ())
        outsider = build_result(Plan.from_joins(12, [0, 1, 2, 3]), -1.0)
        assert build(space=space, seed=2).propose([outsider, *results], []) is not None
