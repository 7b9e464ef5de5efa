"""Racing of windows: a plan is evaluated on more of them only while it may still be on the front.

A plan is first evaluated on the first rung of the windows (:mod:`lpsearch.evaluation.rungs`), and on the next one
only until a plan that is known clearly beats it: its *rival*, the best plan known that saves at least as much. The two
are compared on the windows that both have. Paired like this, what makes a window hard for every plan cancels, so few
windows already tell many plans apart. Of several kinds of text every rung holds as many windows of each.

Racing is due to Maron and Moore (Hoeffding Races, NIPS 1993); comparing in pairs, block by block, is that of F-race
(Birattari et al., A Racing Algorithm for Configuring Metaheuristics, GECCO 2002). Here a plan races the incumbent of
the front alone, and the bound is that of a t-test over a finite number of windows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from lpsearch.config import Split
from lpsearch.evaluation.losses import RAW, Metric, PlanEvaluator, PlanLosses, Variant, WindowLosses
from lpsearch.evaluation.rungs import split_by_rung
from lpsearch.kinds import TextKind, normalise_weights
from lpsearch.plan import Plan
from lpsearch.search.claims import POLL_S, ClaimLostError
from lpsearch.search.cost import Loss, compute_loss, split_by_kind
from lpsearch.search.interrupts import hold_back_interrupts, let_interrupts_through
from lpsearch.search.losses import State, choose_variant
from lpsearch.search.pool import Pool
from lpsearch.search.store import StudyStore

__all__ = [
    "Racing",
    "StoredEvaluation",
    "evaluate_stored_plan",
    "evaluate_stored_plans",
    "is_mean_beaten",
    "is_worst_kind_beaten",
]

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
        kinds: the kinds of text whose windows are interleaved; none or one where all are alike.
        worst_case: compare plans by their worst kind, not by their mean.
        variant: what was done to the weights of every plan but the unmodified model.
    """

    def __init__(
        self,
        store: StudyStore,
        *,
        num_windows: int,
        metric: Metric,
        staged: bool,
        kinds: Sequence[TextKind] = (),
        worst_case: bool = False,
        variant: Variant = RAW,
    ) -> None:
        self._store = store
        self._num_windows = num_windows
        self._metric: Metric = metric
        self._staged = staged
        self._kinds = tuple(kinds)
        self._num_kinds = max(1, len(self._kinds))
        self._worst_case = worst_case
        self._variant = variant
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
            self._store.losses.record_state(plan, state, variant=choose_variant(plan, self._variant))
            return []
        missing = np.flatnonzero(~self._get(plan).seen).tolist()
        return split_by_rung(missing, self._num_windows, self._num_kinds)[0] if self._staged else missing

    def keep(self, plan: Plan, window_indices: list[int], losses: WindowLosses) -> None:
        """Keep losses of a plan on windows that it had none on.

        Args:
            plan: the plan that was evaluated.
            window_indices: the windows, in the order of ``losses``.
            losses: one value a window.
        """
        known = self._get(plan)
        variant = choose_variant(plan, self._variant)
        self._store.losses.record(plan, window_indices, losses, split="proxy", variant=variant)
        known.keep(window_indices, losses)

    def get_state(self, plan: Plan) -> State:
        """Return the state of a plan that needed no more windows when it was last asked for."""
        return self._states[plan]

    def forget(self, plan: Plan) -> None:
        """Read the losses of a plan anew when they are next needed: another coordinator may have added some."""
        self._losses.pop(plan, None)

    def compute_loss(self, plan: Plan) -> Loss:
        """Return the loss of a plan that has losses on some windows; the unmodified model has them on all."""
        return compute_loss(
            self._get(plan),
            self._get(Plan.baseline(plan.num_layers)),
            metric=self._metric,
            kinds=self._kinds,
            worst_case=self._worst_case,
        )

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
        return "stopped" if self._is_beaten(losses, rival) else None

    def _is_beaten(self, losses: PlanLosses, rival: Plan) -> bool:
        """Compare a plan on its windows with a rival that has all windows."""
        rival_losses = self._get(rival)
        differences = [
            losses.get_costs(self._metric, seen) - rival_losses.get_costs(self._metric, seen)
            for seen in split_by_kind(losses.seen, self._num_kinds)
        ]
        num_windows = self._num_windows // self._num_kinds
        if not self._worst_case or self._num_kinds == 1:
            weights = normalise_weights(self._kinds) if self._kinds else (1.0,)
            return is_mean_beaten(differences, weights=weights, num_windows=num_windows)
        loss = self.compute_loss(rival)
        offsets = [part.loss.get_cost(self._metric) - loss.get_cost(self._metric) for part in loss.by_kind]
        return is_worst_kind_beaten(differences, offsets=offsets, num_windows=num_windows)

    def _get(self, plan: Plan) -> PlanLosses:
        if plan not in self._losses:
            variant = choose_variant(plan, self._variant)
            known = self._store.losses.load_known(plan, split="proxy", num_windows=self._num_windows, variant=variant)
            self._losses[plan] = PlanLosses.build(self._num_windows, *known)
        return self._losses[plan]


