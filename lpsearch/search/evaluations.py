"""Evaluating a plan through the store: what is known is read, what is missing is evaluated and kept."""

from __future__ import annotations

from dataclasses import dataclass

from lpsearch.evaluation.losses import PlanEvaluator, WindowLosses
from lpsearch.plan import Plan
from lpsearch.search.store import Split, StudyStore

__all__ = ["StoredEvaluation", "evaluate_stored_plan"]


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
    evaluated = store.find_evaluated_windows(plan, split=split)
    missing = [window_idx for window_idx in range(num_windows) if window_idx not in evaluated]
    num_new_tokens = 0
    if missing:
        losses = evaluator.evaluate_windows(plan, missing)
        store.record_losses(plan, missing, losses, split=split)
        num_new_tokens = losses.tokens_per_window * len(missing)
    stored = store.load_losses(plan, num_windows=num_windows, split=split)
    assert stored is not None
    return StoredEvaluation(stored, num_new_tokens)
