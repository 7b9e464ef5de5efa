"""Proposers of plans, and how they and Optuna's own samplers stand behind the one search space of a study.

A sampler reads what it knows from the study, so a resumed or second process continues where the first stopped. None
ever asks for a plan that is finished or running.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from lpsearch.plan import Plan
from lpsearch.search.results import RAW, Loss, Metric, State, TrialResult
from lpsearch.search.samplers.one_thread import one_blas_thread
from lpsearch.search.space import PlanSpace

__all__ = [
    "PlanSampler",
    "Proposal",
    "Proposer",
    "ProposerSampler",
    "RepairingSampler",
    "ResultSource",
    "read_told_results",
]

MAX_REDRAWS = 16
"""Draws of an Optuna sampler that may repeat a known plan before a random unknown one takes their place."""

ResultSource = Callable[[optuna.Study], Sequence[TrialResult]]
"""Returns the finished plans of a study in the order of the trials."""


@dataclass(frozen=True)
class Proposal:
    """The plan to evaluate next.

    Attributes:
        plan: neither finished nor pending.
        origin: what proposed it: ``baseline``, ``scan``, ``programme``, ``surrogate``, ``random`` ...
    """

    plan: Plan
    origin: str


class Proposer(Protocol):
    """Chooses the next plan from what is known; a pure function, so that any process continues the search."""

    def propose(self, results: Sequence[TrialResult], pending: Collection[Plan]) -> Proposal | None:
        """Choose a plan that is neither finished nor pending; None when the space has no other.

        Args:
            results: every finished plan, in the order of the trials.
            pending: plans that are being evaluated.
        """


class PlanSampler(BaseSampler):
    """An Optuna sampler that chooses whole plans and knows what proposed each of them.

    Args:
        space: the plans of the study.
        read_results: returns the finished plans in the order of the trials.

    Attributes:
        origins: by the number of the trial, what proposed its plan.
        read_pending: returns the plans that are being evaluated; None reads them from the study.
    """

    def __init__(self, *, space: PlanSpace, read_results: ResultSource) -> None:
        self._space = space
        self._read_results = read_results
        self.origins: dict[int, str] = {}
        self.read_pending: Callable[[], Sequence[Plan]] | None = None

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return every choice: they are made together, and the space is the same for every trial."""
        return dict(self._space.distributions)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Refuse a parameter that is no choice of the space."""
        raise ValueError(f"parameter {param_name!r} is no choice of this study; ask with space.distributions")

    def list_pending(self, study: optuna.Study, *, current: FrozenTrial) -> list[Plan]:
        """Return the plans that are being evaluated, the one that is asked for now left out."""
        if self.read_pending is not None:
            return list(self.read_pending())
        trials = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        plans = [self._find_plan(trial) for trial in trials if trial.number != current.number]
        return [plan for plan in plans if plan is not None]

    def _find_plan(self, trial: FrozenTrial) -> Plan | None:
        if "groups" in trial.user_attrs:
            return Plan.from_key(trial.user_attrs["groups"])
        if trial.params.keys() == self._space.distributions.keys():
            return self._space.build_plan(trial.params)
        return None


class ProposerSampler(PlanSampler):
    """A sampler whose every point comes from a proposer of plans.

    Args:
        proposer: chooses the plans.
        space: the plans of the study.
        read_results: returns the finished plans in the order of the trials.
    """

    def __init__(self, proposer: Proposer, *, space: PlanSpace, read_results: ResultSource) -> None:
        super().__init__(space=space, read_results=read_results)
        self._proposer = proposer

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the parameters of the next plan.

        Raises:
            RuntimeError: if every plan of the space is finished or running.
        """
        results, pending = self._read_results(study), self.list_pending(study, current=trial)
        with one_blas_thread():
            proposal = self._proposer.propose(results, pending)
        if proposal is None:
            raise RuntimeError("every plan of the space is finished or running; nothing is left to propose")
        self.origins[trial.number] = proposal.origin
        return self._space.build_params(proposal.plan)


class RepairingSampler(ProposerSampler):
    """An Optuna sampler over joins whose overlong runs are repaired and whose repeats are drawn again.

    The stored parameters are those of the repaired plan, so the sampler learns from what was evaluated. A repeat is
    drawn again before it becomes a trial: it would teach nothing, and its trial would count against nobody's budget.

    The sampler is built anew for every trial, with a seed that depends on how many plans are finished or running: all
    else that it knows is in the study, so a search that is interrupted goes on with the draws of an unbroken one.

    Args:
        build_sampler: builds the sampler that draws, from a seed.
        seed: of the search.
        origin: of its plans.
        fallback: proposes a plan after ``MAX_REDRAWS`` repeats.
        space: the plans of the study.
        read_results: returns the finished plans in the order of the trials.
    """

    def __init__(
        self,
        build_sampler: Callable[[int], BaseSampler],
        *,
        seed: int,
        origin: str,
        fallback: Proposer,
        space: PlanSpace,
        read_results: ResultSource,
    ) -> None:
        super().__init__(fallback, space=space, read_results=read_results)
        self._build_sampler = build_sampler
        self._seed = seed
        self._sampler = build_sampler(seed)
        self._origin = origin

    def reseed_rng(self) -> None:
        """Change nothing: the seed of a trial depends on the study."""

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the parameters of a plan that is neither finished nor running."""
        taken = {result.plan for result in self._read_results(study)}
        taken.update(self.list_pending(study, current=trial))
        self._sampler = self._build_sampler(int(np.random.SeedSequence([self._seed, len(taken)]).generate_state(1)[0]))
        inner_space = self._sampler.infer_relative_search_space(study, trial)
        for _ in range(MAX_REDRAWS):
            params = self._sampler.sample_relative(study, trial, inner_space)
            for name, distribution in search_space.items():
                if name not in params:
                    params[name] = self._sampler.sample_independent(study, trial, name, distribution)
            plan = self._space.build_plan(params)
            if plan not in taken:
                self.origins[trial.number] = self._origin
                return self._space.build_params(plan)
        return super().sample_relative(study, trial, search_space)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Pass on."""
        self._sampler.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Pass on."""
        self._sampler.after_trial(study, trial, state, values)


def read_told_results(study: optuna.Study, space: PlanSpace, metric: Metric) -> list[TrialResult]:
    """Return the finished plans of a study by the values that its trials were told, as losses on all windows.

    Args:
        study: any study over ``space.distributions`` whose first plan is the baseline and whose second objective is the
            perplexity or the KL divergence.
        space: its plans.
        metric: which of the two.
    """
    results = []
    base_nll = 0.0
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        plan, value = space.build_plan(trial.params), trial.values[1]
        nll = math.log(value) if metric == "nll" and math.isfinite(value) else math.nan
        if not plan.num_joins and not plan.num_dropped:
            base_nll = nll
        loss = Loss(
            nll=nll,
            delta_nll=nll - base_nll,
            delta_nll_se=None,
            kl_nats_per_token=value if metric == "kl" else None,
            kl_se=None,
            num_windows=1,
            num_tokens=1,
        )
        state: State = "complete" if math.isfinite(value) else "broken"
        results.append(TrialResult(plan, RAW, trial.number, "", state, loss))
    return results
