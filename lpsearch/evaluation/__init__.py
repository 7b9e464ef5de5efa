"""How much a plan costs in accuracy; the names below are imported on first use, since search imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lpsearch.evaluation.dtype import DtypeCheck, apply_dtype, choose_dtype
    from lpsearch.evaluation.evaluator import ModelEvaluator
    from lpsearch.evaluation.harness import TaskSuite, load_tasks
    from lpsearch.evaluation.losses import PairedDelta, PlanEvaluator, WindowLosses, compute_paired_delta
    from lpsearch.evaluation.prefix_cache import CacheUsage
    from lpsearch.evaluation.task_scores import TaskMetric, TaskResult
    from lpsearch.evaluation.tasks import evaluate_tasks

__all__ = [
    "CacheUsage",
    "DtypeCheck",
    "ModelEvaluator",
    "PairedDelta",
    "PlanEvaluator",
    "TaskMetric",
    "TaskResult",
    "TaskSuite",
    "WindowLosses",
    "apply_dtype",
    "choose_dtype",
    "compute_paired_delta",
    "evaluate_tasks",
    "load_tasks",
]

_MODULE_OF = {
    "CacheUsage": "prefix_cache",
    "DtypeCheck": "dtype",
    "ModelEvaluator": "evaluator",
    "PairedDelta": "losses",
    "PlanEvaluator": "losses",
    "TaskMetric": "task_scores",
    "TaskResult": "task_scores",
    "TaskSuite": "harness",
    "WindowLosses": "losses",
    "apply_dtype": "dtype",
    "choose_dtype": "dtype",
    "compute_paired_delta": "losses",
    "evaluate_tasks": "tasks",
    "load_tasks": "harness",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"lpsearch.evaluation.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
