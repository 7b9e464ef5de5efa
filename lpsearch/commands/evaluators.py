"""What evaluates the plans of a search: the model as it is, or after a refit of each plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lpsearch.config import CacheLocation, Metric, Split
from lpsearch.evaluation.losses import RAW, REFIT, PlanEvaluator, Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lpsearch.data import Windows
    from lpsearch.evaluation import ModelEvaluator

__all__ = ["Evaluators"]


class Evaluators:
    """The evaluators of one search, which share the model and what is kept of refits.

    Attributes:
        variant: what is done to the weights of every plan but the unmodified model.
        raw: evaluates on the proxy windows without repair.
        proxy: evaluates on the proxy windows as the search does.

    Args:
        model: the unmodified model.
        windows: what is evaluated on, by split.
        metric: the loss that is searched.
        calibration: what plans are refitted on; None without repair.
        cache_location: where hidden states are kept for further plans.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Mapping[Split, Windows],
        *,
        metric: Metric,
        calibration: Windows | None,
        cache_location: CacheLocation = "device",
    ) -> None:
        from lpsearch.evaluation import ModelEvaluator

        self._model = model
        self._windows = windows
        self._metric: Metric = metric
        self._cache_location: CacheLocation = cache_location
        self._refitter = None
        cache_bytes = None
        if calibration is not None:
            from lpsearch.recovery.evaluator import build_search_refitter, split_cache_bytes

            cache_bytes, refit_bytes = split_cache_bytes(model.device)
            cache_bytes = cache_bytes if cache_location == "device" else None
            self._refitter = build_search_refitter(model, calibration, cache_bytes=refit_bytes)
        self.variant: Variant = RAW if self._refitter is None else REFIT
        self.raw = ModelEvaluator(
            model=model,
            windows=windows["proxy"],
            metric=metric,
            cache_bytes=cache_bytes,
            cache_location=cache_location,
        )
        self.proxy = self._repair(self.raw)

    def build_heldout(self) -> tuple[PlanEvaluator, PlanEvaluator]:
        """Return what evaluates on the held-out windows as the search does, and without repair.

        The hidden states of the proxy windows make room for them.
        """
        from lpsearch.evaluation import ModelEvaluator

        self.raw.clear_cache()
        raw = ModelEvaluator(
            model=self._model,
            windows=self._windows["heldout"],
            metric=self._metric,
            cache_location=self._cache_location,
        )
        return self._repair(raw), raw

    def _repair(self, evaluator: ModelEvaluator) -> PlanEvaluator:
        if self._refitter is None:
            return evaluator
        from lpsearch.recovery import RefitEvaluator

        return RefitEvaluator(model=self._model, evaluator=evaluator, refitter=self._refitter)
