"""Samplers on a study of Optuna's own, without the tables of this package."""

from __future__ import annotations

import math

import optuna
import pytest

from lpsearch.plan import Plan
from lpsearch.search import SAMPLER_NAMES, PlanSpace, build_sampler
from lpsearch.search.samplers.pairset import PairsetProposer
from tests.results import build_result
from tests.search.evaluators import BASE_NLL, SyntheticEvaluator

SPACE = PlanSpace(10)


def search(sampler, budget, *, metric="nll", broken_join=None):
    """Ask and tell; return the plans in order and the study."""
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    measure = SyntheticEvaluator(SPACE.num_layers).compute_delta
    plans = []
    for _ in range(budget):
        trial = study.ask(dict(SPACE.distributions))
        plan = SPACE.build_plan(trial.params)
        assert trial.params == SPACE.build_params(plan), "what is proposed is a plan"
        loss = math.exp(BASE_NLL + measure(plan)) if metric == "nll" else measure(plan)
        study.tell(trial, [plan.depth_reduction, math.inf if broken_join in plan.joins else loss])
        plans.append(plan)
    return plans, study


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_samplers_work_on_a_plain_study_and_repeat_nothing(name):
    plans, _ = search(build_sampler(name, space=SPACE, budget=25, seed=0), 25, broken_join=4)
    assert len(set(plans)) == 25
    assert all(SPACE.is_valid(plan.joins) for plan in plans)


@pytest.mark.parametrize("metric", ["nll", "kl"])
def test_what_a_plain_study_was_told_decides_the_next_plan(metric):
    sampler = build_sampler("pairset", space=SPACE, budget=25, seed=0, metric=metric)
    plans, study = search(sampler, 25, metric=metric)
    measure = SyntheticEvaluator(SPACE.num_layers).compute_delta
    results = []
    for plan in plans:
        field = {"kl_nats_per_token": measure(plan)} if metric == "kl" else {}
        results.append(build_result(plan, measure(plan), trial=len(results), **field))
    proposer = PairsetProposer(space=SPACE, budget=25, seed=0, metric=metric)
    pending = Plan.from_joins(SPACE.num_layers, (0, 3))
    study.ask(dict(SPACE.distributions)).set_user_attr("groups", pending.key)
    asked = SPACE.build_plan(study.ask(dict(SPACE.distributions)).params)
    assert asked == proposer.propose(results, [pending]).plan
    assert asked != proposer.propose(results[:-3], [pending]).plan
