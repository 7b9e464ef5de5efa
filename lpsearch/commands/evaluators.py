"""What evaluates the plans of a search: the model as it is, or after a refit of each plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from lpsearch.config import CacheLocation, Metric
from lpsearch.evaluation.losses import RAW, REFIT, PlanEvaluator, Variant, WindowLosses
from lpsearch.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lpsearch.config import Split
    from lpsearch.data import Windows
    from lpsearch.evaluation import ModelEvaluator

__all__ = ["EvaluatorName", "Evaluators", "NamedEvaluator", "choose_search_variant"]

EvaluatorName = Literal["proxy", "raw", "heldout", "raw_heldout"]
"""On the proxy windows as the search evaluates, and without repair; on the held-out windows likewise."""


def choose_search_variant(calibration: Windows | None) -> Variant:
    """Return what a search does to the weights of every plan but the unmodified model.

    Args:
        calibration: what plans are refitted on; None without repair.
    """
    return RAW if calibration is None else REFIT


class NamedEvaluator:
    """An evaluator that is built when it is first used; a :class:`~lpsearch.evaluation.PlanEvaluator`.

    Attributes:
        num_windows: number of windows that it evaluates on.
        device_name: what it evaluates on.

    Args:
        build: builds it, or returns it.
        num_windows: of the evaluator.
        device_name: as results record it.
    """

    def __init__(self, build: Callable[[], PlanEvaluator], *, num_windows: int, device_name: str) -> None:
        self._build = build
        self.num_windows = num_windows
        self.device_name = device_name

    def evaluate_windows(self, plan: Plan, window_indices: Sequence[int]) -> WindowLosses:
        """Evaluate a plan on some of the windows."""
        return self._build().evaluate_windows(plan, window_indices)


class Evaluators:
    """The evaluators of one search in one process, which share the model and what is kept of refits.

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
        self._raw = ModelEvaluator(
            model=model,
            windows=windows["proxy"],
            metric=metric,
            cache_bytes=cache_bytes,
            cache_location=cache_location,
        )
        self._proxy = self._repair(self._raw)
        self._heldout: tuple[PlanEvaluator, PlanEvaluator] | None = None

    def list_named(self, *, device_name: str) -> dict[EvaluatorName, NamedEvaluator]:
        """Return the evaluators by name, that of the search first.

        Args:
            device_name: what they evaluate on, as results record it.
        """
        proxy, heldout = self._windows["proxy"].num_windows, self._windows["heldout"].num_windows
        built: dict[EvaluatorName, tuple[Callable[[], PlanEvaluator], int]] = {
            "proxy": (lambda: self._proxy, proxy),
            "raw": (lambda: self._raw, proxy),
            "heldout": (lambda: self._get_heldout()[0], heldout),
            "raw_heldout": (lambda: self._get_heldout()[1], heldout),
        }
        return {
            name: NamedEvaluator(build, num_windows=num_windows, device_name=device_name)
            for name, (build, num_windows) in built.items()
        }

    def _get_heldout(self) -> tuple[PlanEvaluator, PlanEvaluator]:
        """Return what evaluates on the held-out windows as the search does, and without repair.

        The hidden states of the proxy windows make room for them.
        """
        from lpsearch.evaluation import ModelEvaluator

        if self._heldout is None:
            self._raw.clear_cache()
            raw = ModelEvaluator(
                model=self._model,
                windows=self._windows["heldout"],
                metric=self._metric,
                cache_location=self._cache_location,
            )
            self._heldout = self._repair(raw), raw
        return self._heldout

    def _repair(self, evaluator: ModelEvaluator) -> PlanEvaluator:
        if self._refitter is None:
            return evaluator
        from lpsearch.recovery import RefitEvaluator

        return RefitEvaluator(model=self._model, evaluator=evaluator, refitter=self._refitter)
