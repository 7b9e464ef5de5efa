"""The proxy after repair: every plan is refitted in closed form before its losses are measured.

What a refit does to a group depends on the plan up to that group alone, as do the hidden states there. So the states
that a prefix cache keeps under the variant ``refit`` are right for every plan that begins alike.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lpsearch.data import Windows
from lpsearch.errors import DataError, LpsearchError, describe_error
from lpsearch.evaluation import ModelEvaluator, WindowLosses
from lpsearch.evaluation.losses import REFIT
from lpsearch.evaluation.prefix_cache import choose_cache_bytes
from lpsearch.models.families import build_blocks
from lpsearch.plan import Plan
from lpsearch.recovery.projections import find_widest_input
from lpsearch.recovery.refit import VALIDATION_EVERY, Refitter, swapped_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["RefitEvaluator", "build_search_refitter", "choose_num_calibration_windows", "split_cache_bytes"]

logger = logging.getLogger(__name__)

CALIBRATION_SHARE = 0.25
"""Calibration windows for each proxy window; more cost more than an evaluation does (studies/LOG.md)."""

SEARCH_RIDGES = (1.0,)
"""The ridge of a search's refits, as a share of the mean square of an input; none is fitted where it does not help.

With little text smaller ones lower the error of hidden states and raise the loss (studies/LOG.md).
"""

_KEPT_FITS = 4
"""Plans whose weights are kept: racing asks for a plan several times, while few others are evaluated."""


def choose_num_calibration_windows(
    model: PreTrainedModel, *, num_windows: int, num_kinds: int, seq_len: int, max_group: int
) -> int:
    """Choose how many windows of each kind of text the plans of a search are refitted on.

    A quarter of those that plans are evaluated on, but enough for the widest product of a group, and one to validate.

    Args:
        model: the unmodified model.
        num_windows: evaluation windows of each kind.
        num_kinds: kinds of text.
        seq_len: tokens in a window.
        max_group: most layers in a group; 1 where plans do not join.
    """
    num_inputs = max_group * find_widest_input(build_blocks(model))
    num_fitted = -(-num_inputs // seq_len)
    needed = -(-num_fitted * VALIDATION_EVERY // (VALIDATION_EVERY - 1)) + 1
    least = max(VALIDATION_EVERY, needed)
    return max(round(CALIBRATION_SHARE * num_windows), -(-least // num_kinds))


def split_cache_bytes(device: torch.device) -> tuple[int, int]:
    """Choose the budgets of an evaluator's and of a refitter's cache; the memory of a GPU is halved between them."""
    budget = choose_cache_bytes(device)
    return (budget, budget) if device.type == "cpu" else (budget // 2, budget // 2)


def build_search_refitter(model: PreTrainedModel, windows: Windows, *, cache_bytes: int) -> Refitter:
    """Build what fits every plan of a search: the groups that it changes alone, in one walk.

    The plans of the front are worth more: ``lpsearch recover`` also fits what branches read and the single layers
    behind a group, and chooses the ridge of each product. Here that would cost more than a trial does (studies/LOG.md).

    Args:
        model: the unmodified model.
        windows: to calibrate on.
        cache_bytes: most bytes to keep between fits.
    """
    return Refitter(
        model,
        windows,
        extent="grouped",
        num_passes=1,
        ridges=SEARCH_RIDGES,
        fits_inputs=False,
        cache_bytes=cache_bytes,
    )


class RefitEvaluator:
    """Evaluates plans after their refit; a :class:`~lpsearch.evaluation.PlanEvaluator`.

    The unmodified model is evaluated as it is, since there is nothing to refit. Its hidden states are kept under the
    same variant, for every plan begins with them.

    Args:
        model: the unmodified model, which ``evaluator`` and ``refitter`` were built with.
        evaluator: evaluates on the windows that it holds.
        refitter: fits on other windows.
    """

    def __init__(self, *, model: PreTrainedModel, evaluator: ModelEvaluator, refitter: Refitter) -> None:
        self._model = model
        self._evaluator = evaluator
        self._refitter = refitter
        self._fits: OrderedDict[Plan, Mapping[str, Tensor]] = OrderedDict()
        self._has_warned = False

    @property
    def num_windows(self) -> int:
        """Number of windows that ``window_indices`` may name."""
        return self._evaluator.num_windows

    def evaluate_windows(self, plan: Plan, window_indices: Sequence[int]) -> WindowLosses:
        """Refit a plan, and evaluate it on some of the windows with the new weights.

        Args:
            plan: a plan for the evaluator's model.
            window_indices: which windows, each in ``[0, num_windows)``.

        Returns:
            One loss a window, in the order of ``window_indices``.

        Raises:
            IndexError: for a window that does not exist.
            DataError: if the text to calibrate on is too little for a group.
            LpsearchError: if the device runs out of memory.
        """
        self._evaluator.remember_base(window_indices)
        with swapped_weights(self._model, self._fit(plan) if plan.num_joins or plan.num_dropped else {}):
            return self._evaluator.evaluate_windows(plan.without_metadata(), window_indices, variant=REFIT)

    def _fit(self, plan: Plan) -> Mapping[str, Tensor]:
        weights = self._fits.get(plan)
        if weights is None:
            weights = self._fit_in_memory(plan)
            self._fits[plan] = weights
            if len(self._fits) > _KEPT_FITS:
                self._fits.popitem(last=False)
        self._fits.move_to_end(plan)
        return weights

    def _fit_in_memory(self, plan: Plan) -> Mapping[str, Tensor]:
        """Fit, and again without what is kept between fits where the device runs out of memory."""
        while True:
            try:
                refit = self._refitter.fit(plan)
            except torch.OutOfMemoryError as error:
                message = describe_error(error)
            except DataError as error:
                raise DataError(f"--recover refit: {error}; or a smaller --max-group") from None
            else:
                break
            # Outside the handler, whose traceback holds on to the tensors of the failed walk.
            if not self._refitter.clear_cache():
                raise LpsearchError(
                    f"{self._model.device} ran out of memory in a refit ({message}); lower --seq-len or --windows, or "
                    "use --dtype bfloat16 or a larger device"
                )
            logger.warning(
                "%s ran out of memory; every refit walks from the first layer from now on", self._model.device
            )
        if refit.not_fitted and not self._has_warned:
            self._has_warned = True
            logger.warning("%s has no output projection that could be fitted; it stays as it is", refit.not_fitted[0])
        return refit.weights
