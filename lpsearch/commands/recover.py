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

from lpsearch.commands.console import Answer
from lpsearch.commands.loading import (
    describe_device,
    fits_in_float32,
    load_model_of_plan,
    resolve_device,
    resolve_dtype,
    resolve_source_of_plan,
)
from lpsearch.commands.options import DeviceOption, DtypeOption, ModelOption, PlanArgument, TrustOption
from lpsearch.commands.recover_texts import RecoveryTexts, choose_kinds, find_seq_len
from lpsearch.commands.steps import show_steps
from lpsearch.errors import LpsearchError, PlanError, UsageError
from lpsearch.kinds import parse_kinds, write_kind
from lpsearch.plan import Plan, RecoveredLoss, Recovery, load_plan
from lpsearch.staging import check_target
from lpsearch.versions import read_versions

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from lpsearch.data import Windows
    from lpsearch.models import LoadedModel

__all__ = ["recover"]

logger = logging.getLogger(__name__)

Method = Literal["refit", "distill"]

_DEFAULT_WINDOWS: dict[Method, int] = {"refit": 64, "distill": 512}
_VALIDATION_SHARE = 16
"""One window in so many of each kind tells when distilling has helped most."""


@dataclass(frozen=True)
class _Repair:
    """What a method found.

    Attributes:
        weights: by name in the model.
        num_tokens: tokens that it saw, each as often as it saw it.
        steps: steps of training; None for a refit.
        settings: what decided the result.
    """

    weights: Mapping[str, Tensor]
    num_tokens: int
    steps: int | None
    settings: Mapping[str, str | int | float | bool | None]


