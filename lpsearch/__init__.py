"""Layer parallelism for LLMs: search which layers can run in parallel, measure it, run it.

The names below are imported on first use, so that ``import lpsearch`` loads neither torch nor optuna.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lpsearch.versions import __version__ as __version__

if TYPE_CHECKING:
    from lpsearch.export import export_checkpoint
    from lpsearch.plan import Plan, load_plan, save_plan
    from lpsearch.recovery import apply_recovery
    from lpsearch.search import run_study
    from lpsearch.transform import applied_plan, apply_plan, fuse_plan, undo_plan

__all__ = [
    "Plan",
    "applied_plan",
    "apply_plan",
    "apply_recovery",
    "export_checkpoint",
    "fuse_plan",
    "load_plan",
    "run_study",
    "save_plan",
    "undo_plan",
]

_MODULE_OF = {
    "Plan": "lpsearch.plan",
    "applied_plan": "lpsearch.transform",
    "apply_plan": "lpsearch.transform",
    "apply_recovery": "lpsearch.recovery",
    "export_checkpoint": "lpsearch.export",
    "fuse_plan": "lpsearch.transform",
    "load_plan": "lpsearch.plan",
    "run_study": "lpsearch.search",
    "save_plan": "lpsearch.plan",
    "undo_plan": "lpsearch.transform",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
