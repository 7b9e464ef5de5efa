"""The finished plans of a study as arrays, which surrogates are fitted to."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from lpsearch.plan import Plan
from lpsearch.search.results import Metric, TrialResult
from lpsearch.search.samplers.surrogate import Strengths, Surrogate

__all__ = ["WORST_DELTA_NATS", "Evaluated", "fit_surrogate", "leave_taken", "list_joins", "stack_joins"]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

WORST_DELTA_NATS = 12.0
"""What a broken plan counts as: about the loss of guessing among a large vocabulary."""

MAX_OBSERVATIONS = 640
"""Most plans to fit; the time of a fit grows with their cube. Beyond it the worst of every number of joins go."""


@dataclass(frozen=True)
class Evaluated:
    """The finished plans as arrays, in an order of their own, without the baseline.

    Attributes:
        joined: (plans, num_joins) which joins each sets.
        delta_nll: (plans,) finite, at most ``WORST_DELTA_NATS``.
        sampling_error: (plans,) standard errors of ``delta_nll``; 0 where it is exact.
    """

    joined: BoolArray
    delta_nll: FloatArray
    sampling_error: FloatArray

    @classmethod
    def from_results(
        cls,
        results: Iterable[TrialResult],
        num_joins: int,
        metric: Metric,
        list_made: Callable[[Plan], tuple[int, ...]] = attrgetter("joins"),
    ) -> Evaluated:
        """Read what finished plans say about their losses on all windows.

        Args:
            results: finished plans.
            num_joins: number of joins, or of choices.
            metric: which loss.
            list_made: returns the joins of a plan, or the places of its choices.
        """
        results = list(results)
        num_tokens = max((result.proxy_tokens for result in results), default=0)  # the baseline's: all there are
        losses: dict[tuple[int, ...], tuple[float, float]] = {}
        for result in results:
            joins, loss = list_made(result.plan), result.get_cost(metric)
            if joins:
                # Windows are drawn without replacement: the error that is left falls to zero where all are there.
                share_missing = 1 - result.proxy_tokens / num_tokens
                sampling_error = (result.get_cost_se(metric) or 0.0) * math.sqrt(share_missing)
                measured = (min(loss, WORST_DELTA_NATS), sampling_error)
                losses[joins] = min(measured, losses.get(joins, measured))
        ordered = sorted(losses)
        values = np.array([losses[joins] for joins in ordered], dtype=np.float64).reshape(-1, 2)
        return cls(stack_joins(ordered, num_joins), values[:, 0], values[:, 1])

    def estimate_join_costs(self) -> tuple[FloatArray, BoolArray]:
        """Return (num_joins,) costs of the joins alone, interpolated where not measured, and which were measured."""
        num_joins = self.joined.shape[1]
        counts = self.joined.sum(axis=1)
        single = np.flatnonzero(counts == 1)
        joins = self.joined[single].argmax(axis=1)
        measured = np.zeros(num_joins, dtype=bool)
        measured[joins] = True
        if not len(single):
            return np.full(num_joins, float(np.median(self.delta_nll / counts))), measured
        order = joins.argsort()
        return np.interp(np.arange(num_joins), joins[order], self.delta_nll[single[order]]), measured

    def fit_surrogate(self, strengths: Strengths | None = None) -> Surrogate:
        """Fit the model of the losses, with strengths of its parts that are given, or those of most evidence."""
        join_means, measured = self.estimate_join_costs()
        fitted = self.choose_fitted()
        return Surrogate(
            joined=self.joined[fitted],
            delta_nll=self.delta_nll[fitted],
            sampling_error=self.sampling_error[fitted],
            join_means=join_means,
            measured=measured,
            strengths=strengths,
        )

    def choose_fitted(self) -> IntArray:
        """Return the places of the plans to fit, ascending: all, or of every number of joins as many of the best."""
        counts = self.joined.sum(axis=1)
        if len(counts) <= MAX_OBSERVATIONS:
            return np.arange(len(counts))
        order = np.lexsort((self.delta_nll, counts))
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order)) - np.searchsorted(counts[order], counts[order])
        rank[counts == 1] = 0  # what a join costs alone is told by nothing else
        return np.sort(np.lexsort((counts, rank))[:MAX_OBSERVATIONS])


def fit_surrogate(results: Iterable[TrialResult], *, num_joins: int, metric: Metric = "nll") -> Surrogate | None:
    """Return what the search has learned from plans; None where none of them has a join.

    Args:
        results: finished plans, in any order.
        num_joins: joins of the model, one less than its layers.
        metric: which loss.
    """
    evaluated = Evaluated.from_results(results, num_joins, metric)
    return evaluated.fit_surrogate() if len(evaluated.delta_nll) else None


def leave_taken(joined: BoolArray, taken: Iterable[tuple[int, ...]]) -> BoolArray:
    """Return the plans that are not taken, each once, in a fixed order."""
    known = {row.tobytes() for row in np.packbits(stack_joins(taken, joined.shape[1]), axis=1)}
    first = {row.tobytes(): index for index, row in enumerate(np.packbits(joined, axis=1))}
    return joined[sorted(index for key, index in first.items() if key not in known)]


def list_joins(joined: BoolArray) -> tuple[int, ...]:
    """Return the places that are set."""
    return tuple(np.flatnonzero(joined).tolist())


def stack_joins(plans: Iterable[Collection[int]], num_joins: int) -> BoolArray:
    """Return (plans, num_joins) flags."""
    listed = [tuple(joins) for joins in plans]
    joined = np.zeros((len(listed), num_joins), dtype=bool)
    rows = np.repeat(np.arange(len(listed)), list(map(len, listed)))
    joined[rows, np.fromiter(chain.from_iterable(listed), np.int64, len(rows))] = True
    return joined
