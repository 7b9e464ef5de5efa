"""What to do next: three plans to pick from a front, what else was possible, and the commands that use a plan."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from lpsearch.config import Metric, Objective
from lpsearch.picking import has_gain, pick_plan
from lpsearch.report.progress import get_saving
from lpsearch.report.study import StudyReport
from lpsearch.search import TrialResult
from lpsearch.search.results import RAW
from lpsearch.wording import describe_speedup

__all__ = [
    "LOSS_LIMITS",
    "REPAIR",
    "Command",
    "Pick",
    "compare_ways",
    "describe_no_gain",
    "list_commands",
    "pick_plans",
]

LOSS_LIMITS = {"free": 0.02, "balanced": 0.1, "fast": 0.4}
"""Largest loss in nats per token of each pick: 2, 11 and 49 % more perplexity."""


REPAIR = "repair its weights"
"""Purpose of the command that comes first where losses are those of repaired weights."""


@dataclass(frozen=True)
class Pick:
    """A plan that a user would pick.

    Attributes:
        name: ``free``, ``balanced`` or ``fast``.
        max_loss: largest loss that it may have, in nats per token.
        index: place of the plan on the front; None where no plan of the front but the unmodified model loses so little,
            or where time is what is saved and no such plan is measurably faster.
        gains: whether the plan, or any plan within the loss, is faster than the unmodified model by more than speed-ups
            may be off; None where no time is known, or no plan loses so little.
    """

    name: str
    max_loss: float
    index: int | None
    gains: bool | None = None


Ways = dict[str, TrialResult | None]
"""The best plan of ``joins`` alone, of ``drops`` alone and of ``both`` together."""


@dataclass(frozen=True)
class Command:
    """A command line.

    Attributes:
        purpose: what it does, in a few words.
        line: what to type, where ``optimize`` was run.
    """

    purpose: str
    line: str


def pick_plans(report: StudyReport) -> tuple[Pick, ...]:
    """Pick the plan that saves most within each loss limit, as ``lpsearch plan pick DIR --max-delta NATS`` does.

    Where only the unmodified model loses so little, nothing is picked; ``plan pick`` says so and returns that model.
    The loss is the one that was searched, held out where that is known. What is saved is what the study trades against
    it: depth, or estimated time.

    Args:
        report: the study.
    """
    return tuple(_pick(report, name, limit) for name, limit in LOSS_LIMITS.items())


def describe_no_gain(report: StudyReport) -> str | None:
    """Say that no plan of a front is measurably faster, and what would be; None where one is, or no time is known.

    Plans count whose loss is within the largest limit of :data:`LOSS_LIMITS`.

    Args:
        report: the study.
    """
    model, limit = report.latency_model, max(LOSS_LIMITS.values())
    within = _list_within(report, limit)
    if model is None or not report.has_latency or not within:
        return None
    if any(has_gain(result, report.speedup_margin) for result in within):
        return None
    fastest = max(result.speedup or 0.0 for result in within)
    is_cpu = model.profile.device.startswith("cpu")
    gpus = "GPUs" if is_cpu else "more GPUs"
    helps = [
        f"{gpus} (the gain of joins grows with their number; measure there with `lpsearch profile`, and give the file "
        "to --latency)"
    ]
    if not report.has_drops:
        helps.append("dropping attentions or MLPs (--allow joins,drops)")
    if not report.is_repaired:
        helps.append("repair (--recover refit), which lets a plan change more at the same loss")
    return (
        f"This machine gains nothing that could be measured: within {limit} nats the fastest plan is "
        f"{describe_speedup(fastest, report.speedup_margin)}. What would help: {'; '.join(helps)}."
    )


def compare_ways(results: Sequence[TrialResult], *, metric: Metric, objective: Objective, max_loss: float) -> Ways:
    """Find what joins alone, drops alone and both together save most within a loss.

    Args:
        results: finished plans, the unmodified model among them; of all, not only of the front, since the best plan of
            one way may be beaten by one of another.
        metric: which loss counts, held out where that is known.
        objective: what is saved: depth, or estimated time.
        max_loss: largest loss, in nats per token.

    Returns:
        For each way its best plan; None where no plan of that way saves anything within the loss.
    """
    baseline = next(result for result in results if result.is_baseline)
    saving = [
        result for result in results if result.state == "complete" and get_saving(result, baseline, objective) > 0
    ]
    ways: Ways = {}
    for name, joins, drops in (("joins", True, False), ("drops", False, True), ("both", True, True)):
        of_way = [r for r in saving if (r.num_joins > 0) == joins and (r.num_dropped > 0) == drops]
        index = pick_plan(of_way, metric=metric, objective=objective, max_loss=max_loss)
        ways[name] = None if index is None else of_way[index]
    return ways


def list_commands(report: StudyReport, result: TrialResult) -> tuple[Command, ...]:
    """Return the commands that evaluate, try, export and serve a plan; none where its plan file is not written.

    Where its loss is that after a refit, they take the directory that the first of them writes.

    Args:
        report: the study.
        result: the plan.
    """
    if result.plan_file is None:
        return ()
    plan = str(PurePath(report.directory) / result.plan_file)
    exported = str(PurePath(report.directory) / f"exported-{PurePath(result.plan_file).stem}")
    repair: dict[str, list[str]] = {}
    if result.variant != RAW:
        repaired = str(PurePath(report.directory) / f"repaired-{PurePath(result.plan_file).stem}")
        repair = {REPAIR: ["lpsearch", "recover", plan, "--method", result.variant, "--out", repaired]}
        plan = repaired
    settings = report.settings
    data = settings.get("heldout") or settings.get("data")
    evaluate = ["lpsearch", "evaluate", plan]
    if data is not None:
        evaluate += [word for text in ([data] if isinstance(data, str) else data) for word in ("--data", str(text))]
        evaluate += ["--windows", str(settings["windows"]), "--seq-len", str(settings["seq_len"])]
    lines = {
        **repair,
        "repeat the held-out loss": evaluate,
        "see the text it writes": ["lpsearch", "generate", plan, "--prompt", "The capital of France is", "--compare"],
        "export a fused checkpoint": ["lpsearch", "export", plan, exported],
        "run the checkpoint": ["lpsearch", "generate", exported, "--prompt", "The capital of France is"],
    }
    serve = "vllm serve " + shlex.quote(exported) + " --trust-remote-code"
    return (*(Command(purpose, shlex.join(words)) for purpose, words in lines.items()), Command("serve it", serve))


def _pick(report: StudyReport, name: str, limit: float) -> Pick:
    margin = report.speedup_margin
    index = pick_plan(report.front, metric=report.metric, objective=report.objective, max_loss=limit, margin=margin)
    index = index if index is not None and not report.front[index].is_baseline else None
    within = _list_within(report, limit)
    if not within or not report.has_latency:
        return Pick(name, limit, index)
    if index is not None:
        return Pick(name, limit, index, has_gain(report.front[index], margin))
    return Pick(name, limit, None, any(has_gain(result, margin) for result in within))


def _list_within(report: StudyReport, limit: float) -> list[TrialResult]:
    """Return the plans of the front, but for the unmodified model, that lose no more than a limit."""
    return [
        result for result in report.front if not result.is_baseline and result.get_reported_cost(report.metric) <= limit
    ]
