"""``lpsearch export``: a checkpoint directory that other software loads."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lpsearch.commands.progress import show_steps
from lpsearch.errors import PlanError
from lpsearch.plan import load_plan

__all__ = ["export"]


def export(plan_path: Path, directory: Path, *, model: str | None, dtype: str) -> dict[str, Any]:
    """Write a plan's fused checkpoint.

    Args:
        plan_path: plan file or a directory that holds one.
        directory: new or empty directory to write.
        model: what to read instead of the model that the plan names, e.g. a local copy of it.
        dtype: dtype to write, or ``auto`` for the one that the weights are stored in.

    Returns:
        ``directory``, ``model``, ``depth``, ``depth_reduction``, ``dtype``, ``num_bytes`` and ``seconds``.

    Raises:
        UsageError: for a plan, model or directory that cannot be used.
        SourceError: if the model cannot be fetched.
        LpsearchError: if the disk has too little room.
    """
    import torch

    from lpsearch.export import export_source, read_dtype
    from lpsearch.models import resolve_source

    plan = load_plan(plan_path)
    if plan.metadata is None:
        raise PlanError("the plan names no model; give --model")
    identity = plan.metadata.model
    source = resolve_source(model) if model else resolve_source(identity.id, revision=identity.revision)
    started = time.perf_counter()
    with show_steps("writing") as on_progress:
        export_source(
            source,
            plan,
            directory,
            dtype=None if dtype == "auto" else getattr(torch, dtype),
            on_progress=on_progress,
        )
    return {
        "directory": str(directory),
        "model": identity.id,
        "depth": plan.depth,
        "depth_reduction": plan.depth_reduction,
        "dtype": read_dtype(directory),
        "num_bytes": sum(file.stat().st_size for file in directory.iterdir()),
        "seconds": round(time.perf_counter() - started, 2),
    }
