"""Running a model under a plan: in place, without copying a weight, and back again."""

from __future__ import annotations

from lpsearch.transform.apply import applied_plan, apply_plan, check_plan_model, undo_plan

__all__ = ["applied_plan", "apply_plan", "check_plan_model", "undo_plan"]
