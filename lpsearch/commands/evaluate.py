"""``lpsearch evaluate``: what a plan costs on any data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lpsearch.commands.loading import describe_device, load_model_of_plan, resolve_device, resolve_dtype
from lpsearch.commands.progress import show_steps
from lpsearch.commands.results import build_proxy_metrics
from lpsearch.data import Windows, build_windows, check_text_source, is_same_text
from lpsearch.evaluation import ModelEvaluator
from lpsearch.models import LoadedModel
from lpsearch.plan import Plan, ProxyMetrics, load_plan
from lpsearch.search import Split

__all__ = ["evaluate"]

_DEFAULT_DATA = "wikitext2"
_DEFAULT_WINDOWS = 16
_DEFAULT_SEQ_LEN = 2048


def evaluate(
    plan_path: Path,
    *,
    model: str | None,
    data: str | None,
    num_windows: int | None,
    seq_len: int | None,
    metric: Literal["nll", "kl"],
    split: Split,
    seed: int | None,
    device: str,
    dtype: str,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Measure a plan's loss against the unmodified model on the same windows.

    What is not named is taken from the plan file, so that a plan alone repeats the values that stand in it.

    Args:
        plan_path: plan file or a directory that holds one.
        model: what to load instead of the model that the plan names.
        data: data specification, as ``--data`` takes it.
        num_windows: number of windows.
        seq_len: tokens in a window.
        metric: ``kl`` also measures KL(base || plan).
        split: which windows of the data: those that a search uses, or those held out from it.
        seed: seed of sampled data.
        device: torch device, or ``auto``.
        dtype: dtype of the weights, or ``auto``.
        trust_remote_code: run the model's own Python code from the hub.

    Returns:
        The metrics of the plan file's form, with the plan and the baseline's NLL beside them.

    Raises:
        UsageError: for a plan, data or options that cannot be used.
        SourceError: if model or data cannot be fetched.
        LpsearchError: if a loss is not finite.
    """
    plan = load_plan(plan_path)
    metadata = plan.metadata
    assert metadata is not None  # a plan file has it
    measured = getattr(metadata.metrics, split) or metadata.metrics.proxy
    data = data or (_DEFAULT_DATA if measured is None else measured.data)
    num_windows = num_windows or (_DEFAULT_WINDOWS if measured is None else measured.windows)
    seq_len = seq_len or (_DEFAULT_SEQ_LEN if measured is None else measured.seq_len)
    seed = (metadata.provenance.seed or 0) if seed is None else seed
    dtype = measured.dtype if dtype == "auto" and measured is not None else dtype
    target = resolve_device(device)
    check_text_source(data, split=split)
    loaded = load_model_of_plan(
        plan, model=model, device=target, dtype=resolve_dtype(dtype, target), trust_remote_code=trust_remote_code
    )
    windows = _build_windows(
        data,
        loaded,
        num_windows=num_windows,
        seq_len=seq_len,
        split=split,
        seed=seed,
        searched=metadata.metrics.proxy,
    )
    evaluator = ModelEvaluator(model=loaded.model, windows=windows, metric=metric)
    with show_steps("evaluating the unmodified model and the plan") as on_step:
        base_losses = evaluator.evaluate_windows(Plan.baseline(plan.num_layers), range(num_windows))
        on_step(1, 2)
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


def _build_windows(
    data: str,
    loaded: LoadedModel,
    *,
    num_windows: int,
    seq_len: int,
    split: Split,
    seed: int,
    searched: ProxyMetrics | None,
) -> Windows:
    """Build the windows; those held out of the text that the plan was searched on come after the search's own."""

    def build(split: Split, num_windows: int, seq_len: int, after: Windows | None = None) -> Windows:
        with show_steps("preparing windows") as on_progress:
            return build_windows(
                data,
                tokenizer=loaded.tokenizer,
                num_windows=num_windows,
                seq_len=seq_len,
                split=split,
                seed=seed,
                model=loaded.model,
                after=after,
                on_progress=on_progress,
            )

    after = None
    if split == "heldout" and searched is not None and is_same_text(searched.data, data, split=split):
        after = build("proxy", searched.windows, searched.seq_len)
    return build(split, num_windows, seq_len, after)
