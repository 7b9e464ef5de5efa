"""The charts of a report: each with what the reader may choose, a figure for every choice, and a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from lpsearch.report.figures import build_front_figure, build_layers_figure
from lpsearch.report.kind_figure import build_kinds_figure
from lpsearch.report.latency_figures import build_breakdown_figure, build_fit_figure, describe_workload
from lpsearch.report.search_figures import build_effects_figure, build_interactions_figure, build_progress_figure
from lpsearch.report.study import StudyReport
from lpsearch.report.tables import (
    Table,
    build_breakdown_table,
    build_effects_table,
    build_fit_table,
    build_front_table,
    build_interactions_table,
    build_kinds_table,
    build_layers_table,
    build_progress_table,
)

__all__ = ["Chart", "build_charts"]


@dataclass(frozen=True)
class Chart:
    """A figure with its choices and the table of its data.

    Attributes:
        name: id of its element.
        summary: what it shows, for screen readers.
        choices: what the reader can choose between: (label of the choice, its values by key).
        figures: by the keys of the choices, joined by a space.
        table: the same data.
    """

    name: str
    summary: str
    choices: Sequence[tuple[str, dict[str, str]]]
    figures: dict[str, go.Figure]
    table: Table


def build_charts(report: StudyReport) -> dict[str, Chart]:
    """Build every chart that the study has data for."""
    savings = {"depth": "depth removed", "latency": "time of a step"} if report.has_latency else {"depth": "depth"}
    if report.has_latency and report.objective == "latency":  # what was searched comes first
        savings = dict(reversed(savings.items()))
    losses = {"delta": "nats" if report.metric == "nll" else "KL"}
    if not report.is_worst_case:  # which is no perplexity
        losses["perplexity"] = "perplexity"

    def name_choice(saving: str, loss: str) -> str:
        return " ".join([saving] * (len(savings) > 1) + [loss] * (len(losses) > 1))

    charts = [
        Chart(
            "front",
            "Loss of every plan against what it saves; the front is the line of the best ones.",
            [choice for choice in (("against", savings), ("loss as", losses)) if len(choice[1]) > 1],
            {
                name_choice(saving, loss): build_front_figure(report, saving=saving, loss=loss)  # type: ignore[arg-type]
                for saving in savings
                for loss in losses
            },
            build_front_table(report),
        ),
        Chart(
            "layers",
            "The groups of layers of each plan of the front, and what it leaves out.",
            [],
            {"": build_layers_figure(report)},
            build_layers_table(report),
        ),
        Chart(
            "progress",
            "Hypervolume of the front and least loss by what is saved, over the search.",
            [("over", {"trials": "trials", "tokens": "tokens"})],
            {unit: build_progress_figure(report, unit=unit) for unit in ("trials", "tokens")},
            build_progress_table(report),
        ),
    ]
    if report.has_kinds:
        summary = "Loss of each plan of the front on each kind of text."
        charts.append(Chart("kinds", summary, [], {"": build_kinds_figure(report)}, build_kinds_table(report)))
    if report.effects is not None:
        for name, summary, build, tabulate in (
            ("effects", "Loss of each choice alone.", build_effects_figure, build_effects_table),
            (
                "interactions",
                "Interaction of pairs of choices.",
                build_interactions_figure,
                build_interactions_table,
            ),
        ):
            charts.append(Chart(name, summary, [], {"": build(report)}, tabulate(report)))
    if report.latency_model is not None:
        workloads = report.latency_model.profile.workloads
        labels = {str(index): describe_workload(workload) for index, workload in enumerate(workloads)}
        choices = [("workload", labels)] if len(labels) > 1 else []
        for name, summary, draw, list_rows in (
            ("fit", "Measured times against predicted ones.", build_fit_figure, build_fit_table),
            ("breakdown", "Time of a step by its cause.", build_breakdown_figure, build_breakdown_table),
        ):
            figures = {str(i) if choices else "": draw(report, workload_index=i) for i in range(len(workloads))}
            charts.append(Chart(name, summary, choices, figures, list_rows(report)))
    return {chart.name: chart for chart in charts}