def is_mean_beaten(differences: Sequence[FloatArray], *, weights: Sequence[float], num_windows: int) -> bool:
    """Say whether a plan's mean cost over all windows is above its rival's, as far as some of the windows tell.

    The windows seen of a kind are taken as drawn without replacement from all of it, so the standard error of its mean
    paired difference has the factor ``sqrt(1 - seen / num_windows)``, and its quantiles are Student's (Cochran,
    Sampling Techniques, sections 2.6 and 2.8). The mean over kinds is a stratified one: its error is that of section
    5.3, with the effective degrees of freedom of section 5.4 (Satterthwaite 1946).

    Args:
        differences: of each kind of text, (seen,) costs of the plan minus those of its rival, nats per token.
        weights: of the kinds; their sum is one.
        num_windows: windows of a kind in total.
    """
    if any(len(difference) < 2 for difference in differences):
        return False
    means, errors = [], []
    for weight, difference in zip(weights, differences, strict=True):
        means.append(weight * float(difference.mean()))
        errors.append(weight * _estimate_error(difference, num_windows))
    standard_error = math.hypot(*errors)
    degrees: float = len(differences[0]) - 1
    if len(differences) > 1 and standard_error > 0:
        shares = [(error / standard_error) ** 4 for error in errors]
        degrees = 1 / math.fsum(share / (len(seen) - 1) for share, seen in zip(shares, differences, strict=True))
    return math.fsum(means) > float(stdtrit(degrees, 0.5 + CONFIDENCE / 2)) * standard_error


def is_worst_kind_beaten(differences: Sequence[FloatArray], *, offsets: Sequence[float], num_windows: int) -> bool:
    """Say whether a plan's cost on its worst kind of text is above its rival's on that of the rival.

    A plan has lost once it is clearly above the rival's worst cost on any kind. The rival's costs are known on all
    windows, so on each kind the paired difference and the rival's own distance from its worst kind add up to the plan's
    distance (a difference estimator: Cochran, section 7.2), and only the difference has an error. It is judged as in
    :func:`is_mean_beaten`, at a level divided by the number of kinds (Bonferroni), so that more kinds do not stop more
    plans that would have won.

    Args:
        differences: of each kind, (seen,) costs of the plan minus those of its rival, nats per token.
        offsets: of each kind, the rival's mean cost on all windows minus that on its worst kind; at most 0.
        num_windows: windows of a kind in total.
    """
    level = (1 - CONFIDENCE) / 2 / len(differences)
    return any(
        float(difference.mean()) + offset
        > float(stdtrit(len(difference) - 1, 1 - level)) * _estimate_error(difference, num_windows)
        for difference, offset in zip(differences, offsets, strict=True)
        if len(difference) >= 2
    )


def _estimate_error(difference: FloatArray, num_windows: int) -> float:
    """Return the standard error of the mean of (seen,) values of a finite number of windows."""
    return float(difference.std(ddof=1)) * math.sqrt(1 / len(difference) - 1 / num_windows)


@dataclass(frozen=True)
class StoredEvaluation:
    """Losses of a plan on all windows of an evaluator.

    Attributes:
        losses: one value a window, in the order of the windows.
        num_new_tokens: tokens that were evaluated now; the others were in the store.
    """

    losses: WindowLosses
    num_new_tokens: int


@hold_back_interrupts()
def evaluate_stored_plan(
    store: StudyStore, evaluator: PlanEvaluator, plan: Plan, *, split: Split = "proxy", variant: Variant = RAW
) -> StoredEvaluation:
    """Evaluate a plan on the windows that the store has no losses for, and keep them there.

    Where another coordinator of the study does just that, wait for it.

    Args:
        store: the study's database; the study has begun.
        evaluator: holds the windows of ``split``.
        plan: a plan for the evaluator's model.
        split: which windows these are.
        variant: what the evaluator does to the weights of every plan but the unmodified model.
    """
    keeper = _Keeper(store, num_windows=evaluator.num_windows, split=split, variant=variant)
    while not keeper.is_known(plan):
        if not keeper.claim(plan):
            with let_interrupts_through():  # another coordinator evaluates the plan
                time.sleep(POLL_S)
            continue
        with suppress(ClaimLostError):
            try:
                missing = keeper.find_missing(plan)
                if missing:
                    with let_interrupts_through():
                        losses = evaluator.evaluate_windows(plan, missing)
                    keeper.keep(plan, missing, losses)
            finally:
                keeper.give_back(plan)
    return keeper.load(plan)


