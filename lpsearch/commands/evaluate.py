"""``lpsearch evaluate``: what a plan costs on any data."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from lpsearch.commands.loading import describe_device, load_model_of_plan, resolve_device, resolve_dtype
from lpsearch.commands.progress import show_steps
from lpsearch.commands.results import build_proxy_metrics
from lpsearch.plan import Plan, load_plan

__all__ = ["evaluate"]

logger = logging.getLogger(__name__)


def evaluate(
    plan_path: Path,
    *,
    model: str | None,
    data: str,
    num_windows: int,
    seq_len: int,
    metric: Literal["nll", "kl"],
    role: Literal["proxy", "heldout"],
    seed: int,
    device: str,
    dtype: str,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Measure a plan's loss against the unmodified model on the same windows.

    Args:
        plan_path: plan file or a directory that holds one.
        model: what to load instead of the model that the plan names.
        data: data specification, as ``--data`` takes it.
        num_windows: number of windows.
        seq_len: tokens in a window.
        metric: ``kl`` also measures KL(base || plan).
        role: which windows of the data: those that a search uses, or those held out from it.
        seed: seed of sampled data.
        device: torch device, or ``auto``.
        dtype: dtype of the weights, or ``auto``.
        trust_remote_code: run the model's own Python code from the hub.

    Returns:
        The metrics of the plan file's form, with the plan and the baseline's NLL beside them.
    """
    plan = load_plan(plan_path)
    target = resolve_device(device)
    with show_steps("loading the model", enabled=True):
        loaded = load_model_of_plan(
            plan, model=model, device=target, dtype=resolve_dtype(dtype, target), trust_remote_code=trust_remote_code
        )
    from lpsearch.data import build_windows
    from lpsearch.evaluation import ModelEvaluator

    with show_steps("preparing windows", enabled=True) as on_progress:
        windows = build_windows(
            data,
            tokenizer=loaded.tokenizer,
            num_windows=num_windows,
            seq_len=seq_len,
            role=role,
            seed=seed,
            model=loaded.model,
            on_progress=on_progress,
        )
    evaluator = ModelEvaluator(model=loaded.model, windows=windows, metric=metric)
    with show_steps("evaluating the unmodified model and the plan", enabled=True):
        base_losses = evaluator.evaluate_windows(Plan.baseline(plan.num_layers), range(num_windows))
        losses = evaluator.evaluate_windows(plan, range(num_windows))
    metrics = build_proxy_metrics(
        losses=losses,
        base_losses=base_losses,
        windows=windows,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        device_name=describe_device(target),
    )
    return {
        "plan": str(plan_path),
        "model": loaded.identity.id,
        "num_joins": plan.num_joins,
        "depth_reduction": plan.depth_reduction,
        "baseline_nll": metrics.nll - metrics.delta_nll,
        **metrics.model_dump(mode="json"),
    }
