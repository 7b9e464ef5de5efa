"""``lpsearch export``: a checkpoint directory that other software loads."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from lpsearch.commands.checks import read_config
from lpsearch.commands.loading import resolve_source_of_plan
from lpsearch.commands.options import ModelOption, PlanArgument
from lpsearch.commands.steps import show_steps
from lpsearch.config import Dtype
from lpsearch.plan import load_plan

__all__ = ["export"]


def export(
    plan_path: PlanArgument,
    directory: Annotated[Path, typer.Argument(help="new or empty directory to write", metavar="DIR")],
    model: ModelOption = None,
    dtype: Annotated[Dtype, typer.Option(help="dtype to write; auto: the one that the weights are stored in")] = "auto",
) -> dict[str, Any]:
    """Write a checkpoint with fused layers, which transformers and vLLM load without lpsearch."""
    import torch

    from lpsearch.export import check_target, export_source, read_dtype
    from lpsearch.models.traits import read_traits
    from lpsearch.transform import check_plan_layers

    plan = load_plan(plan_path)
    assert plan.metadata is not None  # a plan file has it
    source = resolve_source_of_plan(plan, model)
    check_target(directory)
    config = read_config(source)
    if config is not None:  # before anything is fetched
        check_plan_layers(plan, config)
        read_traits(config).check_fusing()
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
        "model": plan.metadata.model.id,
        "depth": plan.depth,
        "depth_reduction": plan.depth_reduction,
        "dtype": read_dtype(directory),
        "num_bytes": sum(file.stat().st_size for file in directory.iterdir()),
        "seconds": round(time.perf_counter() - started, 2),
    }
