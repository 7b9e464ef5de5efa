"""``lpsearch recover``: win back what a plan loses, without any cost at run time."""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Group

from lpsearch.commands.console import Answer
from lpsearch.commands.facts import Facts, Grid, wrap_line
from lpsearch.commands.loading import (
    describe_device,
    fits_in_float32,
    load_model_of_plan,
    resolve_device,
    resolve_dtype,
    resolve_source_of_plan,
)
from lpsearch.commands.options import DeviceOption, DtypeOption, PlanArgument, PlanModelOption, TrustOption
from lpsearch.commands.recover_methods import Repair, distill_plan, refit_plan
from lpsearch.commands.recover_texts import RecoveryTexts, choose_kinds, find_seq_len
from lpsearch.commands.steps import show_steps
from lpsearch.config import LEARNING_RATE, Dtype
from lpsearch.errors import LpsearchError, PlanError, UsageError
from lpsearch.kinds import parse_kinds, write_kind
from lpsearch.plan import Plan, RecoveredLoss, Recovery, load_plan
from lpsearch.staging import check_target
from lpsearch.versions import read_versions
from lpsearch.wording import format_value

if TYPE_CHECKING:
    from lpsearch.data import Windows
    from lpsearch.models import LoadedModel

__all__ = ["recover"]

logger = logging.getLogger(__name__)

Method = Literal["refit", "distill"]

_DEFAULT_WINDOWS: dict[Method, int] = {"refit": 64, "distill": 512}


@dataclass(frozen=True)
class _Untouched:
    """Losses before a repair on the windows to measure on, in nats per token.

    Attributes:
        base: of the unmodified model.
        untouched: under the plan.
    """

    base: tuple[float, ...]
    untouched: tuple[float, ...]


_PANEL = "With --method distill"
"""The group of options, in the help, that a refit does not read."""


