"""What a study says while it runs and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lpsearch.plan import Plan
from lpsearch.search.results import TrialResult

__all__ = ["EvaluationUpdate", "StudyResult", "TrialUpdate"]


@dataclass(frozen=True)
class EvaluationUpdate:
    """What begins to be evaluated, and what is known by then.

    The trial before it may be evaluated but not finished, since the two overlap.

    Attributes:
        plan: the plan.
        origin: what proposed it; ``front`` where a plan of the final front gets the windows that it lacks.
        num_windows: windows that it is evaluated on now.
        num_finished: distinct finished plans of the study so far.
        budget: distinct finished plans at which the study ends; less than was asked for if the space is smaller.
        front: the best front so far, the baseline first; empty before the baseline is finished.
    """

    plan: Plan
    origin: str
    num_windows: int
    num_finished: int
    budget: int
    front: Sequence[TrialResult]


@dataclass(frozen=True)
class TrialUpdate:
    """Progress after one finished trial.

    Attributes:
        result: the plan that just finished.
        num_finished: distinct finished plans of the study so far.
        num_new: those of them that this run finished.
        budget: distinct finished plans at which the study ends; less than was asked for if the space is smaller.
        front: the best front so far, the baseline first.
        elapsed_s: seconds since this run began.
    """

    result: TrialResult
    num_finished: int
    num_new: int
    budget: int
    front: Sequence[TrialResult]
    elapsed_s: float


@dataclass(frozen=True)
class StudyResult:
    """What a study knows when a run ends.

    Attributes:
        results: every finished plan, in the order of the trials, the baseline included.
        front: the baseline, then every plan that no other beats, fewest joins first.
        exact: every plan of the space is finished, so the front is the best there is on the proxy.
        num_resumed: plans that were finished before this run.
        num_new: plans that this run finished.
        num_new_tokens: tokens that this run evaluated.
        timed_out: the run ended by ``timeout_s`` before the budget.
        elapsed_s: seconds that this run took.
    """

    results: tuple[TrialResult, ...]
    front: tuple[TrialResult, ...]
    exact: bool
    num_resumed: int
    num_new: int
    num_new_tokens: int
    timed_out: bool
    elapsed_s: float

    @property
    def baseline(self) -> TrialResult:
        """The unmodified model."""
        return self.front[0]

    @property
    def proxy_tokens(self) -> int:
        """Tokens behind the losses of all finished plans, earlier runs included."""
        return sum(result.proxy_tokens for result in self.results)

    @property
    def share_evaluated(self) -> float:
        """``proxy_tokens`` relative to evaluating every plan on all windows."""
        return self.proxy_tokens / (len(self.results) * self.baseline.proxy_tokens)