@hold_back_interrupts()
def evaluate_stored_plans(
    store: StudyStore,
    pool: Pool,
    plans: Sequence[Plan],
    *,
    split: Split = "proxy",
    variant: Variant = RAW,
    on_plan: Callable[[int], None] | None = None,
) -> list[StoredEvaluation]:
    """Evaluate plans in a pool on the windows that the store has no losses for, and keep them there.

    Args:
        store: the study's database; the study has begun.
        pool: evaluates on the windows of ``split``; every slot is at work until the last plans.
        plans: plans for its model, each once.
        split: which windows these are.
        variant: what is done to the weights of every plan but the unmodified model.
        on_plan: called with the number of plans that have all their losses.

    Returns:
        One evaluation a plan, in the order of ``plans``.
    """
    keeper = _Keeper(store, num_windows=pool.num_windows, split=split, variant=variant)
    waiting = list(plans)
    running: dict[Future[WindowLosses], tuple[Plan, list[int]]] = {}
    num_ended = 0
    try:
        while waiting or running:
            for plan in [plan for plan in waiting if keeper.is_known(plan)]:
                waiting.remove(plan)
                num_ended += 1
                if on_plan is not None:
                    on_plan(num_ended)
            for plan in [plan for plan in waiting if keeper.claim(plan)]:
                missing = keeper.find_missing(plan)
                if not missing:  # another coordinator ended it in between
                    keeper.give_back(plan)
                    continue
                waiting.remove(plan)
                running[pool.submit(plan, missing)] = plan, missing
            # While another coordinator has plans that are waited for, it is looked at again and again.
            if not running:
                with let_interrupts_through():
                    time.sleep(POLL_S if waiting else 0)
                continue
            with let_interrupts_through():
                ended = wait(running, timeout=POLL_S if waiting else None, return_when=FIRST_COMPLETED).done
            for future in ended:
                plan, missing = running.pop(future)
                try:
                    with suppress(ClaimLostError):
                        keeper.keep(plan, missing, future.result())
                finally:
                    keeper.give_back(plan)
                waiting.append(plan)
    finally:
        for plan, _ in running.values():
            keeper.give_back(plan)
    return [keeper.load(plan) for plan in plans]


class _Keeper:
    """Keeps what is evaluated of plans on all windows of a split, of which this process has claimed them."""

    def __init__(self, store: StudyStore, *, num_windows: int, split: Split, variant: Variant) -> None:
        self._store = store
        self._num_windows = num_windows
        self._split: Split = split
        self._variant = variant
        self._num_new_tokens: dict[Plan, int] = {}

    def is_known(self, plan: Plan) -> bool:
        """Say whether a plan has all its losses."""
        return self._read(plan) is not None

    def claim(self, plan: Plan) -> bool:
        """Claim a plan; False if another coordinator has it."""
        return self._store.claims.take(self._name_subject(plan))

    def give_back(self, plan: Plan) -> None:
        """Give back the claim on a plan."""
        self._store.claims.give_back(self._name_subject(plan))

    def find_missing(self, plan: Plan) -> list[int]:
        """Return the windows that a plan has no losses on."""
        variant = choose_variant(plan, self._variant)
        evaluated = self._store.losses.find_evaluated_windows(plan, split=self._split, variant=variant)
        return [window_idx for window_idx in range(self._num_windows) if window_idx not in evaluated]

    def keep(self, plan: Plan, missing: list[int], losses: WindowLosses) -> None:
        """Keep the losses of a plan on the windows that it lacked.

        Raises:
            ClaimLostError: if another coordinator took the plan over.
        """
        variant = choose_variant(plan, self._variant)
        self._store.losses.record(plan, missing, losses, split=self._split, variant=variant)
        self._num_new_tokens[plan] = losses.tokens_per_window * len(missing)
        if self._split == "proxy":
            is_finite = all(map(math.isfinite, (*losses.nll_nats_per_token, *(losses.kl_nats_per_token or ()))))
            self._store.losses.record_state(plan, "complete" if is_finite else "broken", variant=variant)

    def load(self, plan: Plan) -> StoredEvaluation:
        """Return the losses of a plan that has them all."""
        stored = self._read(plan)
        assert stored is not None
        return StoredEvaluation(stored, self._num_new_tokens.get(plan, 0))

    def _read(self, plan: Plan) -> WindowLosses | None:
        variant = choose_variant(plan, self._variant)
        return self._store.losses.load(plan, num_windows=self._num_windows, split=self._split, variant=variant)

    def _name_subject(self, plan: Plan) -> str:
        return self._store.losses.name_subject(plan, split=self._split, variant=choose_variant(plan, self._variant))
