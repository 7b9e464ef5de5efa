"""What an evaluator returns and what the search asks of it; imports no torch, so that a search can replay a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lpsearch.plan import Plan

__all__ = ["PairedDelta", "PlanEvaluator", "WindowLosses", "compute_paired_delta"]


@dataclass(frozen=True)
class WindowLosses:
    """Losses of one plan on some windows, one value a window, each the mean over the window's predicted tokens.

    Attributes:
        nll_nats_per_token: negative log-likelihood in nats per token, one a window.
        kl_nats_per_token: KL(base || plan) over the whole vocabulary in nats per token, one a window; None unless the
            evaluator was built to measure it.
        tokens_per_window: predicted tokens in each window, the same for all.
    """

    nll_nats_per_token: tuple[float, ...]
    kl_nats_per_token: tuple[float, ...] | None
    tokens_per_window: int


class PlanEvaluator(Protocol):
    """Anything that can say how good a plan is on the windows it holds: a model, a table, a remote worker."""

    @property
    def num_windows(self) -> int:
        """Number of windows that ``window_indices`` may name."""

    def evaluate_windows(self, plan: Plan, window_indices: Sequence[int]) -> WindowLosses:
        """Evaluate a plan on some of the windows.

        Args:
            plan: a plan for the evaluator's model.
            window_indices: which windows, each in ``[0, num_windows)``.

        Returns:
            One loss a window, in the order of ``window_indices``.
        """


@dataclass(frozen=True)
class PairedDelta:
    """Mean difference of two plans on the same windows.

    Attributes:
        delta: mean of the differences, nats per token.
        standard_error: of that mean, over windows; None for a single window.
    """

    delta: float
    standard_error: float | None


def compute_paired_delta(plan_losses: Sequence[float], base_losses: Sequence[float]) -> PairedDelta:
    """Compute the mean paired difference and its standard error over windows.

    Args:
        plan_losses: nats per token of the plan, one a window.
        base_losses: nats per token of the unmodified model on the same windows, in the same order.

    Raises:
        ValueError: if the two differ in length or are empty.
    """
    if len(plan_losses) != len(base_losses) or not plan_losses:
        raise ValueError(
            f"paired losses need the same windows, got {len(plan_losses)} of the plan, {len(base_losses)} of the base"
        )
    differences = np.asarray(plan_losses, dtype=np.float64) - np.asarray(base_losses, dtype=np.float64)
    if len(differences) == 1:
        return PairedDelta(float(differences[0]), None)
    standard_error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return PairedDelta(float(differences.mean()), standard_error)
