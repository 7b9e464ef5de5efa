"""What an evaluator returns and what the search asks of it; imports no torch, so that a search can replay a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lpsearch.config import Metric
from lpsearch.plan import Plan

__all__ = [
    "RAW",
    "REFIT",
    "Metric",
    "PairedDelta",
    "PlanEvaluator",
    "PlanLosses",
    "Variant",
    "WindowLosses",
    "compute_paired_delta",
]

Variant = str
"""What was done to the weights before a loss was measured; losses and hidden states of two variants never mix."""

RAW: Variant = "raw"
"""Nothing: the weights are the model's own."""

REFIT: Variant = "refit"
"""The output projections of the plan's groups were fitted in closed form (:mod:`lpsearch.recovery.refit`)."""


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


@dataclass
class PlanLosses:
    """Losses of one plan by window.

    Attributes:
        seen: (windows,) where the plan has losses; the others are meaningless.
        nll: (windows,) nats per token; nan where one was not finite.
        kl: (windows,) KL(base || plan) in nats per token; None unless it was measured.
        tokens_per_window: tokens behind each.
    """

    seen: NDArray[np.bool_]
    nll: NDArray[np.float64]
    kl: NDArray[np.float64] | None
    tokens_per_window: int

    @classmethod
    def build(
        cls, num_windows: int, window_indices: Sequence[int] = (), losses: WindowLosses | None = None
    ) -> PlanLosses:
        """Build them from the losses on some windows, or without any."""
        built = cls(np.zeros(num_windows, dtype=bool), np.full(num_windows, np.nan), None, tokens_per_window=0)
        if losses is not None and len(window_indices):
            built.keep(window_indices, losses)
        return built

    def keep(self, window_indices: Sequence[int], losses: WindowLosses) -> None:
        """Add losses, in the order of ``window_indices``."""
        chosen = list(window_indices)
        self.seen[chosen] = True
        self.nll[chosen] = _replace_infinite(losses.nll_nats_per_token)
        if losses.kl_nats_per_token is not None:
            if self.kl is None:
                self.kl = np.full(len(self.nll), np.nan)
            self.kl[chosen] = _replace_infinite(losses.kl_nats_per_token)
        self.tokens_per_window = losses.tokens_per_window

    def get_costs(self, metric: Metric, chosen: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
        """Return the losses by which plans are compared, on the ``chosen`` windows, or those that the plan has."""
        chosen = self.seen if chosen is None else chosen
        if metric == "nll":
            return self.nll[chosen]
        return np.full(int(chosen.sum()), np.nan) if self.kl is None else self.kl[chosen]


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


def _replace_infinite(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.array(values, dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan)
