"""``lpsearch export``: a checkpoint directory, or a GGUF file, that other software loads."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lpsearch.commands.checks import read_config
from lpsearch.commands.console import Answer
from lpsearch.commands.facts import Facts, Kept, Row
from lpsearch.commands.loading import resolve_source_of_plan
from lpsearch.commands.options import PlanArgument, PlanModelOption
from lpsearch.commands.steps import show_steps
from lpsearch.config import Dtype
from lpsearch.errors import UsageError
from lpsearch.models.aliases import name_model
from lpsearch.plan import Plan, find_recovered_weights, load_plan
from lpsearch.staging import check_target

if TYPE_CHECKING:
    from torch import Tensor

    from lpsearch.models import ModelSource

__all__ = ["export"]

Quantisation = Literal["f32", "f16", "bf16", "q8_0"]
"""What ``lpsearch.export.gguf`` writes; a test compares the two, since that one imports torch."""


def export(
    plan_path: PlanArgument,
    target: Annotated[
        Path, typer.Argument(help="new or empty directory to write, or new .gguf file", metavar="DIR|FILE.gguf")
    ],
    model: PlanModelOption = None,
    format: Annotated[
        Literal["hf", "gguf"] | None,
        typer.Option(help="hf: directory for transformers and vLLM; gguf: file for llama.cpp; default: by the name"),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="dtype of a directory; auto: the one that the weights are stored in")
    ] = "auto",
    quant: Annotated[
        Quantisation | None,
        typer.Option(
            help="what a GGUF file stores matrices as, but those that the model's own GGUF file holds quantised; "
            "default: what the model has, q8_0 for groups of a quantised one"
        ),
    ] = None,
) -> Answer:
    """Write a plan's fused layers as a checkpoint for transformers and vLLM, or as a GGUF file for llama.cpp."""
    plan = load_plan(plan_path)
    assert plan.metadata is not None  # a plan file has it
    weights_file = find_recovered_weights(plan, plan_path)
    is_gguf = format == "gguf" or (format is None and target.suffix == ".gguf")
    if is_gguf and dtype != "auto":
        raise UsageError(f"--dtype {dtype} is for a directory; --quant says what a GGUF file stores")
    if not is_gguf and quant is not None:
        raise UsageError(f"--quant {quant} is for a GGUF file; name one, as out.gguf, or use --dtype for a directory")
    source = resolve_source_of_plan(plan, model)
    _check_before_fetching(plan, source, target, is_gguf=is_gguf)

    from lpsearch.recovery import load_recovered_weights

    started = time.perf_counter()
    weights = None if weights_file is None else load_recovered_weights(weights_file)
    with show_steps("writing") as on_progress:
        if is_gguf:
            written = _write_gguf(source, plan, target, quant, weights, on_progress)
        else:
            written = _write_directory(source, plan, target, dtype, weights, on_progress)
    document = {
        **written,
        "model": plan.metadata.model.id,
        "depth": plan.depth,
        "depth_reduction": plan.depth_reduction,
        "seconds": round(time.perf_counter() - started, 2),
    }
    return Answer(document, _describe(document, plan, target, is_gguf=is_gguf))


def _describe(document: Mapping[str, Any], plan: Plan, target: Path, *, is_gguf: bool) -> Facts:
    """Lay out what was written, and what to do with it."""
    try_it = ["lpsearch", "generate", str(target), "--prompt", "The capital of France is"]
    if is_gguf:
        try_it = ["llama-server", "-m", str(target), "--port", "8080"]
    serve_it = ["vllm", "serve", str(target), "--trust-remote-code"]
    rows: list[Row] = [
        ("file" if is_gguf else "directory", target),
        ("model", name_model(document["model"])),
        ("depth", f"{plan.depth:g} of {plan.num_layers} layers, {plan.depth_reduction:.1%} less"),
        ("stored as", f"{document['file_type' if is_gguf else 'dtype']}, {document['num_bytes'] / 1e6:,.0f} MB"),
        ("try it", Kept(shlex.join(try_it))),
        ("serve it", None if is_gguf else Kept(shlex.join(serve_it))),
    ]
    return Facts(rows)


def _check_before_fetching(plan: Plan, source: ModelSource, target: Path, *, is_gguf: bool) -> None:
    """Refuse what the target and the model's configuration rule out, before weights are fetched or read."""
    from lpsearch.export.gguf import check_gguf, check_gguf_target
    from lpsearch.models.traits import read_traits
    from lpsearch.transform import check_plan_layers

    if is_gguf:
        check_gguf_target(target)
    else:
        check_target(target)
    config = read_config(source)
    if config is None:
        return
    check_plan_layers(plan, config)
    if is_gguf:
        check_gguf(config)
    else:
        read_traits(config).check_fusing()


def _write_gguf(
    source: ModelSource,
    plan: Plan,
    target: Path,
    quant: Quantisation | None,
    weights: Mapping[str, Tensor] | None,
    on_progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Write a GGUF file and say what it is."""
    from lpsearch.export.gguf import export_gguf_source, read_file_type

    export_gguf_source(source, plan, target, quantisation=quant, weights=weights, on_progress=on_progress)
    return {"file": str(target), "file_type": read_file_type(target), "num_bytes": target.stat().st_size}


def _write_directory(
    source: ModelSource,
    plan: Plan,
    target: Path,
    dtype: Dtype,
    weights: Mapping[str, Tensor] | None,
    on_progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Write a directory and say what it is."""
    import torch

    from lpsearch.export import export_source, read_dtype

    chosen = None if dtype == "auto" else getattr(torch, dtype)
    export_source(source, plan, target, dtype=chosen, weights=weights, on_progress=on_progress)
    num_bytes = sum(file.stat().st_size for file in target.iterdir())
    return {"directory": str(target), "dtype": read_dtype(target), "num_bytes": num_bytes}
