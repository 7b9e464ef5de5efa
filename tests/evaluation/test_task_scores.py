"""Comparing scores: differences paired by document, shares of what is above chance, groups of tasks."""

from __future__ import annotations

import dataclasses
import random
from statistics import fmean, stdev

import pytest

from lpsearch.evaluation.task_scores import Part, Score, TaskMetric, compare_scores, compute_chance, weigh_parts
from tests.tolerances import FLOAT64_MEAN

METRIC = TaskMetric(
    task="arc",
    group=None,
    output_type="multiple_choice",
    metric="acc",
    filter="none",
    is_main=True,
    num_documents=100,
    num_fewshot=0,
    version="1",
    higher_is_better=True,
    chance=0.25,
)


def draw(count: int, *, share: float, seed: int) -> list[float]:
    generator = random.Random(seed)
    return [float(generator.random() < share) for _ in range(count)]


def score(values: list[float]) -> Score:
    mean = fmean(values)
    return Score(mean, stdev(values) / len(values) ** 0.5, (Part(1.0, tuple(values)),))


def test_the_error_of_a_difference_is_that_of_the_documents_differences() -> None:
    base, plan = draw(100, share=0.8, seed=1), draw(100, share=0.6, seed=2)
    result = compare_scores(METRIC, {"base": score(base), "plan": score(plan)})
    differences = [b - a for a, b in zip(base, plan, strict=True)]
    assert result.deltas["plan"] == pytest.approx(sum(differences) / 100, abs=FLOAT64_MEAN)
    assert result.delta_ses["plan"] == pytest.approx(stdev(differences) / 10, abs=FLOAT64_MEAN)


def test_answers_that_are_the_same_leave_no_error() -> None:
    values = draw(100, share=0.7, seed=1)
    result = compare_scores(METRIC, {"base": score(values), "plan": score(values)})
    assert result.deltas == {"plan": 0.0}
    assert result.delta_ses == {"plan": 0.0}
    assert result.retained == {"plan": 1.0}


def test_a_share_is_of_what_is_above_chance_where_chance_is_known() -> None:
    base, plan = [1.0] * 75 + [0.0] * 25, [1.0] * 50 + [0.0] * 50
    scores = {"base": score(base), "plan": score(plan), "refit": score(base)}
    assert compare_scores(METRIC, scores).retained == {"plan": 0.5, "refit": 1.0}
    unknown = dataclasses.replace(METRIC, chance=None)
    assert compare_scores(unknown, scores).retained == {"plan": pytest.approx(2 / 3), "refit": 1.0}


def test_no_share_is_given_where_the_first_is_not_clearly_above_chance() -> None:
    base, plan = [1.0] * 30 + [0.0] * 70, [1.0] * 28 + [0.0] * 72
    scores = {"base": score(base), "plan": score(plan)}
    assert compare_scores(METRIC, scores).retained == {"plan": None}, "0.30 ± 0.046 is chance, 0.25"
    assert compare_scores(dataclasses.replace(METRIC, chance=0.1), scores).retained["plan"] == pytest.approx(0.9)


@pytest.mark.parametrize("higher_is_better", [False, None])
def test_no_share_is_given_where_higher_is_not_better(higher_is_better: bool | None) -> None:
    metric = dataclasses.replace(METRIC, metric="word_perplexity", chance=None, higher_is_better=higher_is_better)
    result = compare_scores(metric, {"base": Score(20.0, 0.1), "plan": Score(25.0, 0.1)})
    assert result.retained == {"plan": None}
    assert result.deltas == {"plan": 5.0}
    assert result.delta_ses == {"plan": None}, "it is no mean over documents"


@pytest.mark.parametrize("by_size", [True, False])
def test_the_error_of_a_group_adds_those_of_its_tasks(by_size: bool) -> None:
    base, plan = [draw(80, share=0.9, seed=1), draw(20, share=0.5, seed=2)], [draw(80, share=0.7, seed=3)]
    plan.append(draw(20, share=0.3, seed=4))
    weights = [0.8, 0.2] if by_size else [0.5, 0.5]

    def average(values: list[list[float]]) -> Score:
        value = sum(weight * fmean(task) for weight, task in zip(weights, values, strict=True))
        return Score(value, 0.01, weigh_parts(value, values))

    result = compare_scores(METRIC, {"base": average(base), "plan": average(plan)})
    expected = 0.0
    for weight, before, after in zip(weights, base, plan, strict=True):
        differences = [b - a for a, b in zip(before, after, strict=True)]
        expected += (weight * stdev(differences)) ** 2 / len(differences)
    assert result.delta_ses["plan"] == pytest.approx(expected**0.5, abs=FLOAT64_MEAN)
    assert compute_chance([0.25, 0.5], average(base).parts) == pytest.approx(weights[0] * 0.25 + weights[1] * 0.5)
    assert compute_chance([0.25, None], average(base).parts) is None


def test_a_score_that_is_no_mean_has_no_parts() -> None:
    values = [[1.0, 0.0, 1.0], [0.0, 1.0]]
    assert weigh_parts(0.123, values) == ()
    assert weigh_parts(0.5, [[1.0, 0.0], []]) == ()
    assert [part.weight for part in weigh_parts(0.6, values)] == [0.6, 0.4]
