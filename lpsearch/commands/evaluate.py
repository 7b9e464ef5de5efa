"""``lpsearch evaluate``: what a plan costs on any data."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group

from lpsearch.commands.console import Answer
from lpsearch.commands.facts import Facts, Row
from lpsearch.commands.loading import (
    describe_device,
    load_model_of_plan,
    resolve_device,
    resolve_dtype,
)
from lpsearch.commands.options import (
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    PlanArgument,
    PlanModelOption,
    TrustOption,
)
from lpsearch.commands.plan_facts import list_loss_rows
from lpsearch.commands.plan_texts import check_texts_of_plan
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
from lpsearch.models.aliases import name_model
from lpsearch.plan import Plan, ProxyMetrics, find_recovered_weights, load_plan
from lpsearch.wording import describe_repair

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

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
    model: PlanModelOption = None,
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
    device_map: DeviceMapOption = "single",
    trust_remote_code: TrustOption = False,
    tasks: TasksOption = None,
    task_path: TaskPathOption = None,
    num_fewshot: NumFewshotOption = None,
    limit: LimitOption = None,
    batch_size: BatchSizeOption = 8,
    apply_chat_template: ChatTemplateOption = False,
) -> Answer:
    """Measure a plan's loss on any data, of one kind or several, and its scores on downstream tasks.

    What is not given is taken from the plan file, so that a plan alone repeats the values in it. Of a directory that
    recover wrote, the loss is that with the repaired weights, and untouched_delta_nll what the plan costs without them.
    """
    from lpsearch.data import check_seq_len, check_text_kinds
    from lpsearch.recovery import read_recovery

    plan = load_plan(plan_path)
    find_recovered_weights(plan, plan_path)  # which must be there, before anything is loaded
    assert plan.metadata is not None  # a plan file has it
    repair = describe_repair(plan, plan_path)
    if repair is not None:
        logger.warning("%s; what is measured now is the plan without them", repair)
    measured = getattr(plan.metadata.metrics, split) or plan.metadata.metrics.proxy
    texts = _choose_texts(plan, measured, data=data, windows=windows, seq_len=seq_len, split=split, seed=seed)
    target = resolve_device(device)
    chosen_dtype = resolve_dtype(measured.dtype if dtype == "auto" and measured is not None else dtype, target)
    check_text_kinds(list(map(write_kind, texts.kinds)), split=split)
    task_run = prepare_tasks(
        tasks,
        task_path=task_path,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        apply_chat_template=apply_chat_template,
    )

    def check_tokenizer(config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        if task_run is not None:
            task_run.check(tokenizer)
        texts.read(tokenizer)

    loaded = load_model_of_plan(
        plan,
        model=model,
        device=target,
        dtype=chosen_dtype,
        trust_remote_code=trust_remote_code,
        check=lambda config: check_seq_len(texts.seq_len, config),
        check_tokenizer=check_tokenizer,
        spread=device_map == "auto",
    )
    weights = read_recovery(loaded.model, plan, plan_path)
    metrics, document = _measure(loaded, plan, weights, texts.build(loaded), metric=metric)
    document = {"plan": str(plan_path), **document, **metrics.model_dump(mode="json")}
    facts = _describe(plan_path, metrics, document)
    if task_run is None:
        return Answer(document, facts)
    table = task_run.score(loaded, list_variants(loaded.model, plan, weights))
    return Answer({**document, **table.build_document()}, Group(facts, "", table))


def _choose_texts(
    plan: Plan,
    measured: ProxyMetrics | None,
    *,
    data: list[str] | None,
    windows: int | None,
    seq_len: int | None,
    split: Split,
    seed: int | None,
) -> _Texts:
    """Take what the command line leaves out from what the plan file measured, or else the defaults."""
    assert plan.metadata is not None  # a plan file has it
    recorded = [TextKind(_DEFAULT_DATA)] if measured is None else list_measured_kinds(measured)
    if not data:
        check_texts_of_plan(recorded)
    return _Texts(
        kinds=parse_kinds(data) if data else tuple(recorded),
        num_windows=windows or (_DEFAULT_WINDOWS if measured is None else measured.windows // len(recorded)),
        seq_len=seq_len or (_DEFAULT_SEQ_LEN if measured is None else measured.seq_len),
        split=split,
        seed=(plan.metadata.provenance.seed or 0) if seed is None else seed,
        searched=plan.metadata.metrics.proxy,
    )


@dataclass(frozen=True)
class _Texts:
    """The windows to evaluate on. Held-out ones of the text that a plan was searched on come after the search's own.

    Attributes:
        kinds: of text.
        num_windows: of each kind.
        seq_len: tokens in a window.
        split: windows that a search uses, or those held out from it.
        seed: of sampled text.
        searched: what the plan was searched on; None where that is not known.
    """

    kinds: Sequence[TextKind]
    num_windows: int
    seq_len: int
    split: Split
    seed: int
    searched: ProxyMetrics | None
    _built: dict[str, Windows] = field(default_factory=dict, init=False, repr=False)

    def read(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Build what needs the tokenizer alone, so that a text that is too short ends this before weights are read.

        Raises:
            DataError: if a text is too short.
            SourceError: if one cannot be fetched now.
        """
        from lpsearch.data import build_text_windows

        self._built.update(
            build_text_windows(
                self.kinds,
                tokenizer=tokenizer,
                num_windows=self.num_windows,
                seq_len=self.seq_len,
                split=self.split,
                after=self._build_searched(tokenizer),
            )
        )

    def build(self, loaded: LoadedModel) -> Windows:
        """Build the windows; only what was not read before."""
        from lpsearch.data import build_mixed_windows

        with show_steps("preparing windows") as on_progress:
            return build_mixed_windows(
                self.kinds,
                tokenizer=loaded.tokenizer,
                num_windows=self.num_windows,
                seq_len=self.seq_len,
                split=self.split,
                seed=self.seed,
                model=loaded.model,
                built=self._built,
                on_progress=on_progress,
            )

    def _build_searched(self, tokenizer: PreTrainedTokenizerBase) -> list[Windows]:
        """Build the windows that the search saw of the same texts; none of them is sampled."""
        from lpsearch.data import build_text_windows, is_same_text

        if self.split != "heldout" or self.searched is None:
            return []
        former = list_measured_kinds(self.searched)
        again = [
            old for old in former if any(is_same_text(old.spec, kind.spec, split=self.split) for kind in self.kinds)
        ]
        num_windows, seq_len = self.searched.windows // len(former), self.searched.seq_len
        built = build_text_windows(again, tokenizer=tokenizer, num_windows=num_windows, seq_len=seq_len, split="proxy")
        return list(built.values())