def recover(
    plan_path: PlanArgument,
    out: Annotated[Path, typer.Option(help="new or empty directory to write", metavar="DIR")],
    method: Annotated[Method, typer.Option(help="refit in closed form, or distill after a refit")] = "refit",
    model: PlanModelOption = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="text to fit to, as for optimize; may be repeated; default: the plan's own, and self",
            metavar="SPEC[@WEIGHT]",
        ),
    ] = None,
    heldout: Annotated[
        list[str] | None,
        typer.Option(help="text to measure on; may be repeated; default: what goes with each --data", metavar="SPEC"),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help="windows of each kind of text; default: 64, to distill 512", min=6)
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="tokens in a window; default: as in the plan file", min=2)] = None,
    seed: Annotated[int, typer.Option(help="seed of sampled data and of training", min=0)] = 0,
    passes: Annotated[int, typer.Option(help="walks of a refit through the model", min=1)] = 2,
    tokens: Annotated[
        int, typer.Option(help="tokens, some of them several times", min=1, rich_help_panel=_PANEL)
    ] = 10_000_000,
    learning_rate: Annotated[
        float,
        typer.Option(help="its largest value, relative to the size of each weight", min=0, rich_help_panel=_PANEL),
    ] = LEARNING_RATE,
    train: Annotated[
        Literal["all", "grouped"], typer.Option(help="layers that are trained", rich_help_panel=_PANEL)
    ] = "all",
    lora: Annotated[
        int | None,
        typer.Option(help="train adapters of this rank instead of whole weights", min=1, rich_help_panel=_PANEL),
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(help="windows at once; default: what the memory allows", min=1, rich_help_panel=_PANEL),
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="train with less memory, more slowly", rich_help_panel=_PANEL)
    ] = False,
    compile_layers: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="compile the layers; by default in long GPU runs", rich_help_panel=_PANEL
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
) -> Answer | dict[str, Any]:
    """Repair the weights that belong to a plan, so that it loses less; nothing is added at run time.

    The directory holds the plan and the weights that changed. Every command takes it where it takes a plan.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    if method == "refit" and not is_first:  # one process is enough for it, and would write the same directory
        return {"recovered": None}
    plan = _load_unrepaired(plan_path)
    check_target(out)
    settings = {
        "num_tokens": tokens,
        "learning_rate": learning_rate,
        "train": train,
        "lora_rank": lora,
        "micro_batch": micro_batch,
        "checkpointing": checkpointing,
        "compile": compile_layers,
        "seed": seed,
    }
    if method == "distill":
        _check_settings(settings)
    kinds = parse_kinds(data) if data else choose_kinds(plan)
    texts = RecoveryTexts(
        kinds=kinds,
        heldout=parse_kinds(heldout) if heldout else kinds,
        num_windows=windows or _DEFAULT_WINDOWS[method],
        seq_len=seq_len or find_seq_len(plan),
        seed=seed,
    )
    texts.check()
    loaded = _load_model(plan, texts, model=model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    began = time.monotonic()
    calibration, unseen = texts.build(loaded)
    text_seconds = time.monotonic() - began
    before = _measure_untouched(loaded, plan, unseen)
    began = time.monotonic()
    repair = refit_plan(loaded, plan, calibration, passes=passes)
    if method == "distill":
        repair = distill_plan(loaded, plan, calibration, repair, settings=settings, checkpoints=_name_checkpoints(out))
        if not is_first:
            return {"recovered": None}
    seconds = text_seconds + time.monotonic() - began
    losses = _measure(loaded, plan, repair, unseen, before)
    recovery = _build_recovery(method, repair, calibration, losses, loaded, seconds=seconds)
    _write(out, plan, loaded, repair, recovery)
    return Answer(_build_document(plan_path, out, recovery), _describe(recovery, out))


def _load_unrepaired(plan_path: Path) -> Plan:
    """Read the plan, without what an earlier repair made of its weights.

    Raises:
        PlanError: if it joins no layers.
    """
    given = load_plan(plan_path)
    plan = given.without_recovery()
    if plan is not given:
        logger.info("%s was repaired already; the repair begins again from the unmodified weights", plan_path)
    if plan.num_joins == 0 and plan.num_dropped == 0:
        raise PlanError(
            f"{plan_path}: the plan joins and drops nothing, so there is nothing to recover; give a plan with groups"
        )
    return plan


def _load_model(
    plan: Plan, texts: RecoveryTexts, *, model: str | None, device: str, dtype: Dtype, trust_remote_code: bool
) -> LoadedModel:
    """Load the unmodified model in float32 where that fits; texts that are too short end this before its weights."""
    target = _resolve_rank_device(device)
    if dtype == "auto" and not trust_remote_code and fits_in_float32(resolve_source_of_plan(plan, model), target):
        dtype = "float32"  # the weights are written in it, and rounded once when they are exported
    return load_model_of_plan(
        plan,
        model=model,
        device=target,
        dtype=resolve_dtype(dtype, target),
        trust_remote_code=trust_remote_code,
        check=texts.check_config,
        check_tokenizer=lambda config, tokenizer: texts.read(tokenizer),
    )


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what cannot be trained, before anything is loaded.

    Raises:
        UsageError: for a value out of its range, or adapters without PEFT.
    """
    from lpsearch.recovery.distilled import DistillSettings

    DistillSettings(**settings)
    if settings["lora_rank"] is not None and importlib.util.find_spec("peft") is None:
        raise UsageError("--lora needs PEFT; install it with: pip install 'lpsearch[recover]'")


def _resolve_rank_device(name: str) -> Any:
    """Return the device of this process; under ``accelerate launch`` each has its own GPU."""
    import torch

    rank = os.environ.get("LOCAL_RANK")
    return resolve_device(f"cuda:{rank}" if name == "auto" and rank is not None and torch.cuda.is_available() else name)


def _name_checkpoints(out: Path) -> Path:
    """Return where training keeps what it needs to go on: beside the directory, which appears only when it is done."""
    return out.absolute().parent / f".{out.name}.checkpoints"


def _measure_untouched(loaded: LoadedModel, plan: Plan, windows: Windows) -> _Untouched:
    """Measure the unmodified model and the plan, before the work of a repair.

    Raises:
        LpsearchError: if a loss is not finite, so that there is nothing to repair by.
    """
    from lpsearch.commands.results import check_finite
    from lpsearch.evaluation import ModelEvaluator

    # Without a cache, which would take the memory that the repair needs.
    evaluator = ModelEvaluator(model=loaded.model, windows=windows, cache_bytes=0)
    indices = range(windows.num_windows)
    with show_steps("measuring the plan without repair") as on_step:
        base = evaluator.evaluate_windows(Plan.baseline(plan.num_layers), indices).nll_nats_per_token
        on_step(1, 2)
        untouched = evaluator.evaluate_windows(plan.without_metadata(), indices).nll_nats_per_token
        on_step(2, 2)
    check_finite([*base, *untouched], spec=windows.spec, dtype=_name_dtype(loaded))
    return _Untouched(base, untouched)


