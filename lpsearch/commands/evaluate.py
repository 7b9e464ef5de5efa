"""``lpsearch evaluate``: what a plan costs on any data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lpsearch.commands.console import Answer
from lpsearch.commands.loading import describe_device, load_model_of_plan, resolve_device, resolve_dtype
from lpsearch.commands.options import DeviceOption, DtypeOption, ModelOption, PlanArgument, TrustOption
from lpsearch.commands.steps import show_steps
from lpsearch.commands.tasks import (
    BatchSizeOption,
    ChatTemplateOption,
    LimitOption,
    NumFewshotOption,
    TaskPathOption,
    TasksOption,
    list_variants,
    prepare_tasks,
)
from lpsearch.config import Metric, Split
from lpsearch.evaluation.losses import RAW
from lpsearch.kinds import TextKind, list_measured_kinds, parse_kinds, write_kind
from lpsearch.plan import Plan, ProxyMetrics, find_recovered_weights, load_plan
from lpsearch.wording import describe_repair

if TYPE_CHECKING:
    from lpsearch.data import Windows
    from lpsearch.evaluation import WindowLosses
    from lpsearch.models import LoadedModel
    from lpsearch.search import Loss

__all__ = ["evaluate"]

logger = logging.getLogger(__name__)

_DEFAULT_DATA = "wikitext2"
_DEFAULT_WINDOWS = 16
_DEFAULT_SEQ_LEN = 2048


def evaluate(
    plan_path: PlanArgument,
    model: ModelOption = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="as for optimize; may be repeated; default: as in the plan file", metavar="SPEC[@WEIGHT]"),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help="windows of each kind of text; default: as in the plan file", min=1)
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="tokens in a window; default: as in the plan file", min=2)] = None,
    metric: Annotated[Metric, typer.Option(help="kl also measures the divergence from the unmodified model")] = "nll",
    split: Annotated[Split, typer.Option(help="windows that a search uses, or those held out from it")] = "heldout",
    seed: Annotated[int | None, typer.Option(help="seed of sampled data; default: as in the plan file", min=0)] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    tasks: TasksOption = None,
    task_path: TaskPathOption = None,
    num_fewshot: NumFewshotOption = None,
    limit: LimitOption = None,
    batch_size: BatchSizeOption = 8,
    apply_chat_template: ChatTemplateOption = False,
) -> dict[str, Any] | Answer:
    """Measure a plan's loss on any data, of one kind or several, and its scores on downstream tasks.

    What is not given is taken from the plan file, so that a plan alone repeats the values in it. Of a directory that
    recover wrote, the loss is that with the repaired weights, and untouched_delta_nll what the plan costs without them.
    """
    from lpsearch.commands.results import build_proxy_metrics
    from lpsearch.data import check_seq_len, check_text_kinds
    from lpsearch.evaluation import ModelEvaluator
    from lpsearch.evaluation.losses import PlanLosses
    from lpsearch.recovery import read_recovery, swapped_weights
    from lpsearch.search.results import compute_loss

    plan = load_plan(plan_path)
    find_recovered_weights(plan, plan_path)  # which must be there, before anything is loaded
    metadata = plan.metadata
    assert metadata is not None  # a plan file has it
    repair = describe_repair(plan, plan_path)
    if repair is not None:
        logger.warning("%s; what is measured now is the plan without them", repair)
    measured = getattr(metadata.metrics, split) or metadata.metrics.proxy
    recorded = [TextKind(_DEFAULT_DATA)] if measured is None else list_measured_kinds(measured)
    data = data or list(map(write_kind, recorded))
    num_windows = windows or (_DEFAULT_WINDOWS if measured is None else measured.windows // len(recorded))
    seq_len = seq_len or (_DEFAULT_SEQ_LEN if measured is None else measured.seq_len)
    seed = (metadata.provenance.seed or 0) if seed is None else seed
    target = resolve_device(device)
    chosen_dtype = resolve_dtype(measured.dtype if dtype == "auto" and measured is not None else dtype, target)
    check_text_kinds(data, split=split)
    task_run = prepare_tasks(
        tasks,
        task_path=task_path,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        apply_chat_template=apply_chat_template,
    )
    loaded = load_model_of_plan(
        plan,
        model=model,
        device=target,
        dtype=chosen_dtype,
        trust_remote_code=trust_remote_code,
        check=lambda config: check_seq_len(seq_len, config),
    )
    if task_run is not None:
        task_run.check(loaded)
    built = _build_windows(
        parse_kinds(data),
        loaded,
        num_windows=num_windows,
        seq_len=seq_len,
        split=split,
        seed=seed,
        searched=metadata.metrics.proxy,
    )
    evaluator = ModelEvaluator(model=loaded.model, windows=built, metric=metric)
    window_indices = range(built.num_windows)
    weights = read_recovery(loaded.model, plan, plan_path)
    with show_steps("evaluating the unmodified model and the plan") as on_step:
        base_losses = evaluator.evaluate_windows(Plan.baseline(plan.num_layers), window_indices)
        on_step(1, 3)
        losses = evaluator.evaluate_windows(plan.without_recovery(), window_indices)
        on_step(2, 3)
        with swapped_weights(loaded.model, weights):
            repaired_losses = evaluator.evaluate_windows(plan, window_indices, variant="repaired") if weights else None

    def compare(found: WindowLosses) -> Loss:
        return compute_loss(
            PlanLosses.build(built.num_windows, window_indices, found),
            PlanLosses.build(built.num_windows, window_indices, base_losses),
            metric=metric,
            kinds=built.kinds,
        )

    loss = compare(losses if repaired_losses is None else repaired_losses)
    metrics = build_proxy_metrics(
        loss,
        windows=built,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        device_name=describe_device(target),
        variant=RAW if repaired_losses is None else _name_variant(plan),
    )
    document = {
        "plan": str(plan_path),
        "model": loaded.identity.id,
        "num_joins": plan.num_joins,
        "num_dropped": plan.num_dropped,
        "depth_reduction": plan.depth_reduction,
        "baseline_nll": metrics.nll - metrics.delta_nll,
        "untouched_delta_nll": compare(losses).delta_nll if weights else None,
        **metrics.model_dump(mode="json"),
    }
    if task_run is None:
        return document
    table = task_run.score(loaded, list_variants(loaded.model, plan, weights))
    return Answer({**document, **table.build_document()}, table)


def _build_windows(
    kinds: Sequence[TextKind],
    loaded: LoadedModel,
    *,
    num_windows: int,
    seq_len: int,
    split: Split,
    seed: int,
    searched: ProxyMetrics | None,
) -> Windows:
    """Build the windows. Held-out ones of the text that the plan was searched on come after the search's own."""
    from lpsearch.data import build_mixed_windows, is_same_text

    def build(
        kinds: Sequence[TextKind], split: Split, num_windows: int, seq_len: int, after: Windows | None = None
    ) -> Windows:
        with show_steps("preparing windows") as on_progress:
            return build_mixed_windows(
                kinds,
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
    if split == "heldout" and searched is not None:
        former = list_measured_kinds(searched)
        again = [old for old in former if any(is_same_text(old.spec, kind.spec, split=split) for kind in kinds)]
        if again:
            after = build(again, "proxy", searched.windows // len(former), searched.seq_len)
    return build(kinds, split, num_windows, seq_len, after)


def _name_variant(plan: Plan) -> str:
    """Return what was done to the weights of a recovered directory."""
    recovery = None if plan.metadata is None else plan.metadata.provenance.recovery
    return RAW if recovery is None else recovery.method
