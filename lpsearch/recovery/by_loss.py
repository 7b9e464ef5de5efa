"""A refit whose smallest ridge is chosen by the loss, on windows that no fit saw.

A ridge that is chosen by the error of hidden states comes out too small: the error counts every direction alike, and
the loss does not (studies/LOG.md). So the plan is fitted several times, each time with larger ridges to choose from,
and the divergence of its predictions from the unmodified model's decides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
from transformers import PreTrainedModel

from lpsearch.data import Windows
from lpsearch.errors import DataError
from lpsearch.evaluation import ModelEvaluator
from lpsearch.plan import Plan
from lpsearch.recovery.refit import RIDGES, Extent, Refit, Refitter, swapped_weights

__all__ = ["refit_by_loss", "split_validation"]

logger = logging.getLogger(__name__)

VALIDATION_SHARE = 16
"""One window in so many of each kind of text is kept from the fits."""


def split_validation(windows: Windows) -> tuple[Windows, Windows]:
    """Keep the last windows of each kind of text from what weights are fitted to or trained on.

    Args:
        windows: of one or several kinds.

    Returns:
        The windows to fit to, and at least one of each kind to choose by.

    Raises:
        DataError: if there is only one window of a kind.
    """
    parts = windows.split_kinds()
    fewest = min(part.num_windows for part in parts)
    if fewest < 2:
        raise DataError(f"{fewest} window of each kind of text leaves none to choose by; give more (--windows)")
    num_kept = fewest - max(1, fewest // VALIDATION_SHARE)
    weights = [kind.weight for kind in windows.kinds]
    fitted, validation = (
        Windows.interleave([Windows(part.input_ids[rows], part.spec, part.provenance) for part in parts], weights)
        for rows in (slice(num_kept), slice(num_kept, fewest))
    )
    return fitted, validation


def refit_by_loss(
    model: PreTrainedModel,
    plan: Plan,
    windows: Windows,
    validation: Windows,
    *,
    num_passes: int = 1,
    extent: Extent = "after",
    ridges: Sequence[float] = RIDGES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Refit:
    """Fit a plan with larger and larger ridges until its loss no longer falls; never worse than nothing.

    Args:
        model: the unmodified model.
        plan: for the model.
        windows: to fit to.
        validation: other windows, to choose by.
        num_passes: walks of each fit.
        extent: as for :class:`~lpsearch.recovery.refit.Refitter`.
        ridges: to choose from, rising; each fit has one less than the fit before.
        on_progress: called with groups done and groups in all, were every fit made.

    Returns:
        The fit of the lowest KL(base || plan) on the validation windows; one without weights where none lowers it.

    Raises:
        PlanError: if the plan is for another model, changes nothing, or leaves nothing to fit.
        DataError: if there are too few windows.
        LpsearchError: if the device has too little memory for the sums.
    """
    evaluator = ModelEvaluator(model=model, windows=validation, metric="kl", cache_bytes=0)
    bare = plan.without_metadata()
    refits: list[Refit] = []
    losses: list[float] = []
    for number in range(len(ridges)):
        refitter = Refitter(model, windows, num_passes=num_passes, extent=extent, ridges=ridges[number:])

        def report(done: int, total: int, number: int = number) -> None:
            on_progress(number * total + done, len(ridges) * total)

        refit = refitter.fit(plan, on_progress=report)
        del refitter
        if not losses:
            evaluator.remember_base(range(evaluator.num_windows))
            losses.append(_measure(evaluator, bare, "untouched"))
        with swapped_weights(model, refit.weights):
            loss = _measure(evaluator, bare, f"ridges from {ridges[number]}")
        logger.info("ridges from %g: KL %.4f nats per token on validation windows", ridges[number], loss)
        if not loss < min(losses[1:], default=float("inf")):
            break
        refits.append(refit)
        losses.append(loss)
    on_progress(1, 1)
    if not refits or losses[-1] >= losses[0]:
        return Refit({}, refits[-1].products if refits else (), refits[-1].not_fitted if refits else ())
    return refits[-1]


def _measure(evaluator: ModelEvaluator, plan: Plan, variant: str) -> float:
    """Return the mean KL(base || plan), nats per token, with the weights that the model has now."""
    losses = evaluator.evaluate_windows(plan, range(evaluator.num_windows), variant=variant).kl_nats_per_token
    assert losses is not None
    return float(np.mean(losses))