def _measure(
    loaded: LoadedModel, plan: Plan, repair: Repair, windows: Windows, known: _Untouched
) -> tuple[RecoveredLoss, ...]:
    """Measure the plan with the repair on windows of every kind.

    Raises:
        LpsearchError: if a loss is not finite or the repair does not help on average, so that nothing is written.
    """
    from lpsearch.commands.results import check_finite
    from lpsearch.evaluation import ModelEvaluator, compute_paired_delta
    from lpsearch.recovery import swapped_weights

    evaluator = ModelEvaluator(model=loaded.model, windows=windows, cache_bytes=0)
    indices = range(windows.num_windows)
    with show_steps("measuring what was won back"), swapped_weights(loaded.model, repair.weights):
        found = evaluator.evaluate_windows(plan.without_metadata(), indices, variant="repaired")
    repaired = found.nll_nats_per_token
    check_finite(repaired, spec=windows.spec, dtype=_name_dtype(loaded))
    losses = []
    for number, part in enumerate(windows.split_kinds()):
        chosen = slice(number, None, len(windows.kinds))
        before = compute_paired_delta(known.untouched[chosen], known.base[chosen])
        after = compute_paired_delta(repaired[chosen], known.base[chosen])
        losses.append(
            RecoveredLoss(
                data=part.spec,
                windows=part.num_windows,
                seq_len=part.seq_len,
                num_tokens=part.num_windows * (part.seq_len - 1),
                untouched_delta_nll=before.delta,
                delta_nll=after.delta,
                delta_nll_se=after.standard_error,
            )
        )
    if sum(loss.delta_nll for loss in losses) >= sum(loss.untouched_delta_nll for loss in losses):
        raise LpsearchError(
            "the repair does not lower the loss on windows that it did not see, so nothing is written; fit to more "
            "text (--windows), or to more kinds of it (--data)"
        )
    return tuple(losses)


def _name_dtype(loaded: LoadedModel) -> str:
    return str(loaded.model.dtype).removeprefix("torch.")


def _build_recovery(
    method: Method,
    repair: Repair,
    windows: Windows,
    losses: tuple[RecoveredLoss, ...],
    loaded: LoadedModel,
    *,
    seconds: float,
) -> Recovery:
    from lpsearch.models.fingerprint import fingerprint_model
    from lpsearch.recovery import swapped_weights

    with swapped_weights(loaded.model, repair.weights):
        fingerprint = fingerprint_model(loaded.model)
    return Recovery(
        method=method,
        data=tuple(map(write_kind, windows.kinds)),
        num_tokens=repair.num_tokens,
        steps=repair.steps,
        seconds=round(seconds, 3),
        settings={"windows": windows.num_windows, "seq_len": windows.seq_len, **repair.settings},
        losses=losses,
        fingerprint=fingerprint,
        dtype=_name_dtype(loaded),
        device=describe_device(loaded.model.device),
        versions=read_versions(),
    )


def _write(out: Path, plan: Plan, loaded: LoadedModel, repair: Repair, recovery: Recovery) -> None:
    """Write the directory, and remove what training kept to go on with."""
    import shutil

    from lpsearch.recovery import save_recovered

    save_recovered(out, plan=plan, model=loaded.model, weights=repair.weights, recovery=recovery)
    shutil.rmtree(_name_checkpoints(out), ignore_errors=True)
    logger.info("wrote %s", out)


def _build_document(plan_path: Path, out: Path, recovery: Recovery) -> dict[str, Any]:
    return {
        "plan": str(plan_path),
        "out": str(out),
        "method": recovery.method,
        "num_tokens": recovery.num_tokens,
        "steps": recovery.steps,
        "seconds": recovery.seconds,
        "num_bytes": sum(file.stat().st_size for file in out.iterdir()),
        "losses": [
            {**loss.model_dump(mode="json"), "recovered_share": loss.recovered_share} for loss in recovery.losses
        ],
    }


def _describe(recovery: Recovery, out: Path) -> Group:
    """Lay out what the repair won back, and where it is."""
    rows = []
    for loss in recovery.losses:
        share = "-" if loss.recovered_share is None else f"{loss.recovered_share:.0%}"
        repaired = format_value(loss.delta_nll, loss.delta_nll_se)
        rows.append((loss.data, f"{loss.untouched_delta_nll:.4f}", repaired, share))
    table = Grid(("held-out text", "plan", "repaired", "won back"), rows, left=("held-out text",))
    title = wrap_line("Loss against the unmodified model, in nats per token:", "bold")
    return Group(Facts([("repaired", out), ("method", recovery.method)]), "", title, "", table)
