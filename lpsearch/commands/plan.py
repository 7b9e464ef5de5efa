"""``lpsearch plan``: look at plan files."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from lpsearch.commands.console import Answer, get_output
from lpsearch.commands.facts import Facts, Row
from lpsearch.commands.options import PlanArgument
from lpsearch.commands.plan_facts import describe_difference, describe_pick, describe_plan
from lpsearch.errors import LpsearchError, StudyError, UsageError
from lpsearch.front_file import FRONT_NAME, FrontFile, FrontPoint, load_front_file
from lpsearch.latency.profile import describe_profile_error
from lpsearch.picking import has_gain, pick_plan
from lpsearch.plan import build_plan_document, build_plan_schema, load_plan
from lpsearch.wording import (
    describe_changes,
    describe_layers,
    describe_repair,
    describe_speedup,
    describe_unfinished,
    name_count,
)

if TYPE_CHECKING:
    from lpsearch.report import StudyReport
    from lpsearch.search import TrialResult

__all__ = ["diff", "pick", "schema", "show", "validate"]

logger = logging.getLogger(__name__)


def show(plan_path: PlanArgument) -> Answer:
    """Show a plan: its groups, what it leaves out, its model and what was measured."""
    plan = load_plan(plan_path)
    assert plan.metadata is not None  # a plan file has it
    latency = plan.metadata.metrics.latency
    _warn_of_latency(None if latency is None else latency.mean_error, plan_path)
    repair = describe_repair(plan, plan_path)
    if repair is not None:
        logger.info("%s", repair)
    if _is_unfinished(plan_path):
        logger.warning("%s", describe_unfinished(plan_path.parent.parent))
    return Answer(build_plan_document(plan), describe_plan(plan, plan_path))


def validate(
    plan_path: PlanArgument,
    model: Annotated[
        str | None,
        typer.Option(
            help="model to compare with: alias, hub id, directory or .gguf file; default: none", metavar="MODEL"
        ),
    ] = None,
) -> Answer:
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
    document = {
        "plan": str(plan_path),
        "valid": True,
        "num_layers": plan.num_layers,
        "depth": plan.depth,
        "model": model,
    }
    compare = "`lpsearch plan validate PLAN --model MODEL`"
    rows: list[Row] = [
        ("plan", plan_path),
        ("valid", "yes" if model is None else f"yes, for {model}"),
        ("note", f"the file alone was checked; {compare} compares a model with it too" if model is None else None),
        ("depth", f"{plan.depth:g} of {name_count(plan.num_layers, 'layer')}"),
    ]
    return Answer(document, Facts(rows))


def diff(first: PlanArgument, second: PlanArgument) -> Answer:
    """Show the joins and the dropped branches in which two plans differ."""
    plans = load_plan(first), load_plan(second)
    if plans[0].num_layers != plans[1].num_layers:
        raise UsageError(
            f"{first} is for {plans[0].num_layers} layers and {second} for {plans[1].num_layers}; "
            "only plans of one model can be compared"
        )
    joins = set(plans[0].joins), set(plans[1].joins)
    dropped = [{branch: set(layers) for branch, layers in plan.dropped.items()} for plan in plans]
    document = {
        "first": str(first),
        "second": str(second),
        "joins_only_in_first": sorted(joins[0] - joins[1]),
        "joins_only_in_second": sorted(joins[1] - joins[0]),
        "joins_in_both": sorted(joins[0] & joins[1]),
        "dropped_only_in_first": {branch: sorted(dropped[0][branch] - dropped[1][branch]) for branch in dropped[0]},
        "dropped_only_in_second": {branch: sorted(dropped[1][branch] - dropped[0][branch]) for branch in dropped[0]},
        "dropped_in_both": {branch: sorted(dropped[0][branch] & dropped[1][branch]) for branch in dropped[0]},
    }
    return Answer(document, describe_difference(document, first, second))


def pick(
    study_dir: Annotated[Path, typer.Argument(help="directory that optimize wrote", metavar="STUDY_DIR")],
    max_delta: Annotated[
        float | None, typer.Option(help="largest loss, by the search's metric, in nats per token")
    ] = None,
    min_speedup: Annotated[float | None, typer.Option(help="smallest speed-up, e.g. 1.05")] = None,
) -> Answer:
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
    index = pick_plan(
        file.front,
        metric=file.metric or "nll",
        objective=file.objective,
        max_loss=max_delta,
        min_speedup=min_speedup,
        margin=file.speedup_margin,
    )
    if index is None:
        raise UsageError(_describe_nothing(file, study_dir, max_loss=max_delta, min_speedup=min_speedup))
    point = file.front[index]
    if not _is_changed(point):
        logger.warning("no other plan of %s meets that; this is the unmodified model", study_dir)
    elif point.speedup is not None and file.speedup_margin is not None and not has_gain(point, file.speedup_margin):
        logger.warning(
            "its speed-up, %s, is within what such estimates may be off, so it gains nothing that could be measured",
            describe_speedup(point.speedup, file.speedup_margin),
        )
    if not file.finished:
        logger.warning("%s", describe_unfinished(study_dir))
    _warn_of_latency(file.latency_error, study_dir / FRONT_NAME)
    front = [point.model_dump(mode="json", exclude_unset=True) for point in file.front]
    path = study_dir / point.plan
    picked = {**front[index], "plan": str(path), **({} if file.finished else {"finished": False})}
    ways: dict[str, str] = {}
    if max_delta is not None and any(other.num_dropped for other in file.front):
        compared, ways = _list_ways(study_dir, max_delta)
        picked |= compared
    if file.recover != "off":
        picked["recover"] = file.recover
        if _is_changed(point):
            command = shlex.join(["lpsearch", "recover", picked["plan"], "--method", file.recover, "--out"])
            logger.info("its loss is that after a %s of the weights: `%s DIR` writes them", file.recover, command)
    return Answer(picked, describe_pick(point, path, file, ways=ways))


def _is_unfinished(plan_path: Path) -> bool:
    """Tell whether a plan file is of a front that is marked unfinished."""
    if plan_path.parent.name != "plans":
        return False
    try:
        file = load_front_file(plan_path.parent.parent)
    except StudyError:
        return False
    name = f"plans/{plan_path.name}"
    return file is not None and not file.finished and any(point.plan == name for point in file.front)


def _describe_nothing(file: FrontFile, study_dir: Path, *, max_loss: float | None, min_speedup: float | None) -> str:
    """Say that no plan of a front meets the limits, and how far from them its plans are."""
    metric = file.metric or "nll"
    wanted, found = [], []
    if max_loss is not None:
        least = min(file.front, key=lambda point: point.get_reported_cost(metric))
        wanted.append(f"loses at most {max_loss:g} nats per token")
        found.append(f"the least loss is {least.get_reported_cost(metric):.4f} ({least.plan})")
    if min_speedup is not None:
        timed = [point for point in file.front if point.speedup is not None]
        fastest = max(timed, key=lambda point: point.speedup or 0.0, default=None)
        wanted.append(f"is at least {min_speedup:g}x as fast")
        found.append(
            "no speed-up is known, since the search ran with latency off"
            if fastest is None
            else f"the largest speed-up is {fastest.speedup:.3f}x, at a loss of "
            f"{fastest.get_reported_cost(metric):.4f} ({fastest.plan})"
        )
    return f"{study_dir}: no plan of its front {' and '.join(wanted)}; {' and '.join(found)}"


def _list_ways(study_dir: Path, max_loss: float) -> tuple[dict[str, Any], dict[str, str]]:
    """Find what joins alone, drops alone and both save most within a loss.

    Returns:
        The entry for programs and, by way, the words for people; both empty where the study is elsewhere.
    """
    from lpsearch.commands.console import adopt_optuna_log
    from lpsearch.commands.studies import open_existing_study
    from lpsearch.report import load_report
    from lpsearch.report.advice import compare_ways

    if not (study_dir / "study.db").is_file():
        logger.info("%s: holds no study.db, so joins and drops are not compared", study_dir)
        return {}, {}
    adopt_optuna_log()
    try:
        with open_existing_study(study_dir, storage=None, study=None) as store:
            report = load_report(store, study_dir)
    except LpsearchError as error:
        logger.warning("%s; joins and drops are not compared", error)
        return {}, {}
    ways = compare_ways(report.results, metric=report.metric, objective=report.objective, max_loss=max_loss)
    words = {}
    for name, found in ways.items():
        saved = "nothing" if found is None else f"{found.depth_reduction:.1%} less depth"
        if found is not None and found.speedup is not None:
            saved = f"{found.speedup:.3f}x"
        words[name] = (
            saved if found is None else f"{saved}, {describe_changes(found.plan)}: {describe_layers(found.plan)}"
        )
    return {"ways": {name: None if found is None else _build_way(report, found) for name, found in ways.items()}}, words


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


def schema() -> dict[str, Any] | Answer:
    """Print the JSON Schema of the plan file."""
    document = build_plan_schema()
    if get_output().tables is None:
        return document
    return Answer(document, Text(json.dumps(document, indent=2), no_wrap=True, overflow="ignore"))