def _measure(
    loaded: LoadedModel, plan: Plan, weights: Mapping[str, Tensor], windows: Windows, *, metric: Metric
) -> tuple[ProxyMetrics, dict[str, Any]]:
    """Measure the plan, with repaired weights too where there are any.

    Returns:
        Its loss, and what else the document says.

    Raises:
        LpsearchError: if a loss is not finite.
    """
    from lpsearch.commands.results import build_proxy_metrics
    from lpsearch.evaluation import ModelEvaluator
    from lpsearch.evaluation.losses import PlanLosses
    from lpsearch.models.placement import find_input_device
    from lpsearch.recovery import swapped_weights
    from lpsearch.search.results import compute_loss

    evaluator = ModelEvaluator(model=loaded.model, windows=windows, metric=metric)
    indices = range(windows.num_windows)
    with show_steps("evaluating the unmodified model and the plan") as on_step:
        base_losses = evaluator.evaluate_windows(Plan.baseline(plan.num_layers), indices)
        on_step(1, 3)
        losses = evaluator.evaluate_windows(plan.without_recovery(), indices)
        on_step(2, 3)
        with swapped_weights(loaded.model, weights):
            repaired_losses = evaluator.evaluate_windows(plan, indices, variant="repaired") if weights else None

    def compare(found: WindowLosses) -> Loss:
        return compute_loss(
            PlanLosses.build(windows.num_windows, indices, found),
            PlanLosses.build(windows.num_windows, indices, base_losses),
            metric=metric,
            kinds=windows.kinds,
        )

    metrics = build_proxy_metrics(
        compare(losses if repaired_losses is None else repaired_losses),
        windows=windows,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        device_name=describe_device(find_input_device(loaded.model)),
        variant=RAW if repaired_losses is None else _name_variant(plan),
    )
    return metrics, {
        "model": loaded.identity.id,
        "num_joins": plan.num_joins,
        "num_dropped": plan.num_dropped,
        "depth_reduction": plan.depth_reduction,
        "baseline_nll": metrics.nll - metrics.delta_nll,
        "untouched_delta_nll": compare(losses).delta_nll if weights else None,
    }


def _describe(plan_path: Path, metrics: ProxyMetrics, document: Mapping[str, Any]) -> Facts:
    """Lay out what was measured, for a person."""
    baseline_nll = document["baseline_nll"]
    rows: list[Row] = [
        ("plan", plan_path),
        ("model", name_model(document["model"])),
        ("depth", f"{document['depth_reduction']:.1%} less"),
        ("unmodified", f"nll {baseline_nll:.4f}, perplexity {math.exp(baseline_nll):.2f}"),
        ("the plan", f"nll {metrics.nll:.4f}, perplexity {metrics.perplexity:.2f}"),
        *list_loss_rows(metrics, "it loses"),
    ]
    if document["untouched_delta_nll"] is not None:
        rows.append(("unrepaired", f"delta nll {document['untouched_delta_nll']:.4f}"))
    return Facts(rows)


def _name_variant(plan: Plan) -> str:
    """Return what was done to the weights of a recovered directory."""
    recovery = None if plan.metadata is None else plan.metadata.provenance.recovery
    return RAW if recovery is None else recovery.method
