"""Fits of the surrogate, which serve for several proposals while many plans are pending.

A fit takes longer than a worker may wait. With few plans pending nothing is kept, so that a proposal depends on nothing
but the results; with many a search depends on time anyhow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lpsearch.search.samplers.sampler import Proposal
from lpsearch.search.samplers.surrogate import Strengths, Surrogate

__all__ = ["Fit", "Fits", "estimate_deviation"]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

MANY_PENDING = 8
"""Pending plans from which a fit serves for several proposals, and one more result for each so many of them."""

STRENGTHS_GROWTH = 1.1
"""Growth of the results after which the strengths of the surrogate are chosen anew, where many plans are pending."""


@dataclass(frozen=True)
class Fit:
    """What is learned from some results.

    Attributes:
        num_results: how many.
        num_weighed: how many there were when the strengths of the surrogate were chosen.
        surrogate: the model fitted to them.
        candidates: (plans, choices) promising plans by it, none of which was taken.
    """

    num_results: int
    num_weighed: int
    surrogate: Surrogate
    candidates: BoolArray


class Fits:
    """The fit that is kept, if any."""

    def __init__(self) -> None:
        self._kept: Fit | None = None

    def propose(
        self,
        *,
        num_results: int,
        num_pending: int,
        fit_surrogate: Callable[[Strengths | None], Surrogate],
        list_candidates: Callable[[Surrogate], BoolArray],
        choose: Callable[[Fit], Proposal | None],
    ) -> Proposal | None:
        """Choose by the fit that is kept, or by a new one where none is or its candidates are used up.

        Args:
            num_results: finished plans.
            num_pending: plans that are being evaluated.
            fit_surrogate: fits to the results; its argument is the strengths, None to choose those of most evidence.
            list_candidates: returns the (plans, choices) promising plans by a surrogate.
            choose: returns the best candidate of a fit that is not taken; None where it has none.
        """
        kept = self._kept
        if kept is not None and 0 <= num_results - kept.num_results < num_pending // MANY_PENDING:
            proposal = choose(kept)
            if proposal is not None:
                return proposal
        is_kept = num_pending >= MANY_PENDING
        former = kept if is_kept else None
        strengths, num_weighed = None, num_results
        if former is not None and former.num_weighed <= num_results < STRENGTHS_GROWTH * former.num_weighed:
            strengths, num_weighed = former.surrogate.strengths, former.num_weighed
        surrogate = fit_surrogate(strengths)
        fit = Fit(num_results, num_weighed, surrogate, list_candidates(surrogate))
        self._kept = fit if is_kept else None
        return choose(fit)


def estimate_deviation(
    surrogate: Surrogate, candidates: BoolArray, mean: FloatArray, *, pending: BoolArray
) -> FloatArray:
    """Return the (plans,) standard deviations of candidates, where many plans are pending as if these were measured.

    Args:
        surrogate: fitted to the results.
        candidates: (plans, choices) plans.
        mean: (plans,) their means.
        pending: (others, choices) plans that are being evaluated; with many of them a batch is kept apart so (the
            kriging believer of Ginsbourger, Le Riche and Carraro, Kriging is well-suited to parallelize optimization,
            2010).
    """
    if len(pending) < MANY_PENDING:
        return surrogate.estimate_standard_deviation(candidates, mean)
    return surrogate.estimate_standard_deviation(candidates, mean, believed=pending[pending.any(axis=1)])
