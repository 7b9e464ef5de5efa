"""What the search learned about single choices and pairs of them: joins, and branches that are dropped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from lpsearch.config import Metric
from lpsearch.search import PlanSpace, TrialResult
from lpsearch.search.samplers.evaluated import Evaluated, fit_surrogate
from lpsearch.search.samplers.mixed import build_layout, fit_choices
from lpsearch.search.samplers.surrogate import Surrogate
from lpsearch.search.space import Choice

__all__ = ["ChoiceEffects", "describe_choice", "estimate_effects"]


@dataclass(frozen=True)
class ChoiceEffects:
    """What choices cost, alone and together, in nats per token.

    Attributes:
        choices: of the space: the joins, and the branches that may be dropped.
        measured: for each choice, the loss of the plan that makes it alone; None where that was not evaluated.
        measured_se: standard errors of these over windows.
        expected: for each choice, what the surrogate expects it to cost alone.
        interactions: [i][j] what it expects choices i and j to cost together beyond the sum of each alone; None where i
            is j, or no plan of the space makes exactly these two.
    """

    choices: tuple[Choice, ...]
    measured: tuple[float | None, ...]
    measured_se: tuple[float | None, ...]
    expected: tuple[float, ...]
    interactions: tuple[tuple[float | None, ...], ...]

    @property
    def has_drops(self) -> bool:
        """Whether any choice drops a branch."""
        return any(choice.kind != "join" for choice in self.choices)


def describe_choice(choice: Choice) -> str:
    """Name a choice, e.g. ``join 3 and 4``, ``attention 5`` or ``MLP 7``."""
    if choice.kind == "join":
        return f"join {choice.layers[0]} and {choice.layers[1]}"
    return f"{'attention' if choice.kind == 'drop_attention' else 'MLP'} {choice.layers[0]}"


def estimate_effects(results: Sequence[TrialResult], space: PlanSpace, metric: Metric) -> ChoiceEffects | None:
    """Estimate what choices cost by the surrogate that proposes plans.

    Args:
        results: finished plans.
        space: which choices there are.
        metric: which loss.

    Returns:
        None where no plan makes a choice.
    """
    results = [result for result in results if result.plan in space]
    choices = space.choices
    surrogate = _fit(results, space, metric)
    if surrogate is None:
        return None
    single: dict[int, TrialResult] = {}
    for result in results:
        made = [place for place, bit in enumerate(space.encode(result.plan)) if bit]
        if len(made) == 1 and math.isfinite(result.get_cost(metric)):
            single[made[0]] = result
    alone = surrogate.estimate_mean(np.eye(len(choices), dtype=bool))
    forbidden = [set(constraint) for constraint in space.constraints if len(constraint) <= 2]
    pairs = [
        pair for pair in combinations(range(len(choices)), 2) if not any(places <= set(pair) for places in forbidden)
    ]
    interactions: list[list[float | None]] = [[None] * len(choices) for _ in choices]
    if pairs:
        together = surrogate.estimate_mean(np.array([np.isin(np.arange(len(choices)), pair) for pair in pairs]))
        for (first, second), value in zip(pairs, together, strict=True):
            interactions[first][second] = interactions[second][first] = float(value - alone[first] - alone[second])
    return ChoiceEffects(
        choices=choices,
        measured=tuple(single[i].get_cost(metric) if i in single else None for i in range(len(choices))),
        measured_se=tuple(single[i].get_cost_se(metric) if i in single else None for i in range(len(choices))),
        expected=tuple(float(value) for value in alone),
        interactions=tuple(tuple(row) for row in interactions),
    )


def _fit(results: Sequence[TrialResult], space: PlanSpace, metric: Metric) -> Surrogate | None:
    """Fit the surrogate, as the proposers do; a choice that was not measured alone has what its neighbours cost."""
    if not space.allows_drops:
        return fit_surrogate(results, num_joins=space.num_join_positions, metric=metric)
    num_choices = len(space.choices)
    evaluated = Evaluated.from_results(
        results,
        num_choices,
        metric,
        lambda plan: tuple(place for place, bit in enumerate(space.encode(plan)) if bit),
    )
    return fit_choices(evaluated, build_layout(space)) if len(evaluated.delta_nll) else None
