"""``lpsearch plan``: look at plan files."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lpsearch.commands.options import ModelOption, PlanArgument
from lpsearch.errors import LpsearchError, StudyError, UsageError
from lpsearch.front_file import FRONT_NAME, FrontPoint, load_front_file
from lpsearch.latency.profile import describe_profile_error
from lpsearch.picking import pick_plan
from lpsearch.plan import build_plan_document, build_plan_schema, load_plan
from lpsearch.wording import describe_changes, describe_layers, describe_repair

if TYPE_CHECKING:
    from lpsearch.report import StudyReport
    from lpsearch.search import TrialResult

__all__ = ["diff", "pick", "schema", "show", "validate"]

logger = logging.getLogger(__name__)


def show(plan_path: PlanArgument) -> dict[str, Any]:
    """Print a plan: its groups, what it leaves out, its model and what was measured."""
    plan = load_plan(plan_path)
    assert plan.metadata is not None  # a plan file has it
    latency = plan.metadata.metrics.latency
    _warn_of_latency(None if latency is None else latency.mean_error, plan_path)
    repair = describe_repair(plan, plan_path)
    if repair is not None:
        logger.info("%s", repair)
    logger.info("%s: %s", describe_changes(plan), describe_layers(plan) or "every layer alone")
    if latency is not None and latency.kv_bytes_per_token is not None:
        logger.info(
            "KV cache: %s bytes a token%s",
            f"{latency.kv_bytes_per_token:,}",
            ""
            if latency.baseline_kv_bytes_per_token is None
            else f", of the unmodified model {latency.baseline_kv_bytes_per_token:,}",
        )
    return build_plan_document(plan)


def validate(plan_path: PlanArgument, model: ModelOption = None) -> dict[str, Any]:
    """Check a plan file, and with --model that it is for that model."""
    plan = load_plan(plan_path)
    if model is not None:
        import torch

        from lpsearch.commands.checks import read_config
        from lpsearch.models import load_model, resolve_source
        from lpsearch.recovery import read_recovery
        from lpsearch.transform import check_plan_layers, check_plan_model

        source = resolve_source(model)
        config = read_config(source)
        if config is not None:  # before anything is fetched
            check_plan_layers(plan, config)
        loaded = load_model(
            source,
            device="cpu",
            dtype=torch.float32,
            before_weights=lambda config, tokenizer: check_plan_layers(plan, config),
        )
        check_plan_model(plan.without_recovery(), loaded.model)
        read_recovery(loaded.model, plan, plan_path)
    return {"plan": str(plan_path), "valid": True, "num_layers": plan.num_layers, "depth": plan.depth, "model": model}


def diff(first: PlanArgument, second: PlanArgument) -> dict[str, Any]:
    """Print the joins and the dropped branches in which two plans differ."""
    plans = load_plan(first), load_plan(second)
    if plans[0].num_layers != plans[1].num_layers:
        raise UsageError(
            f"{first} is for {plans[0].num_layers} layers and {second} for {plans[1].num_layers}; "
            "only plans of one model can be compared"
        )
    joins = set(plans[0].joins), set(plans[1].joins)
    dropped = [{branch: set(layers) for branch, layers in plan.dropped.items()} for plan in plans]
    return {
        "first": str(first),
        "second": str(second),
        "joins_only_in_first": sorted(joins[0] - joins[1]),
        "joins_only_in_second": sorted(joins[1] - joins[0]),
        "joins_in_both": sorted(joins[0] & joins[1]),
        "dropped_only_in_first": {branch: sorted(dropped[0][branch] - dropped[1][branch]) for branch in dropped[0]},
        "dropped_only_in_second": {branch: sorted(dropped[1][branch] - dropped[0][branch]) for branch in dropped[0]},
        "dropped_in_both": {branch: sorted(dropped[0][branch] & dropped[1][branch]) for branch in dropped[0]},
    }


def pick(
    study_dir: Annotated[Path, typer.Argument(help="directory that optimize wrote", metavar="STUDY_DIR")],
    max_delta: Annotated[
        float | None, typer.Option(help="largest loss, by the search's metric, in nats per token")
    ] = None,
    min_speedup: Annotated[float | None, typer.Option(help="smallest speed-up")] = None,
) -> dict[str, Any]:
    """Pick the plan of a study's front that saves most within a loss, or loses least beyond a speed-up.

    Of a search that allows drops, `ways` says what joins alone, drops alone and both give within the loss, by all plans
    of the study. What is saved is what the search traded: depth, or latency. The loss is held out where that is known.
    The unmodified model is picked only where no other plan meets the limits.
    """
    if max_delta is None and min_speedup is None:
        raise UsageError("say what you need: --max-delta NATS, --min-speedup X, or both")
    if not study_dir.is_dir():
        raise UsageError(f"{study_dir}: no such directory; give one that `lpsearch optimize` wrote")
    file = load_front_file(study_dir)
    if file is None:
        raise StudyError(f"{study_dir / FRONT_NAME}: not there; run `lpsearch optimize --out {study_dir}` first")
    if file.metric is None and any(point.kl_nats_per_token is not None for point in file.front):
        logger.warning(
            "%s: written by an older lpsearch, without held-out divergences, so the added nll decides; run the same "
            "`lpsearch optimize` again to rewrite it",
            study_dir / FRONT_NAME,
        )
    front = [point.model_dump(mode="json", exclude_unset=True) for point in file.front]
    index = pick_plan(
        file.front,
        metric=file.metric or "nll",
        objective=file.objective,
        max_loss=max_delta,
        min_speedup=min_speedup,
    )
    if index is None:
        raise UsageError(f"no plan of {study_dir} meets that; its front: {json.dumps(front)}")
    if not _is_changed(file.front[index]):
        logger.warning("no other plan of %s meets that; this is the unmodified model", study_dir)
    _warn_of_latency(file.latency_error, study_dir / FRONT_NAME)
    picked = {**front[index], "plan": str(study_dir / file.front[index].plan)}
    if max_delta is not None and any(point.num_dropped for point in file.front):
        picked |= _list_ways(study_dir, max_delta)
    if file.recover == "off":
        return picked
    if _is_changed(file.front[index]):
        command = shlex.join(["lpsearch", "recover", picked["plan"], "--method", file.recover, "--out"])
        logger.info("its loss is that after a %s of the weights: `%s DIR` writes them", file.recover, command)
    return {**picked, "recover": file.recover}


def _list_ways(study_dir: Path, max_loss: float) -> dict[str, Any]:
    """Return what joins alone, drops alone and both save most within a loss; nothing where the study is elsewhere."""
    from lpsearch.commands.console import adopt_optuna_log
    from lpsearch.commands.studies import open_existing_study
    from lpsearch.report import load_report
    from lpsearch.report.advice import compare_ways

    if not (study_dir / "study.db").is_file():
        logger.info("%s: holds no study.db, so joins and drops are not compared", study_dir)
        return {}
    adopt_optuna_log()
    try:
        with open_existing_study(study_dir, storage=None, study=None) as store:
            report = load_report(store, study_dir)
    except LpsearchError as error:
        logger.warning("%s; joins and drops are not compared", error)
        return {}
    ways = compare_ways(report.results, metric=report.metric, objective=report.objective, max_loss=max_loss)
    for name, found in ways.items():
        saved = "nothing" if found is None else f"{found.depth_reduction:.1%} less depth"
        if found is not None and found.speedup is not None:
            saved = f"{found.speedup:.3f}x"
        changes = "" if found is None else f", {describe_changes(found.plan)}: {describe_layers(found.plan)}"
        logger.info("%s within %s nats: %s%s", name, max_loss, saved, changes)
    return {"ways": {name: None if found is None else _build_way(report, found) for name, found in ways.items()}}


def _build_way(report: StudyReport, result: TrialResult) -> dict[str, Any]:
    return {
        "groups": result.plan.to_lists(),
        "dropped": result.plan.dropped,
        "depth_reduction": result.depth_reduction,
        "loss": result.get_reported_cost(report.metric),
        "speedup": result.speedup,
        "trial": result.trial,
        "plan": None if result.plan_file is None else str(Path(report.directory) / result.plan_file),
    }


def _is_changed(point: FrontPoint) -> bool:
    return bool(point.num_joins or point.num_dropped)


def _warn_of_latency(mean_error: float | None, path: Path) -> None:
    """Warn where the speed-ups in a file come from a latency profile that is far off."""
    warning = describe_profile_error(mean_error, name=str(path))
    if warning is not None:
        logger.warning("%s", warning)


def schema() -> dict[str, Any]:
    """Print the JSON Schema of the plan file."""
    return build_plan_schema()
