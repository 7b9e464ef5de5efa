"""Racing of windows: a plan is evaluated on more of them only while it may still be on the front.

A plan is first evaluated on the first rung of the windows (:mod:`lpsearch.evaluation.rungs`), and on the next one
only until a plan that is known clearly beats it: its *rival*, the best plan known that saves at least as much. The two
are compared on the windows that both have. Paired like this, what makes a window hard for every plan cancels, so few
windows already tell many plans apart.

Racing is due to Maron and Moore (Hoeffding Races, NIPS 1993); comparing in pairs, block by block, is that of F-race
(Birattari et al., A Racing Algorithm for Configuring Metaheuristics, GECCO 2002). Here a plan races the incumbent of
the front alone, and the bound is that of a t-test over a finite number of windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lpsearch.config import Split
from lpsearch.evaluation.losses import Metric, PlanEvaluator, PlanLosses, WindowLosses
from lpsearch.evaluation.rungs import split_by_rung
from lpsearch.plan import Plan
from lpsearch.search.results import Loss, State, compute_loss
from lpsearch.search.store import StudyStore

__all__ = ["Racing", "StoredEvaluation", "evaluate_stored_plan", "is_beaten"]

FloatArray = NDArray[np.float64]

CONFIDENCE = 0.95
"""Of the two-sided interval of a plan's loss against its rival's; a plan stops where it lies above zero."""


class Racing:
    """Losses by plan and window, in the store and in memory, and how far each plan was evaluated.

    Not safe for several threads.

    Args:
        store: keeps them.
        num_windows: windows in total.
        metric: the loss that plans are compared by.
        staged: stop evaluating a plan that its rival beats; False has every plan evaluated on all windows.
    """

    def __init__(self, store: StudyStore, *, num_windows: int, metric: Metric, staged: bool) -> None:
        self._store = store
        self._num_windows = num_windows
        self._metric: Metric = metric
        self._staged = staged
        self._losses: dict[Plan, PlanLosses] = {}
        self._states: dict[Plan, State] = {}

    def find_next_windows(self, plan: Plan, *, rival: Plan | None) -> list[int]:
        """Return the windows to evaluate a plan on next, of one rung; none if it has all, or has lost.

        Where it needs no more, its state is settled and kept.

        Args:
            plan: the plan.
            rival: a plan with losses on all windows that saves at least as much as this one; None if there is none,
                and for a plan that is to have all windows.
        """
        state = self._judge(plan, rival)
        if state is not None:
            self._states[plan] = state
            self._store.losses.record_state(plan, state)
            return []
        missing = np.flatnonzero(~self._get(plan).seen).tolist()
        return split_by_rung(missing, self._num_windows)[0] if self._staged else missing

    def keep(self, plan: Plan, window_indices: list[int], losses: WindowLosses) -> None:
        """Keep losses of a plan on windows that it had none on.

        Args:
            plan: the plan that was evaluated.
            window_indices: the windows, in the order of ``losses``.
            losses: one value a window.
        """
        known = self._get(plan)
        self._store.losses.record(plan, window_indices, losses, split="proxy")
        known.keep(window_indices, losses)

    def get_state(self, plan: Plan) -> State:
        """Return the state of a plan that needed no more windows when it was last asked for."""
        return self._states[plan]

    def compute_loss(self, plan: Plan) -> Loss:
        """Return the loss of a plan that has losses on some windows; the unmodified model has them on all."""
        return compute_loss(self._get(plan), self._get(Plan.baseline(plan.num_layers)), metric=self._metric)

    def _judge(self, plan: Plan, rival: Plan | None) -> State | None:
        """Return how the evaluation of a plan ended; None where it goes on."""
        losses = self._get(plan)
        costs = losses.get_costs(self._metric)
        is_broken = not np.isfinite(costs).all()
        if losses.seen.all():
            return "broken" if is_broken else "complete"
        if not self._staged or not len(costs) or rival is None:
            return None
        if is_broken:
            return "broken"
        rival_costs = self._get(rival).get_costs(self._metric, losses.seen)
        return "stopped" if is_beaten(costs, rival_costs, num_windows=self._num_windows) else None

    def _get(self, plan: Plan) -> PlanLosses:
        if plan not in self._losses:
            known = self._store.losses.load_known(plan, split="proxy", num_windows=self._num_windows)
            self._losses[plan] = PlanLosses.build(self._num_windows, *known)
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


@dataclass(frozen=True)
class StoredEvaluation:
    """Losses of a plan on all windows of an evaluator.

    Attributes:
        losses: one value a window, in the order of the windows.
        num_new_tokens: tokens that were evaluated now; the others were in the store.
    """

    losses: WindowLosses
    num_new_tokens: int


def evaluate_stored_plan(
    store: StudyStore, evaluator: PlanEvaluator, plan: Plan, *, split: Split = "proxy"
) -> StoredEvaluation:
    """Evaluate a plan on the windows that the store has no losses for, and keep them there.

    Args:
        store: the study's database; the study has begun.
        evaluator: holds the windows of ``split``.
        plan: a plan for the evaluator's model.
        split: which windows these are.
    """
    num_windows = evaluator.num_windows
    evaluated = store.losses.find_evaluated_windows(plan, split=split)
    missing = [window_idx for window_idx in range(num_windows) if window_idx not in evaluated]
    num_new_tokens = 0
    if missing:
        losses = evaluator.evaluate_windows(plan, missing)
        store.losses.record(plan, missing, losses, split=split)
        num_new_tokens = losses.tokens_per_window * len(missing)
        if split == "proxy":
            is_finite = all(map(math.isfinite, (*losses.nll_nats_per_token, *(losses.kl_nats_per_token or ()))))
            store.losses.record_state(plan, "complete" if is_finite else "broken")
    stored = store.losses.load(plan, num_windows=num_windows, split=split)
    assert stored is not None
    return StoredEvaluation(stored, num_new_tokens)
