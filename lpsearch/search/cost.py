"""Mean losses of a plan over windows, by kind of text, and the one cost by which plans are compared.

The mean over several kinds is weighted. Its standard error is that of a stratified mean, sqrt(sum_k (w_k se_k)^2)
(Cochran, Sampling Techniques, section 5.3), since the difference between kinds is no error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lpsearch.evaluation.losses import Metric, PlanLosses, compute_paired_delta
from lpsearch.kinds import TextKind, normalise_weights

__all__ = ["KindLoss", "Loss", "compute_loss", "compute_perplexity", "split_by_kind"]


@dataclass(frozen=True)
class Loss:
    """Mean losses of one plan over one set of windows, paired with the unmodified model on the same windows.

    Of several kinds of text, the means are weighted means over the kinds.

    Attributes:
        nll: mean negative log-likelihood over all windows in nats per token; where the plan lacks some, the unmodified
            model's plus ``delta_nll``. nan where a loss was not finite.
        delta_nll: mean of the plan's loss minus the unmodified model's, over the windows that the plan has; nan where a
            loss was not finite.
        delta_nll_se: standard error of ``delta_nll`` over windows; None for a single window, or one of a kind.
        kl_nats_per_token: mean KL(base || plan) over the windows that the plan has; None unless it was measured.
        kl_se: standard error of that mean over windows; None unless it was measured on several.
        num_windows: windows behind these values.
        num_tokens: tokens behind them.
        by_kind: the same of each kind of text, where there are several.
        is_worst_case: the cost is that of the worst kind, not that of the mean.
    """

    nll: float
    delta_nll: float
    delta_nll_se: float | None
    kl_nats_per_token: float | None
    kl_se: float | None
    num_windows: int
    num_tokens: int
    by_kind: tuple[KindLoss, ...] = ()
    is_worst_case: bool = False

    @property
    def perplexity(self) -> float:
        """``exp(nll)``; infinite where the loss was not finite."""
        return compute_perplexity(self.nll)

    def get_cost(self, metric: Metric) -> float:
        """Return the loss that the search minimises: ``delta_nll``, or the KL divergence; inf if it is not finite."""
        loss = self._find_judged(metric)
        cost = loss.delta_nll if metric == "nll" else loss.kl_nats_per_token
        return cost if cost is not None and math.isfinite(cost) else math.inf

    def get_cost_se(self, metric: Metric) -> float | None:
        """Return the standard error of :meth:`get_cost`; of a worst case that of the kind that is worst here."""
        loss = self._find_judged(metric)
        return loss.delta_nll_se if metric == "nll" else loss.kl_se

    def get_told_value(self, metric: Metric) -> float:
        """Return what a trial is told, which orders plans as the cost does.

        Returns:
            The divergence; or the perplexity, of a worst case that of the mean if every kind lost as much as the worst.
        """
        if metric == "kl":
            return self.get_cost("kl")
        if self.is_worst_case and self.by_kind:
            return compute_perplexity(self.nll - self.delta_nll + self.get_cost("nll"))
        return self.perplexity

    def _find_judged(self, metric: Metric) -> Loss:
        """Return the loss that counts: that of the mean, or of the worst kind."""
        if not self.is_worst_case or not self.by_kind:
            return self
        return max((part.loss for part in self.by_kind), key=lambda loss: loss.get_cost(metric))


@dataclass(frozen=True)
class KindLoss:
    """Loss of one plan on one of several kinds of text.

    Attributes:
        kind: the text and its weight in the mean.
        loss: over the windows of this kind.
    """

    kind: TextKind
    loss: Loss


def split_by_kind(seen: NDArray[np.bool_], num_kinds: int) -> list[NDArray[np.bool_]]:
    """Return for each kind which of its windows are ``seen``, each (windows,)."""
    kind_of_window = np.arange(len(seen)) % num_kinds
    return [seen & (kind_of_window == kind) for kind in range(num_kinds)]


def compute_loss(
    losses: PlanLosses,
    base: PlanLosses,
    *,
    metric: Metric,
    kinds: Sequence[TextKind] = (),
    worst_case: bool = False,
) -> Loss:
    """Compute the mean losses of a plan.

    Args:
        losses: of the plan, on some windows, of every kind.
        base: of the unmodified model, on all windows.
        metric: the loss that is searched: a divergence is then measured, even where it was finite on no window.
        kinds: the kinds of text whose windows are interleaved; none or one where all are alike.
        worst_case: the cost is that of the worst kind.
    """
    if len(kinds) <= 1:
        return _compute_mean(losses, base, metric=metric)
    parts = []
    for index, kind in enumerate(kinds):
        of_kind, base_of_kind = (_choose_kind(known, index, len(kinds)) for known in (losses, base))
        parts.append(KindLoss(kind, _compute_mean(of_kind, base_of_kind, metric=metric)))
    weights = normalise_weights(kinds)
    kls = [part.loss.kl_nats_per_token for part in parts]
    return Loss(
        nll=_combine(weights, [part.loss.nll for part in parts]),
        delta_nll=_combine(weights, [part.loss.delta_nll for part in parts]),
        delta_nll_se=_combine_errors(weights, [part.loss.delta_nll_se for part in parts]),
        kl_nats_per_token=None if None in kls else _combine(weights, [kl for kl in kls if kl is not None]),
        kl_se=_combine_errors(weights, [part.loss.kl_se for part in parts]),
        num_windows=sum(part.loss.num_windows for part in parts),
        num_tokens=sum(part.loss.num_tokens for part in parts),
        by_kind=tuple(parts),
        is_worst_case=worst_case,
    )


def compute_perplexity(nll: float) -> float:
    """Return ``exp(nll)``, infinite where that overflows or the loss is not a number."""
    try:
        return math.exp(nll) if not math.isnan(nll) else math.inf
    except OverflowError:
        return math.inf


def _choose_kind(losses: PlanLosses, index: int, num_kinds: int) -> PlanLosses:
    kl = None if losses.kl is None else losses.kl[index::num_kinds]
    return PlanLosses(losses.seen[index::num_kinds], losses.nll[index::num_kinds], kl, losses.tokens_per_window)


def _compute_mean(losses: PlanLosses, base: PlanLosses, *, metric: Metric) -> Loss:
    seen = losses.seen
    num_windows = int(seen.sum())
    delta, delta_se = _compare(losses.nll[seen], base.nll[seen])
    kl, kl_se = (math.nan if metric == "kl" else None), None
    if losses.kl is not None:
        kl, kl_se = _compare(losses.kl[seen], np.zeros(num_windows))
    is_whole = num_windows == len(seen)
    return Loss(
        nll=math.fsum(losses.nll) / num_windows if is_whole else float(base.nll.mean()) + delta,
        delta_nll=delta,
        delta_nll_se=delta_se,
        kl_nats_per_token=kl,
        kl_se=kl_se,
        num_windows=num_windows,
        num_tokens=num_windows * losses.tokens_per_window,
    )


def _compare(losses: NDArray[np.float64], base_losses: NDArray[np.float64]) -> tuple[float, float | None]:
    if not np.isfinite(losses).all():
        return math.nan, None
    paired = compute_paired_delta(losses.tolist(), base_losses.tolist())
    return paired.delta, paired.standard_error


def _combine(weights: Sequence[float], values: Sequence[float]) -> float:
    """Return the weighted mean; nan where a value is."""
    return math.fsum(weight * value for weight, value in zip(weights, values, strict=True))


def _combine_errors(weights: Sequence[float], errors: Sequence[float | None]) -> float | None:
    """Return the standard error of a weighted mean of independent values; None where one is not known."""
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return None
    return math.hypot(*(weight * error for weight, error in zip(weights, known, strict=True)))
