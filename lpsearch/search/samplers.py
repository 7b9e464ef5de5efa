"""Samplers by name: lpsearch's own proposers and Optuna's samplers, behind the one search space of a study.

Both kinds rebuild what they know from the study's trials, so a resumed or second process continues where the first
stopped, and neither ever asks for a plan that is finished or running.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from lpsearch.errors import ConfigError
from lpsearch.plan import Plan
from lpsearch.search.pairset import Observation, PairsetProposer
from lpsearch.search.proposers import EvolutionProposer, Proposer, RandomProposer, WindowProposer
from lpsearch.search.records import Metric, PlanRecord, read_record
from lpsearch.search.space import JoinSpace

__all__ = ["SAMPLER_NAMES", "ProposerSampler", "RepairingSampler", "build_sampler"]

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
) -> BaseSampler:
    """Build a sampler for ask-and-tell on a study over ``space.distributions``.

    Args:
        name: one of ``SAMPLER_NAMES``.
        space: the plans to search.
        budget: evaluations of the whole study; None when unknown.
        seed: decides every draw.
        metric: the loss that plans are compared by.
        num_trials: trials that the study already has, so that Optuna's samplers do not repeat their first draws.
        estimate_latency_ms: latency in ms that ``pairset`` compares plans by; None compares by depth.

    Raises:
        ConfigError: for an unknown name.
    """
    history = _History(space=space, metric=metric)
    if name == "pairset":
        pairset = PairsetProposer(space=space, budget=budget, seed=seed, estimate_latency_ms=estimate_latency_ms)
        return ProposerSampler(pairset, history)
    if name == "evolution":
        return ProposerSampler(EvolutionProposer(space=space, seed=seed), history)
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


@dataclass(frozen=True)
class _Known:
    """What a study knows at one moment: plans with their losses, and plans that are being evaluated."""

    observations: list[Observation]
    pending: list[Plan]


class _History:
    """Reads a study's trials as observations; finished trials never change, so each is parsed once.

    Args:
        space: the plans of the study.
        metric: the loss that stands in the observations.
    """

    def __init__(self, *, space: JoinSpace, metric: Metric) -> None:
        self.space = space
        self._metric = metric
        self._records: dict[tuple[str, int], PlanRecord] = {}

    def read(self, study: optuna.Study, *, asking: FrozenTrial) -> _Known:
        """Return what is known, the trial that is being asked for left out."""
        records, pending = [], []
        trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING))
        for trial in trials:
            if trial.state == TrialState.COMPLETE:
                records.append(self._read_record(study.study_name, trial))
            elif trial.number != asking.number and (plan := self._find_plan(trial)) is not None:
                pending.append(plan)
        num_tokens = max((record.proxy_tokens for record in records), default=0)  # the baseline's: all there are
        return _Known(
            [Observation.from_record(record, metric=self._metric, num_tokens=num_tokens) for record in records], pending
        )

    def _read_record(self, study_name: str, trial: FrozenTrial) -> PlanRecord:
        key = (study_name, trial.number)
        if key not in self._records:
            self._records[key] = read_record(trial)
        return self._records[key]

    def _find_plan(self, trial: FrozenTrial) -> Plan | None:
        if "groups" in trial.user_attrs:
            return Plan.from_groups(json.loads(trial.user_attrs["groups"]))
        if len(trial.params) == self.space.num_join_positions:
            return self.space.build_plan(trial.params)
        return None


class ProposerSampler(BaseSampler):
    """An Optuna sampler whose every point comes from a proposer of plans.

    Args:
        proposer: chooses the plans.
        history: reads the study for it.
    """

    def __init__(self, proposer: Proposer, history: _History) -> None:
        """Store the parts."""
        self._proposer = proposer
        self._history = history

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return every join: the space is the same for every trial."""
        return dict(self._history.space.distributions)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the parameters of the next plan, and note on the trial what proposed it.

        Raises:
            RuntimeError: if every plan of the space is finished or running.
        """
        known = self._history.read(study, asking=trial)
        proposal = self._proposer.propose(known.observations, known.pending)
        if proposal is None:
            raise RuntimeError("every plan of the space is finished or running; nothing is left to propose")
        _note_origin(study, trial, proposal.origin)
        return self._history.space.build_params(proposal.plan)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Refuse a parameter that is no join of the space."""
        raise ValueError(f"parameter {param_name!r} is no join of this study; ask with space.distributions")


class RepairingSampler(BaseSampler):
    """An Optuna sampler over joins whose overlong runs are repaired and whose repeats are drawn again.

    The stored parameters are those of the repaired plan, so the sampler learns from what was evaluated. A repeat is
    drawn again before it becomes a trial: it would teach nothing, and its trial would count against nobody's budget.

    Args:
        sampler: the sampler that draws.
        history: reads the study.
        name: origin to note on its trials.
        fallback: proposes a plan after ``MAX_REDRAWS`` repeats.
    """

    def __init__(self, sampler: BaseSampler, history: _History, *, name: str, fallback: Proposer) -> None:
        """Store the parts."""
        self._sampler = sampler
        self._history = history
        self._name = name
        self._fallback = ProposerSampler(fallback, history)

    def reseed_rng(self) -> None:
        """Give the sampler a fresh random state."""
        self._sampler.reseed_rng()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return every join: repair needs them together."""
        return dict(self._history.space.distributions)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the parameters of a plan that is neither finished nor running."""
        space = self._history.space
        known = self._history.read(study, asking=trial)
        taken = {observation.plan for observation in known.observations}.union(known.pending)
        inner_space = self._sampler.infer_relative_search_space(study, trial)
        for _ in range(MAX_REDRAWS):
            params = self._sampler.sample_relative(study, trial, inner_space)
            for name, distribution in search_space.items():
                if name not in params:
                    params[name] = self._sampler.sample_independent(study, trial, name, distribution)
            plan = space.build_plan(params)
            if plan not in taken:
                _note_origin(study, trial, self._name)
                return space.build_params(plan)
        return self._fallback.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Refuse a parameter that is no join of the space."""
        return self._fallback.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Pass on."""
        self._sampler.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Pass on."""
        self._sampler.after_trial(study, trial, state, values)


def _note_origin(study: optuna.Study, trial: FrozenTrial, origin: str) -> None:
    study._storage.set_trial_user_attr(trial._trial_id, "origin", origin)
