"""The data of every figure as a table of words, for screen readers and for copying."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lpsearch.errors import ConfigError
from lpsearch.report.advice import LOSS_LIMITS, compare_ways
from lpsearch.report.effects import describe_choice
from lpsearch.report.figures import describe_groups
from lpsearch.report.front_columns import format_loss, list_front_columns
from lpsearch.report.kind_figure import list_kinds
from lpsearch.report.latency_figures import (
    compute_breakdown,
    describe_kind,
    describe_workload,
    list_fitted_points,
)
from lpsearch.report.progress import get_saving
from lpsearch.report.search_figures import choose_best_lines, name_best_line
from lpsearch.report.study import StudyReport, name_row
from lpsearch.search import TrialResult
from lpsearch.wording import describe_changes, format_value

__all__ = [
    "Table",
    "build_breakdown_table",
    "build_effects_table",
    "build_fit_table",
    "build_front_table",
    "build_interactions_table",
    "build_kinds_table",
    "build_layers_table",
    "build_progress_table",
    "build_ways_table",
]

MAX_INTERACTIONS = 40
"""Interactions in the table, the strongest first."""


@dataclass(frozen=True)
class Table:
    """Rows of words.

    Attributes:
        caption: what they say.
        columns: their names.
        rows: the first cell of each names the row.
        selects: the rows are the plans of the front, in its order.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    selects: bool = False


def build_front_table(report: StudyReport) -> Table:
    """List the front."""
    columns = list_front_columns(report.front, metric=report.metric)
    columns.pop("delta nll", None)  # not what was searched
    names = [name_row(report, result) for result in report.front]
    if report.row_title == "joins":
        columns["joins"] = names
    else:  # the names count the joins and the drops
        del columns["joins"], columns["drops"]
        columns = {report.row_title: names, **columns}
    if report.blocks:
        losses = {block.num_joins: f"{block.get_cost(report.metric):.4f}" for block in report.blocks}
        columns["best block"] = [
            "" if result.num_dropped else losses.get(result.num_joins, "") for result in report.front
        ]
    cached = [report.estimate_kv_bytes_per_token(result.plan) for result in report.front]
    if len(set(cached)) > 1:
        columns["KV bytes a token"] = ["" if size is None else f"{size:,}" for size in cached]
    columns[_name_layers(report)] = [describe_groups(result.plan) for result in report.front]
    losses_named = "losses" if report.metric == "nll" else "KL divergences as losses,"
    rows = list(zip(*columns.values(), strict=True))
    return Table(f"The front; {losses_named} in nats per token", list(columns), rows, selects=True)


WAY_NAMES = {"joins": "joins alone", "drops": "drops alone", "both": "both"}


def build_ways_table(report: StudyReport) -> Table:
    """List what joins alone, drops alone and both save most within each loss of the advice."""
    rows = []
    for limit in LOSS_LIMITS.values():
        ways = compare_ways(report.results, metric=report.metric, objective=report.objective, max_loss=limit)
        savings = {
            name: get_saving(result, report.baseline, report.objective)
            for name, result in ways.items()
            if result is not None
        }
        best = max(savings, key=savings.__getitem__, default="")
        cells = [_describe_way(report, result) for result in ways.values()]
        rows.append([f"{limit} nats", *cells, WAY_NAMES.get(best, "")])
    saved = "least depth" if report.objective == "depth" else "fastest"
    title = f"Of all {len(report.results)} plans of the study, the {saved} of each kind that loses at most so much"
    return Table(title, ["at most", *WAY_NAMES.values(), saved], rows)


def _describe_way(report: StudyReport, result: TrialResult | None) -> str:
    if result is None:
        return "no plan"
    saved = f"{result.speedup:.3f}x" if report.objective == "latency" else f"{result.depth_reduction:.1%} less depth"
    return f"{saved} at {result.get_reported_cost(report.metric):.4f}: {describe_changes(result.plan)}"


def build_kinds_table(report: StudyReport) -> Table:
    """List the losses by kind of text."""
    columns = {report.row_title: [name_row(report, result) for result in report.front]}
    for losses, suffix in (
        ([result.loss for result in report.front], ""),
        ([result.heldout for result in report.front], ", held out"),
    ):
        for index, name in enumerate(list_kinds(losses)):
            columns[name + suffix] = [
                "" if loss is None or not loss.by_kind else format_loss(loss.by_kind[index].loss, report.metric)
                for loss in losses
            ]
    return Table("Loss by kind of text, in nats per token", list(columns), list(zip(*columns.values(), strict=True)))


