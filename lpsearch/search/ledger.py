"""The losses of a study's plans window by window: which windows a plan still needs, and what its losses say.

A plan is first evaluated on the first of the nested shards (:mod:`lpsearch.evaluation.shards`), and on the next one
only if it may still be on the front. It is compared with its *rival*, the best plan known that saves at least as much,
on the windows that both have. Paired like this, what makes a window hard for every plan cancels, so few windows already
tell many plans apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lpsearch.evaluation.losses import WindowLosses, compute_paired_delta
from lpsearch.evaluation.shards import split_windows
from lpsearch.plan import Plan
from lpsearch.search.records import Metric, PlanRecord
from lpsearch.search.store import StudyStore

__all__ = ["Ledger", "Measurement", "is_beaten"]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

CONFIDENCE = 0.95
"""Of the two-sided interval of a plan's loss against its rival's; a plan stops where it lies above zero."""


@dataclass(frozen=True)
class Measurement:
    """What is known of a plan's losses, in nats per token; nan where one was not finite.

    Attributes:
        nll: mean negative log-likelihood over all windows; where the plan lacks some, the unmodified model's and the
            difference to it on the windows that the plan has.
        delta_nll: ``nll`` minus the unmodified model's.
        delta_nll_se: standard error of ``delta_nll`` over windows; None for a single window.
        kl_nats_per_token: mean KL(base || plan) over the windows that the plan has; None unless it was measured.
        kl_se: standard error of that mean over windows.
        num_tokens: tokens of the windows that the plan has.
    """

    nll: float
    delta_nll: float
    delta_nll_se: float | None
    kl_nats_per_token: float | None
    kl_se: float | None
    num_tokens: int


@dataclass
class _PlanLosses:
    """Losses of one plan by window; meaningless where ``seen`` is false."""

    seen: BoolArray
    nll: FloatArray
    kl: FloatArray | None
    tokens_per_window: int

    def keep(self, window_indices: list[int], losses: WindowLosses) -> None:
        self.seen[window_indices] = True
        self.nll[window_indices] = losses.nll_nats_per_token
        if losses.kl_nats_per_token is not None:
            if self.kl is None:
                self.kl = np.full(len(self.nll), np.nan)
            self.kl[window_indices] = losses.kl_nats_per_token
        self.tokens_per_window = losses.tokens_per_window

    def get_costs(self, metric: Metric) -> FloatArray:
        if metric == "nll":
            return self.nll
        return np.full(len(self.nll), np.nan) if self.kl is None else self.kl


class Ledger:
    """Losses by plan and window, in the store and in memory. Not safe for several threads.

    Args:
        store: keeps them.
        num_windows: windows in total.
        metric: the loss that plans are compared by.
        staged: stop evaluating a plan that its rival beats; False has every plan evaluated on all windows.
    """

    def __init__(self, store: StudyStore, *, num_windows: int, metric: Metric, staged: bool) -> None:
        """Begin with nothing in memory."""
        self._store = store
        self._num_windows = num_windows
        self._metric: Metric = metric
        self._staged = staged
        self._losses: dict[Plan, _PlanLosses] = {}

    def find_next_windows(self, plan: Plan, *, rival: Plan | None) -> list[int]:
        """Return the windows to evaluate a plan on next, of one shard; none if it has all, or has lost.

        Args:
            plan: the plan.
            rival: a plan with losses on all windows that saves at least as much as this one; None if there is none,
                and for a plan that is to have all windows.
        """
        losses = self._get(plan)
        missing = np.flatnonzero(~losses.seen).tolist()
        if not missing or self._has_lost(losses, rival):
            return []
        return split_windows(missing, self._num_windows)[0] if self._staged else missing

    def keep(self, plan: Plan, window_indices: list[int], losses: WindowLosses) -> None:
        """Keep losses of a plan on windows that it had none on.

        Args:
            plan: the plan that was evaluated.
            window_indices: the windows, in the order of ``losses``.
            losses: one value a window.
        """
        known = self._get(plan)
        self._store.record_losses(plan, window_indices, losses, split="proxy")
        known.keep(window_indices, losses)

    def is_complete(self, plan: Plan) -> bool:
        """Say whether a plan has losses on all windows."""
        return bool(self._get(plan).seen.all())

    def measure(self, plan: Plan) -> Measurement:
        """Say what is known of a plan that has losses on some windows; the unmodified model has them on all."""
        losses, base = self._get(plan), self._get(Plan.baseline(plan.num_layers))
        seen = losses.seen
        delta, delta_se = _compare(losses.nll[seen], base.nll[seen])
        kl, kl_se = None, None
        if losses.kl is not None:
            kl, kl_se = _compare(losses.kl[seen], np.zeros(int(seen.sum())))
        elif self._metric == "kl":
            kl = math.nan  # measured, and finite on no window
        return Measurement(
            nll=math.fsum(losses.nll) / self._num_windows if seen.all() else float(base.nll.mean()) + delta,
            delta_nll=delta,
            delta_nll_se=delta_se,
            kl_nats_per_token=kl,
            kl_se=kl_se,
            num_tokens=int(seen.sum()) * losses.tokens_per_window,
        )

    def build_record(self, plan: Plan, *, trial: int, origin: str, latency_ms: float | None) -> PlanRecord:
        """Build the record of a plan from what is known of it now.

        Args:
            plan: the plan, with losses on some windows.
            trial: number of its Optuna trial.
            origin: what proposed it.
            latency_ms: its estimated time per output token; None with latency off.
        """
        measured = self.measure(plan)
        return PlanRecord(
            plan=plan,
            trial=trial,
            nll=measured.nll,
            delta_nll=measured.delta_nll,
            delta_nll_se=measured.delta_nll_se,
            kl_nats_per_token=measured.kl_nats_per_token,
            kl_se=measured.kl_se,
            latency_ms=latency_ms,
            proxy_tokens=measured.num_tokens,
            origin=origin,
        )

    def refresh(self, record: PlanRecord) -> PlanRecord:
        """Return a record with what the store learned after its trial was told, if it did."""
        num_tokens = self._num_windows * self._get(Plan.baseline(record.plan.num_layers)).tokens_per_window
        if record.proxy_tokens >= num_tokens or not self.is_complete(record.plan):
            return record
        return self.build_record(record.plan, trial=record.trial, origin=record.origin, latency_ms=record.latency_ms)

    def _has_lost(self, losses: _PlanLosses, rival: Plan | None) -> bool:
        """Say whether a plan needs no more windows, since it is broken or its rival beats it."""
        seen = losses.seen
        costs = losses.get_costs(self._metric)[seen]
        if not self._staged or not len(costs) or rival is None:
            return False
        if not np.isfinite(costs).all():
            return True
        rival_costs = self._get(rival).get_costs(self._metric)[seen]
        return is_beaten(costs, rival_costs, num_windows=self._num_windows)

    def _get(self, plan: Plan) -> _PlanLosses:
        if plan not in self._losses:
            losses = _PlanLosses(
                np.zeros(self._num_windows, dtype=bool), np.full(self._num_windows, np.nan), None, tokens_per_window=0
            )
            window_indices, stored = self._store.load_known_losses(plan, split="proxy", num_windows=self._num_windows)
            if window_indices:
                losses.keep(window_indices, stored)
            self._losses[plan] = losses
        return self._losses[plan]


def is_beaten(costs: FloatArray, rival_costs: FloatArray, *, num_windows: int) -> bool:
    """Say whether a plan's mean cost over all windows is above its rival's, as far as some of the windows tell.

    The windows seen are taken as drawn without replacement from all of them, so the standard error of the mean paired
    difference has the factor ``sqrt(1 - seen / num_windows)``, and its quantiles are Student's (Cochran, Sampling
    Techniques, sections 2.6 and 2.8).

    Args:
        costs: (seen,) of the plan, nats per token.
        rival_costs: (seen,) of its rival on the same windows.
        num_windows: windows in total.
    """
    seen = len(costs)
    if seen < 2:
        return False
    difference = costs - rival_costs
    standard_error = float(difference.std(ddof=1)) * math.sqrt(1 / seen - 1 / num_windows)
    quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, seen - 1))
    return bool(difference.mean() > quantile * standard_error)


def _compare(losses: FloatArray, base_losses: FloatArray) -> tuple[float, float | None]:
    if not np.isfinite(losses).all():
        return math.nan, None
    paired = compute_paired_delta(losses.tolist(), base_losses.tolist())
    return paired.delta, paired.standard_error
