"""Levels of plans, and a search that trades the loss against time where layers save unlike times."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpsearch.plan import Plan
from lpsearch.search import StudyStore, TrialResult, run_study
from lpsearch.search.samplers.pairset import PairsetProposer
from lpsearch.search.samplers.savings import build_levels
from lpsearch.search.space import PlanSpace
from tests.results import build_result
from tests.search.evaluators import SyntheticEvaluator
from tests.tolerances import FLOAT64_COSTS

spaces = st.builds(
    lambda num_layers, max_group: PlanSpace(num_layers, min(max_group, max(2, num_layers))),
    st.integers(1, 9),
    st.integers(2, 5),
)


def build_latency(num_layers, *, costs_ms=(1.0, 3.0), shared=0.6):
    """Return an additive latency: a group takes what its dearest layer does, and of the others all but a share."""

    def estimate(plan):
        assert plan.num_layers == num_layers
        total = 0.5
        for group in plan.groups:
            times = sorted(costs_ms[layer_idx // 2 % len(costs_ms)] for layer_idx in group)
            total += times[-1] + (1 - shared) * sum(times[:-1])
        return total

    return estimate


def stack(space, plans):
    joined = np.zeros((len(plans), space.num_layers - 1), dtype=bool)
    for row, plan in enumerate(plans):
        joined[row, list(plan.joins)] = True
    return joined


@given(spaces, st.booleans())
def test_alike_layers_give_the_numbers_of_joins(space, timed):
    plans = list(space.enumerate_plans())
    levels = build_levels(space, (lambda plan: 0.3 + 0.7 * plan.depth) if timed else None)
    assert levels.classify(stack(space, plans)).tolist() == [plan.num_joins for plan in plans]
    assert (levels.units, levels.num_levels) == (1, space.max_choices)


@given(spaces)
def test_levels_follow_the_time_saved(space):
    estimate = build_latency(space.num_layers)
    plans = list(space.enumerate_plans())
    saved_ms = [estimate(plans[0]) - estimate(plan) for plan in plans]
    levels = build_levels(space, estimate)
    width_ms = max(saved_ms) / max(space.max_choices, 1)
    expected = [math.floor(saved / width_ms + 1e-6) if width_ms else 0 for saved in saved_ms]
    assert levels.classify(stack(space, plans)).tolist() == expected


def test_a_model_that_no_plan_speeds_up_is_searched_by_depth(caplog):
    space = PlanSpace(6)
    plans = list(space.enumerate_plans())
    levels = build_levels(space, lambda plan: 5.0 + plan.num_joins)
    assert "no plan is estimated to be faster" in caplog.text
    assert levels.classify(stack(space, plans)).tolist() == [plan.num_joins for plan in plans]


def find_best(values, latencies, targets):
    limits = [target + FLOAT64_COSTS for target in targets]
    return [min(v for v, ms in zip(values, latencies, strict=True) if ms <= limit) for limit in limits]


@pytest.mark.parametrize("max_group", [2, 3])
def test_search_finds_the_front_of_time_where_layers_differ(max_group):
    space = PlanSpace(16, max_group)
    estimate = build_latency(16)
    measure = SyntheticEvaluator(16).compute_delta
    plans = list(space.enumerate_plans())
    base_ms = estimate(plans[0])
    most_ms = base_ms - min(map(estimate, plans))
    targets = [base_ms - share * most_ms for share in (0.1, 0.2, 0.3, 0.4, 0.5)]
    best = find_best(list(map(measure, plans)), list(map(estimate, plans)), targets)

    regret = {}
    for objective, latency in (("latency", estimate), ("depth", None)):
        proposer = PairsetProposer(space=space, budget=90, seed=0, estimate_latency_ms=latency)
        results: list[TrialResult] = []
        while len(results) < 90:
            proposal = proposer.propose(results, ())
            results.append(build_result(proposal.plan, measure(proposal.plan)))
        assert len({item.plan for item in results}) == 90
        found = find_best([item.loss.delta_nll for item in results], [estimate(item.plan) for item in results], targets)
        regret[objective] = sum(found) - sum(best)
    assert 0 <= regret["latency"] < 0.02
    assert regret["latency"] < regret["depth"]


def test_study_trades_loss_against_time(tmp_path):
    estimate = build_latency(10)
    evaluator = SyntheticEvaluator(10)
    with StudyStore(f"sqlite:///{tmp_path / 'study.db'}", study_name="demo") as store:
        result = run_study(
            evaluator=evaluator,
            space=PlanSpace(10),
            budget=40,
            store=store,
            objective="latency",
            estimate_latency_ms=estimate,
        )
    latencies = [record.latency_ms for record in result.front]
    assert latencies == [estimate(record.plan) for record in result.front]
    assert len(result.results) == 40
    assert result.results[0].plan == Plan.baseline(10)