def recover(
    plan_path: PlanArgument,
    out: Annotated[Path, typer.Option(help="new or empty directory to write", metavar="DIR")],
    method: Annotated[Method, typer.Option(help="refit in closed form, or distill after a refit")] = "refit",
    model: ModelOption = None,
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
        int | None, typer.Option(help="windows of each kind of text; default: 64, to distill 512", min=5)
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="tokens in a window; default: as in the plan file", min=2)] = None,
    seed: Annotated[int, typer.Option(help="seed of sampled data and of training", min=0)] = 0,
    passes: Annotated[int, typer.Option(help="walks of a refit through the model", min=1)] = 2,
    tokens: Annotated[int, typer.Option(help="tokens to distill on, some of them several times", min=1)] = 10_000_000,
    learning_rate: Annotated[float, typer.Option(help="of distilling, its largest value", min=0)] = 3e-4,
    train: Annotated[Literal["all", "grouped"], typer.Option(help="layers that distilling trains")] = "all",
    lora: Annotated[
        int | None, typer.Option(help="distill adapters of this rank instead of whole weights", min=1)
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="windows that are trained on at once; default: what the memory allows", min=1)
    ] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="train with less memory, more slowly")] = False,
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
    given = load_plan(plan_path)
    plan = given.without_recovery()
    if plan is not given:
        logger.info("%s was repaired already; the repair begins again from the unmodified weights", plan_path)
    if plan.num_joins == 0 and plan.num_dropped == 0:
        raise PlanError(
            f"{plan_path}: the plan joins and drops nothing, so there is nothing to recover; give a plan with groups"
        )
    check_target(out)
    settings = {
        "num_tokens": tokens,
        "learning_rate": learning_rate,
        "train": train,
        "lora_rank": lora,
        "micro_batch": micro_batch,
        "checkpointing": checkpointing,
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
    target = _resolve_rank_device(device)
    if dtype == "auto" and not trust_remote_code and fits_in_float32(resolve_source_of_plan(plan, model), target):
        dtype = "float32"  # the weights are written in it, and rounded once when they are exported
    loaded = load_model_of_plan(
        plan,
        model=model,
        device=target,
        dtype=resolve_dtype(dtype, target),
        trust_remote_code=trust_remote_code,
        check=texts.check_config,
    )
    began = time.monotonic()
    calibration, unseen = texts.build(loaded)
    repair = _refit(loaded, plan, calibration, passes=passes)
    if method == "distill":
        repair = _distill(loaded, plan, calibration, repair, settings=settings, checkpoints=_name_checkpoints(out))
        if not is_first:
            return {"recovered": None}
    seconds = time.monotonic() - began
    losses = _measure(loaded, plan, repair, unseen)
    recovery = _build_recovery(method, repair, calibration, losses, loaded, seconds=seconds)
    _write(out, plan, loaded, repair, recovery)
    return Answer(_build_document(plan_path, out, recovery), _build_table(recovery))


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


def _refit(loaded: LoadedModel, plan: Plan, windows: Windows, *, passes: int) -> _Repair:
    from lpsearch.recovery import Refitter

    with show_steps("refitting") as on_step:
        refit = Refitter(loaded.model, windows, num_passes=passes).fit(plan, on_progress=on_step)
    for name in refit.not_fitted:
        logger.warning("%s has no output projection that could be fitted; it stays as it is", name)
    logger.info("refitted %d of %d products", sum(p.ridge is not None for p in refit.products), len(refit.products))
    num_tokens = windows.num_windows * windows.seq_len * passes
    return _Repair(refit.weights, num_tokens, None, {"passes": passes})


def _distill(
    loaded: LoadedModel,
    plan: Plan,
    windows: Windows,
    refit: _Repair,
    *,
    settings: Mapping[str, Any],
    checkpoints: Path,
) -> _Repair:
    from lpsearch.data import Windows
    from lpsearch.recovery.distill import DistillSettings, distill
    from lpsearch.recovery.mixture import Mixture

    training, validation = {}, {}
    for part in windows.split_kinds():
        num_kept = part.num_windows - max(1, part.num_windows // _VALIDATION_SHARE)
        training[part.spec] = Windows(part.input_ids[:num_kept], part.spec)
        validation[part.spec] = Windows(part.input_ids[num_kept:], part.spec)
    mixture = Mixture(training, {kind.spec: kind.weight for kind in windows.kinds})
    reported = 0.0

    def report(step: int, steps: int, training_kl: float, recovered: float) -> None:
        nonlocal reported
        on_step(step, steps)
        if recovered != reported:
            reported = recovered
            message = "step %d of %d: KL %.4f nats per token on training text, %.1f %% won back on validation windows"
            logger.info(message, step, steps, training_kl, 100 * recovered)

    with show_steps("distilling") as on_step:
        distilled = distill(
            loaded.model,
            plan,
            training=mixture,
            validation=validation,
            settings=DistillSettings(**settings),
            weights=refit.weights,
            checkpoint_dir=checkpoints,
            on_progress=report,
        )
    logger.info(
        "distilled %d steps (%s); the best is step %d: KL on validation windows is down by %.1f %%",
        distilled.steps,
        distilled.stopped,
        distilled.best_step,
        100 * distilled.recovered,
    )
    weights = {name: weight.to(loaded.model.device) for name, weight in distilled.weights.items()}
    recorded = {name: value for name, value in settings.items() if value is not None}
    return _Repair(weights, refit.num_tokens + distilled.tokens, distilled.steps, {**refit.settings, **recorded})


def _measure(loaded: LoadedModel, plan: Plan, repair: _Repair, windows: Windows) -> tuple[RecoveredLoss, ...]:
    """Measure the plan with and without the repair on windows of every kind.

    Raises:
        LpsearchError: if the repair does not help on average, so that nothing is written.
    """
    from lpsearch.evaluation import ModelEvaluator, compute_paired_delta
    from lpsearch.recovery import swapped_weights

    evaluator = ModelEvaluator(model=loaded.model, windows=windows)
    bare = Plan(plan.groups)  # whose model was checked when it was loaded
    indices = range(windows.num_windows)
    with show_steps("measuring what was won back") as on_step:
        base = evaluator.evaluate_windows(Plan.baseline(plan.num_layers), indices).nll_nats_per_token
        on_step(1, 3)
        untouched = evaluator.evaluate_windows(bare, indices).nll_nats_per_token
        on_step(2, 3)
        with swapped_weights(loaded.model, repair.weights):
            repaired = evaluator.evaluate_windows(bare, indices, variant="repaired").nll_nats_per_token
        on_step(3, 3)
    losses = []
    for number, part in enumerate(windows.split_kinds()):
        chosen = slice(number, None, len(windows.kinds))
        before = compute_paired_delta(untouched[chosen], base[chosen])
        after = compute_paired_delta(repaired[chosen], base[chosen])
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


def _build_recovery(
    method: Method,
    repair: _Repair,
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
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        device=describe_device(loaded.model.device),
        versions=read_versions(),
    )


def _write(out: Path, plan: Plan, loaded: LoadedModel, repair: _Repair, recovery: Recovery) -> None:
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


def _build_table(recovery: Recovery) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, title="loss against the unmodified model, nats per token")
    for name in ("held-out text", "plan", "repaired", "won back"):
        table.add_column(name, justify="left" if name == "held-out text" else "right")
    for loss in recovery.losses:
        error = "" if loss.delta_nll_se is None else f" ± {loss.delta_nll_se:.4f}"
        share = "-" if loss.recovered_share is None else f"{loss.recovered_share:.0%}"
        table.add_row(loss.data, f"{loss.untouched_delta_nll:+.4f}", f"{loss.delta_nll:+.4f}{error}", share)
    return table
