"""Plans: which consecutive layers of a model run in parallel, and the plan file that carries one.

A plan partitions the layers of a decoder into *groups* of consecutive layers, every layer once and in order. Imports
neither torch nor optuna.
"""

from __future__ import annotations

from lpsearch.plan.file import (
    PLAN_SCHEMA_VERSION,
    RECOVERED_PLAN_NAME,
    RECOVERED_WEIGHTS_NAME,
    build_plan_document,
    build_plan_schema,
    find_recovered_weights,
    load_plan,
    parse_plan,
    save_plan,
    write_json,
)
from lpsearch.plan.groups import Group, Plan
from lpsearch.plan.metadata import (
    KindMetrics,
    LatencyMetrics,
    ModelIdentity,
    PlanMetadata,
    PlanMetrics,
    Provenance,
    ProxyMetrics,
    RecoveredLoss,
    Recovery,
)

__all__ = [
    "PLAN_SCHEMA_VERSION",
    "RECOVERED_PLAN_NAME",
    "RECOVERED_WEIGHTS_NAME",
    "Group",
    "KindMetrics",
    "LatencyMetrics",
    "ModelIdentity",
    "Plan",
    "PlanMetadata",
    "PlanMetrics",
    "Provenance",
    "ProxyMetrics",
    "RecoveredLoss",
    "Recovery",
    "build_plan_document",
    "build_plan_schema",
    "find_recovered_weights",
    "load_plan",
    "parse_plan",
    "save_plan",
    "write_json",
]
