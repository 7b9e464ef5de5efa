"""Scores on downstream tasks: what each variant of a model scored, how far it is from the first, and what it retained.

Two variants answer the same documents, so the standard error of their difference is that of the differences by
document, which is far smaller than the scores' own (Miller, "Adding Error Bars to Evals", arXiv 2411.00640). Tasks of
a group have documents of their own, so their variances add, with the squares of their weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

__all__ = ["Part", "Score", "TaskMetric", "TaskResult", "compare_scores", "compute_chance", "weigh_parts"]

_CLEAR_STANDARD_ERRORS = 2.0
"""Standard errors by which the first variant must be above the floor, for a share of that to mean something."""

_SAME_MEAN = 1e-9
"""Largest difference of a reported score from the mean of its documents' values, added in another order."""


@dataclass(frozen=True)
class Part:
    """The values of the documents of one task within a score.

    Attributes:
        weight: of the task's mean in the score; the weights of a score's parts add to 1.
        values: one a document, in the order of the documents.
    """

    weight: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class Score:
    """What one variant scored by one metric.

    Attributes:
        value: the score as the harness reports it.
        standard_error: its standard error; None where the harness knows none.
        parts: the documents that it is the mean of; empty where it is no mean, as F1 or perplexity.
    """

    value: float
    standard_error: float | None
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class TaskMetric:
    """One metric of one task.

    Attributes:
        task: name of the task, or of a group whose tasks are averaged.
        group: the group that it was evaluated in; None for what was asked for by name.
        output_type: how the model answers, e.g. ``multiple_choice`` or ``generate_until``; None if tasks differ.
        metric: name of the metric, e.g. ``acc_norm``.
        filter: name of what was done to the answers before, e.g. ``strict-match``; usually ``none``.
        is_main: whether it is the metric of the task that tables show.
        num_documents: documents that were evaluated.
        num_fewshot: solved examples before each question; None if tasks differ.
        version: of the task's definition.
        higher_is_better: None where the task does not say.
        chance: the score of random answers; None where it is not known.
    """

    task: str
    group: str | None
    output_type: str | None
    metric: str
    filter: str
    is_main: bool
    num_documents: int
    num_fewshot: int | None
    version: str
    higher_is_better: bool | None
    chance: float | None


@dataclass(frozen=True)
class TaskResult:
    """What every variant scored by one metric of one task.

    Attributes:
        metric: the task and the metric.
        scores: by variant; the first is the unmodified model.
        deltas: by variant but the first: its score minus the first's.
        delta_ses: the standard errors of these, paired by document; None where the score is no mean over documents.
        retained: by variant but the first: the share of what the first scores above chance that is left, or of its
            whole score where chance is not known. None where the first is not clearly above that, by two standard
            errors, or where lower scores are better.
    """

    metric: TaskMetric
    scores: Mapping[str, Score]
    deltas: Mapping[str, float]
    delta_ses: Mapping[str, float | None]
    retained: Mapping[str, float | None]


def compare_scores(metric: TaskMetric, scores: Mapping[str, Score]) -> TaskResult:
    """Compare every variant with the first.

    Args:
        metric: the task and the metric.
        scores: by variant, over the same documents; the first is the unmodified model.
    """
    base, *others = scores
    return TaskResult(
        metric=metric,
        scores=scores,
        deltas={name: scores[name].value - scores[base].value for name in others},
        delta_ses={name: _compute_paired_se(scores[name].parts, scores[base].parts) for name in others},
        retained={name: _compute_retained(metric, scores[name], scores[base]) for name in others},
    )


def weigh_parts(value: float, values_of_tasks: Sequence[Sequence[float]]) -> tuple[Part, ...]:
    """Find how a score is averaged over the documents of its tasks: by their number, or equally by task.

    Args:
        value: the score.
        values_of_tasks: the documents' values of each task.

    Returns:
        One part a task; none where the score is neither mean.
    """
    if not all(values_of_tasks):
        return ()
    num_documents = sum(map(len, values_of_tasks))
    by_size = [len(values) / num_documents for values in values_of_tasks]
    equally = [1 / len(values_of_tasks)] * len(values_of_tasks)
    for weights in (by_size, equally):
        mean = math.fsum(weight * fmean(values) for weight, values in zip(weights, values_of_tasks, strict=True))
        if math.isclose(mean, value, rel_tol=_SAME_MEAN, abs_tol=_SAME_MEAN):
            return tuple(Part(weight, tuple(values)) for weight, values in zip(weights, values_of_tasks, strict=True))
    return ()


def compute_chance(chances: Sequence[float | None], parts: Sequence[Part]) -> float | None:
    """Return the score of random answers of a group from those of its tasks; None unless all are known."""
    if len(chances) != len(parts):
        return None
    known = [chance for chance in chances if chance is not None]
    if len(known) < len(chances):
        return None
    return math.fsum(part.weight * chance for part, chance in zip(parts, known, strict=True))


def _compute_paired_se(parts: Sequence[Part], base_parts: Sequence[Part]) -> float | None:
    if not parts or [len(part.values) for part in parts] != [len(part.values) for part in base_parts]:
        return None
    total = 0.0
    for part, base in zip(parts, base_parts, strict=True):
        if len(part.values) < 2:
            return None
        differences = [value - base_value for value, base_value in zip(part.values, base.values, strict=True)]
        total += part.weight**2 * variance(differences) / len(differences)
    return math.sqrt(total)


def _compute_retained(metric: TaskMetric, score: Score, base: Score) -> float | None:
    if not metric.higher_is_better:
        return None
    floor = metric.chance or 0.0
    above = base.value - floor
    if not above > _CLEAR_STANDARD_ERRORS * (base.standard_error or 0.0):
        return None
    return (score.value - floor) / above
