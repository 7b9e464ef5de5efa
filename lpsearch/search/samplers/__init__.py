"""Samplers by name: lpsearch's own proposers, and Optuna's samplers to compare them with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler

from lpsearch.errors import ConfigError
from lpsearch.plan import Plan
from lpsearch.search.results import Metric
from lpsearch.search.samplers.baselines import BlockProposer, EvolutionProposer, RandomProposer
from lpsearch.search.samplers.mixed import MixedProposer
from lpsearch.search.samplers.pairset import PairsetProposer
from lpsearch.search.samplers.sampler import (
    PlanSampler,
    Proposer,
    ProposerSampler,
    RepairingSampler,
    ResultSource,
    read_told_results,
)
from lpsearch.search.samplers.time_levels import TimeLevels
from lpsearch.search.space import PlanSpace

__all__ = ["SAMPLER_NAMES", "build_sampler"]


@dataclass(frozen=True)
class _Settings:
    """What a sampler may depend on; see :func:`build_sampler`."""

    space: PlanSpace
    budget: int | None
    seed: int
    metric: Metric
    estimate_latency_ms: Callable[[Plan], float] | None
    read_results: ResultSource

    @property
    def levels(self) -> TimeLevels | None:
        """Levels of time of a space with drops; None for joins alone, which go by their number."""
        return TimeLevels(self.space, self.estimate_latency_ms) if self.space.allows_drops else None

    def ask(self, proposer: Proposer) -> PlanSampler:
        """Build the sampler of a proposer."""
        return ProposerSampler(proposer, space=self.space, read_results=self.read_results)

    def repair(self, build_sampler: Callable[[int], BaseSampler], *, origin: str) -> PlanSampler:
        """Build the sampler that repairs what one of Optuna's draws, which is built from a seed."""
        fallback = RandomProposer(space=self.space, seed=self.seed, levels=self.levels)
        return RepairingSampler(
            build_sampler,
            seed=self.seed,
            origin=origin,
            fallback=fallback,
            space=self.space,
            read_results=self.read_results,
        )


def _build_pairset(settings: _Settings) -> PlanSampler:
    if settings.space.allows_drops:
        return settings.ask(
            MixedProposer(
                space=settings.space,
                budget=settings.budget,
                seed=settings.seed,
                metric=settings.metric,
                estimate_latency_ms=settings.estimate_latency_ms,
            )
        )
    return settings.ask(
        PairsetProposer(
            space=settings.space,
            budget=settings.budget,
            seed=settings.seed,
            metric=settings.metric,
            estimate_latency_ms=settings.estimate_latency_ms,
        )
    )


_FACTORIES: dict[str, Callable[[_Settings], PlanSampler]] = {
    "evolution": lambda of: of.ask(EvolutionProposer(space=of.space, seed=of.seed, metric=of.metric, levels=of.levels)),
    "nsga2": lambda of: of.repair(lambda seed: NSGAIISampler(seed=seed), origin="nsga2"),
    "pairset": _build_pairset,
    "random": lambda of: of.ask(RandomProposer(space=of.space, seed=of.seed, levels=of.levels)),
    # Univariate, its default for several objectives, would sort all trials once for every join.
    "tpe": lambda of: of.repair(lambda seed: TPESampler(seed=seed, multivariate=True), origin="tpe"),
    "window": lambda of: of.ask(BlockProposer(space=of.space, seed=of.seed, levels=of.levels)),
}

SAMPLER_NAMES = tuple(sorted(_FACTORIES))


def build_sampler(
    name: str,
    *,
    space: PlanSpace,
    budget: int | None,
    seed: int,
    metric: Metric = "nll",
    estimate_latency_ms: Callable[[Plan], float] | None = None,
    read_results: ResultSource | None = None,
    read_pending: Callable[[], Sequence[Plan]] | None = None,
) -> PlanSampler:
    """Build a sampler for ask-and-tell on a study over ``space.distributions``.

    Args:
        name: one of ``SAMPLER_NAMES``.
        space: the plans to search.
        budget: evaluations of the whole study; None when unknown.
        seed: decides every draw.
        metric: the loss that plans are compared by.
        estimate_latency_ms: latency in ms that ``pairset`` compares plans by, and every sampler of this package where
            drops are allowed; None compares by depth.
        read_results: where the finished plans come from, with their losses as they are known by now; None takes the
            values that the trials were told.
        read_pending: where the plans come from that are being evaluated; None reads them from the study.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in _FACTORIES:
        raise ConfigError(f"sampler {name!r} is unknown; choose one of {', '.join(SAMPLER_NAMES)}")
    if read_results is None:
        read_results = partial(read_told_results, space=space, metric=metric)
    sampler = _FACTORIES[name](_Settings(space, budget, seed, metric, estimate_latency_ms, read_results))
    sampler.read_pending = read_pending
    return sampler
