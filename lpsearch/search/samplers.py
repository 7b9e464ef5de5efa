"""Samplers by name: lpsearch's own proposers and Optuna's samplers, behind the one search space of a study.

Both kinds rebuild what they know from the study, so a resumed or second process continues where the first stopped, and
neither ever asks for a plan that is finished or running.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from lpsearch.errors import ConfigError
from lpsearch.plan import Plan
from lpsearch.search.pairset import PairsetProposer
from lpsearch.search.proposers import EvolutionProposer, Proposer, RandomProposer, WindowProposer
from lpsearch.search.results import RAW, Loss, Metric, State, TrialResult
from lpsearch.search.space import JoinSpace

__all__ = ["SAMPLER_NAMES", "PlanSampler", "ResultSource", "build_sampler", "read_told_results"]

ResultSource = Callable[[optuna.Study], Sequence[TrialResult]]
"""Returns the finished plans of a study in the order of the trials."""

SAMPLER_NAMES = ("evolution", "nsga2", "pairset", "random", "tpe", "window")

MAX_REDRAWS = 16
"""Draws of an Optuna sampler that may repeat a known plan before a random unknown one takes their place."""


def build_sampler(
    name: str,
    *,
    space: JoinSpace,
    budget: int | None,
    seed: int,
    metric: Metric = "nll",
    num_trials: int = 0,
    estimate_latency_ms: Callable[[Plan], float] | None = None,
    read_results: ResultSource | None = None,
) -> PlanSampler:
    """Build a sampler for ask-and-tell on a study over ``space.distributions``.

    Args:
        name: one of ``SAMPLER_NAMES``.
        space: the plans to search.
        budget: evaluations of the whole study; None when unknown.
        seed: decides every draw.
        metric: the loss that plans are compared by.
        num_trials: trials that the study already has, so that Optuna's samplers do not repeat their first draws.
        estimate_latency_ms: latency in ms that ``pairset`` compares plans by; None compares by depth.
        read_results: where the finished plans come from, with their losses as they are known by now; None takes the
            values that the trials were told.

    Raises:
        ConfigError: for an unknown name.
    """
    history = _History(space=space, read_results=read_results or partial(read_told_results, space=space, metric=metric))
    if name == "pairset":
        pairset = PairsetProposer(
            space=space, budget=budget, seed=seed, metric=metric, estimate_latency_ms=estimate_latency_ms
        )
        return ProposerSampler(pairset, history)
    if name == "evolution":
        return ProposerSampler(EvolutionProposer(space=space, seed=seed, metric=metric), history)
    if name == "random":
        return ProposerSampler(RandomProposer(space=space, seed=seed), history)
    if name == "window":
        return ProposerSampler(WindowProposer(space=space, seed=seed), history)
    stock_seed = int(np.random.SeedSequence([seed, num_trials]).generate_state(1)[0])
    fallback = RandomProposer(space=space, seed=seed)
    if name == "nsga2":
        return RepairingSampler(NSGAIISampler(seed=stock_seed), history, name=name, fallback=fallback)
    if name == "tpe":
        # Univariate, its default for several objectives, would sort all trials once for every join.
        return RepairingSampler(TPESampler(seed=stock_seed, multivariate=True), history, name=name, fallback=fallback)
    raise ConfigError(f"sampler {name!r} is unknown; choose one of {', '.join(SAMPLER_NAMES)}")


def read_told_results(study: optuna.Study, space: JoinSpace, metric: Metric) -> list[TrialResult]:
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
        if not plan.num_joins:
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


class _History:
    """Reads what a study knows: finished plans, and plans that are being evaluated.

    Args:
        space: the plans of the study.
        read_results: returns the finished plans in the order of the trials.
    """

    def __init__(self, *, space: JoinSpace, read_results: ResultSource) -> None:
        self.space = space
        self.read_results = read_results

    def list_pending(self, study: optuna.Study, *, asking: FrozenTrial) -> list[Plan]:
        """Return the plans that are being evaluated, the trial that is being asked for left out."""
        trials = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        plans = [self._find_plan(trial) for trial in trials if trial.number != asking.number]
        return [plan for plan in plans if plan is not None]

    def _find_plan(self, trial: FrozenTrial) -> Plan | None:
        if "groups" in trial.user_attrs:
            return Plan.from_groups(json.loads(trial.user_attrs["groups"]))
        if len(trial.params) == self.space.num_join_positions:
            return self.space.build_plan(trial.params)
        return None


class PlanSampler(BaseSampler):
    """An Optuna sampler that chooses whole plans and knows what proposed each of them.

    Attributes:
        origins: by the number of the trial, what proposed its plan.
    """

    def __init__(self, history: _History) -> None:
        self._history = history
        self.origins: dict[int, str] = {}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return every join: they are chosen together, and the space is the same for every trial."""
        return dict(self._history.space.distributions)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Refuse a parameter that is no join of the space."""
        raise ValueError(f"parameter {param_name!r} is no join of this study; ask with space.distributions")


class ProposerSampler(PlanSampler):
    """A sampler whose every point comes from a proposer of plans.

    Args:
        proposer: chooses the plans.
        history: reads the study for it.
    """

    def __init__(self, proposer: Proposer, history: _History) -> None:
        super().__init__(history)
        self._proposer = proposer

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the parameters of the next plan.

        Raises:
            RuntimeError: if every plan of the space is finished or running.
        """
        pending = self._history.list_pending(study, asking=trial)
        proposal = self._proposer.propose(self._history.read_results(study), pending)
        if proposal is None:
            raise RuntimeError("every plan of the space is finished or running; nothing is left to propose")
        self.origins[trial.number] = proposal.origin
        return self._history.space.build_params(proposal.plan)


class RepairingSampler(ProposerSampler):
    """An Optuna sampler over joins whose overlong runs are repaired and whose repeats are drawn again.

    The stored parameters are those of the repaired plan, so the sampler learns from what was evaluated. A repeat is
    drawn again before it becomes a trial: it would teach nothing, and its trial would count against nobody's budget.

    Args:
        sampler: the sampler that draws.
        history: reads the study.
        name: origin of its plans.
        fallback: proposes a plan after ``MAX_REDRAWS`` repeats.
    """

    def __init__(self, sampler: BaseSampler, history: _History, *, name: str, fallback: Proposer) -> None:
        super().__init__(fallback, history)
        self._sampler = sampler
        self._name = name

    def reseed_rng(self) -> None:
        """Give the sampler a fresh random state."""
        self._sampler.reseed_rng()

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the parameters of a plan that is neither finished nor running."""
        space = self._history.space
        taken = {result.plan for result in self._history.read_results(study)}
        taken.update(self._history.list_pending(study, asking=trial))
        inner_space = self._sampler.infer_relative_search_space(study, trial)
        for _ in range(MAX_REDRAWS):
            params = self._sampler.sample_relative(study, trial, inner_space)
            for name, distribution in search_space.items():
                if name not in params:
                    params[name] = self._sampler.sample_independent(study, trial, name, distribution)
            plan = space.build_plan(params)
            if plan not in taken:
                self.origins[trial.number] = self._name
                return space.build_params(plan)
        return super().sample_relative(study, trial, search_space)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Pass on."""
        self._sampler.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Pass on."""
        self._sampler.after_trial(study, trial, state, values)