def build_layers_table(report: StudyReport) -> Table:
    """List the groups of every plan of the front, and what it leaves out."""
    rows = [[name_row(report, result), str(result.plan.depth), describe_groups(result.plan)] for result in report.front]
    caption = "Layers that run in parallel" + ("" if report.row_title == "joins" else ", and branches left out")
    return Table(caption, [report.row_title, "depth", _name_layers(report)], rows, selects=True)


def _name_layers(report: StudyReport) -> str:
    return "layers together" if report.row_title == "joins" else "layers together, branches left out"


def build_effects_table(report: StudyReport) -> Table:
    """List what every choice costs alone."""
    effects = report.effects
    assert effects is not None
    rows = [
        [describe_choice(choice), "" if value is None else format_value(value, error), f"{expected:.4f}"]
        for choice, value, error, expected in zip(
            effects.choices, effects.measured, effects.measured_se, effects.expected, strict=True
        )
    ]
    return Table("Loss of each choice alone, in nats per token", ["choice", "measured", "expected"], rows)


def build_interactions_table(report: StudyReport) -> Table:
    """List the strongest interactions."""
    effects = report.effects
    assert effects is not None
    pairs = [
        (first, second, value)
        for first, row in enumerate(effects.interactions)
        for second, value in enumerate(row)
        if first < second and value is not None
    ]
    names = [describe_choice(choice) for choice in effects.choices]
    pairs = sorted(pairs, key=lambda pair: -abs(pair[2]))[:MAX_INTERACTIONS]
    rows = [[f"{names[first]}, {names[second]}", f"{value:+.4f}"] for first, second, value in pairs]
    return Table("The strongest interactions, in nats per token", ["choices", "beyond the sum of each alone"], rows)


def build_progress_table(report: StudyReport) -> Table:
    """List the trials after which the hypervolume rose, and the last."""
    shown = choose_best_lines(report)
    rows = []
    former = None
    for step in report.progress:
        if step.hypervolume != former or step is report.progress[-1]:
            best = [f"{step.best[k]:.4f}" if k in step.best else "" for k in shown]
            rows.append([str(step.trial), f"{step.tokens:,}", f"{step.hypervolume:.5f}", *best])
        former = step.hypervolume
    columns = ["trial", "tokens", "hypervolume", *(name_best_line(report, level) for level in shown)]
    by = "what is saved" if report.has_drops else "number of joins"
    return Table(f"Trials that improved the front, and the least loss by {by}", columns, rows)


def build_fit_table(report: StudyReport) -> Table:
    """List what was measured beside what is predicted."""
    assert report.latency_model is not None
    rows = [
        [
            point.groups,
            describe_workload(workload),
            "fitted" if point.use == "fit" else "checked",
            f"{point.median_ms:.3f}",
            f"{point.p10_ms:.3f} to {point.p90_ms:.3f}",
            f"{point.predicted_ms:.3f}",
            f"{point.error:+.1%}",
        ]
        for workload in report.latency_model.profile.workloads
        for point in list_fitted_points(workload)
    ]
    columns = ["groups", "workload", "use", "measured ms", "p10 to p90", "predicted ms", "error"]
    return Table("Measured times and predictions", columns, rows)


def build_breakdown_table(report: StudyReport) -> Table:
    """List where the time of every plan of the front goes, for the workload that the search used."""
    assert report.latency_model is not None
    profile, workload = report.latency_model.profile, report.latency_model.workload
    found = []
    for result in report.front:
        try:
            found.append((result, compute_breakdown(workload, profile.geometry, result.plan)))
        except ConfigError:
            continue
    # Where branches may be dropped there are many kinds of group, most of which no plan has.
    kinds = [kind for kind in workload.cost_ms if "," not in kind or any(parts[kind] for _, parts in found)]
    rows = [
        [
            name_row(report, result),
            *(f"{parts[cause]:.3f}" for cause in ("overhead", *kinds)),
            f"{sum(parts.values()):.3f}",
        ]
        for result, parts in found
    ]
    columns = [report.row_title, "overhead ms", *(f"{describe_kind(kind)} ms" for kind in kinds), "sum ms"]
    return Table(f"Estimated time of a step: {describe_workload(workload)}", columns, rows)
