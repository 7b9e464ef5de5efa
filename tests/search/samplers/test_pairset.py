"""The proposer: what it may never do, and that it finds fronts."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpsearch.plan import Plan
from lpsearch.search import TrialResult
from lpsearch.search.samplers.pairset import PairsetProposer
from lpsearch.search.space import PlanSpace
from tests.results import build_result
from tests.tolerances import FLOAT64_COSTS

Landscape = Callable[[Plan], float]


def _build_landscape(num_layers: int, seed: int) -> Landscape:
    """Return a loss with costly ends, interactions and growth faster than additive."""
    rng = np.random.default_rng(seed)
    num_joins = num_layers - 1
    cost = 0.05 * rng.lognormal(sigma=0.6, size=num_joins)
    cost[:1] += 5.0
    cost[-1:] += 1.0
    products = np.triu(rng.normal(0.1, 0.3, size=(num_joins, num_joins)), 1)
    scale = np.minimum(cost[:, None], cost[None, :])

    def measure(plan: Plan) -> float:
        joins = list(plan.joins)
        total = cost[joins].sum() + sum((scale * products)[pair] for pair in combinations(joins, 2))
        return float(total + 0.1 * total**2)

    return measure


def _run(
    space: PlanSpace, landscape: Landscape, *, budget: int, seed: int = 0, workers: int = 1
) -> tuple[list[TrialResult], list[str]]:
    """Run a search; with several workers the oldest running plan finishes first."""
    proposer = PairsetProposer(space=space, budget=budget, seed=seed)
    results: list[TrialResult] = []
    running: list[Plan] = []
    origins: list[str] = []
    while len(results) < budget:
        while len(running) < workers and len(results) + len(running) < budget:
            proposal = proposer.propose(results, running)
            if proposal is None:
                break
            known = {result.plan for result in results} | set(running)
            assert proposal.plan not in known
            assert space.is_valid(proposal.plan.joins)
            running.append(proposal.plan)
            origins.append(proposal.origin)
        if not running:
            break
        plan = running.pop(0)
        results.append(build_result(plan, landscape(plan)))
    return results, origins


@settings(max_examples=25, deadline=None)
@given(
    num_layers=st.integers(1, 8),
    max_group=st.integers(2, 5),
    frozen=st.lists(st.integers(0, 7), max_size=2),
    workers=st.integers(1, 3),
    budget=st.sampled_from([7, 400]),
    seed=st.integers(0, 5),
)
def test_never_repeats_and_exhausts_the_space(
    num_layers: int, max_group: int, frozen: list[int], workers: int, budget: int, seed: int
) -> None:
    space = PlanSpace(
        num_layers, min(max_group, max(2, num_layers)), tuple(layer for layer in frozen if layer < num_layers)
    )
    results, _ = _run(space, _build_landscape(num_layers, seed), budget=budget, seed=seed, workers=workers)
    assert len(results) == min(budget, space.count_plans())


@settings(max_examples=15, deadline=None)
@given(shuffled=st.randoms(use_true_random=False), max_group=st.integers(2, 4), seed=st.integers(0, 5))
def test_proposal_does_not_depend_on_the_order_of_results(shuffled: random.Random, max_group: int, seed: int) -> None:
    space = PlanSpace(12, max_group)
    results, _ = _run(space, _build_landscape(12, seed), budget=24, seed=seed)
    proposer = PairsetProposer(space=space, budget=60, seed=seed)
    expected = proposer.propose(results, ())
    shuffled.shuffle(results)
    assert proposer.propose(results, ()) == expected
    assert PairsetProposer(space=space, budget=60, seed=seed).propose(results, ()) == expected


def test_origins_follow_the_design() -> None:
    _, origins = _run(PlanSpace(14), _build_landscape(14, 0), budget=30)
    assert origins[:14] == ["baseline"] + ["scan"] * 13
    assert origins[14:17] == ["programme"] * 3
    assert origins[-1] == "surrogate"


@pytest.mark.parametrize("broken", [math.nan, math.inf, 1e30])
def test_broken_plans_do_not_spoil_the_search(broken: float) -> None:
    """A join that ruins the model takes part in no later proposal, and the others are still ranked."""
    landscape = _build_landscape(12, 1)
    results, _ = _run(PlanSpace(12), lambda plan: broken if 5 in plan.joins else landscape(plan), budget=40)
    assert sum(5 in result.plan.joins for result in results[12:]) <= 3
    best = {}
    for plan in PlanSpace(12).enumerate_plans():
        if 5 not in plan.joins:
            best[plan.num_joins] = min(landscape(plan), best.get(plan.num_joins, math.inf))
    for count in range(1, 5):
        found = min(
            item.loss.delta_nll
            for item in results
            if item.plan.num_joins == count and math.isfinite(item.loss.delta_nll) and 5 not in item.plan.joins
        )
        assert found <= best[count] + FLOAT64_COSTS


@pytest.mark.parametrize("max_group", [2, 3])
def test_finds_the_front_of_a_small_space(max_group: int) -> None:
    space = PlanSpace(14, max_group)
    landscape = _build_landscape(14, 3)
    results, _ = _run(space, landscape, budget=80)
    for count in range(1, 5):
        best = min(landscape(plan) for plan in space.enumerate_plans_with(count))
        found = min(item.loss.delta_nll for item in results if item.plan.num_joins == count)
        assert found == pytest.approx(best, abs=FLOAT64_COSTS)


def test_small_budget_scans_evenly_and_still_reaches_the_dynamic_program() -> None:
    results, origins = _run(PlanSpace(40), _build_landscape(40, 0), budget=30)
    assert "programme" in origins
    scanned = sorted(item.plan.joins[0] for item in results if item.plan.num_joins == 1)
    assert max(np.diff([-1, *scanned, 39])) <= 5


def test_several_asks_before_a_tell_differ() -> None:
    """A batch asked with the earlier plans pending holds no plan twice and spreads over the front."""
    space = PlanSpace(20)
    results, _ = _run(space, _build_landscape(20, 2), budget=40)
    proposer = PairsetProposer(space=space, budget=80, seed=0)
    batch: list[Plan] = []
    for _ in range(8):
        proposal = proposer.propose(results, batch)
        assert proposal is not None
        batch.append(proposal.plan)
    assert len(set(batch)) == 8
    assert len({plan.num_joins for plan in batch}) >= 3


def test_scans_larger_groups_where_they_are_allowed() -> None:
    _, origins = _run(PlanSpace(14, 3), _build_landscape(14, 0), budget=40)
    assert origins[:20] == ["baseline"] + ["scan"] * 19
    assert origins[20] == "programme"


def test_plans_of_another_space_are_passed_over() -> None:
    space = PlanSpace(8, 2, (0,))
    outsider = Plan.from_joins(8, [0, 1, 2, 3, 4])
    results, _ = _run(space, _build_landscape(8, 0), budget=12)
    proposer = PairsetProposer(space=space, budget=20, seed=0)
    expected = proposer.propose(results, ())
    assert proposer.propose([*results, build_result(outsider, -1.0)], [outsider]) == expected
