"""Search: the space of plans, samplers by name, the study with its storage, and the front. Imports no torch."""

from __future__ import annotations

from lpsearch.search.front import build_front
from lpsearch.search.pool import Pool, ThreadPool
from lpsearch.search.racing import StoredEvaluation, evaluate_stored_plan, evaluate_stored_plans
from lpsearch.search.results import (
    EvaluationUpdate,
    KindLoss,
    Loss,
    StudyResult,
    TrialResult,
    TrialUpdate,
    read_results,
)
from lpsearch.search.samplers import SAMPLER_NAMES, build_sampler
from lpsearch.search.settings import FIXED_SETTINGS, compare_settings, complete_settings
from lpsearch.search.space import PlanSpace
from lpsearch.search.store import Split, StoredWindows, StudyStore
from lpsearch.search.study import run_study

__all__ = [
    "FIXED_SETTINGS",
    "SAMPLER_NAMES",
    "EvaluationUpdate",
    "KindLoss",
    "Loss",
    "PlanSpace",
    "Pool",
    "Split",
    "StoredEvaluation",
    "StoredWindows",
    "StudyResult",
    "StudyStore",
    "ThreadPool",
    "TrialResult",
    "TrialUpdate",
    "build_front",
    "build_sampler",
    "compare_settings",
    "complete_settings",
    "evaluate_stored_plan",
    "evaluate_stored_plans",
    "read_results",
    "run_study",
]
