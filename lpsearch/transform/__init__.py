"""Running a model under a plan: in place, without copying a weight, and back again; or fused into wide layers."""

from __future__ import annotations

from lpsearch.transform.apply import (
    applied_plan,
    apply_plan,
    check_plan_layers,
    check_plan_model,
    check_plan_numbers,
    undo_plan,
)
from lpsearch.transform.fuse import check_fusible, fuse_plan

__all__ = [
    "applied_plan",
    "apply_plan",
    "check_fusible",
    "check_plan_layers",
    "check_plan_model",
    "check_plan_numbers",
    "fuse_plan",
    "undo_plan",
]
