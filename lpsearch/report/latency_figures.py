"""Plotly figures of a latency model: how well it fits what was measured, and where the time of a step goes."""

from __future__ import annotations

from dataclasses import dataclass

import plotly.graph_objects as go

from lpsearch.errors import ConfigError
from lpsearch.latency.model import GroupCosts
from lpsearch.latency.profile import ProfileGeometry, WorkloadProfile
from lpsearch.plan import Plan
from lpsearch.report.study import StudyReport, name_row
from lpsearch.report.theme import LIGHT, Theme, style_figure

__all__ = [
    "FittedPoint",
    "build_breakdown_figure",
    "build_fit_figure",
    "compute_breakdown",
    "describe_kind",
    "describe_workload",
    "list_fitted_points",
]


@dataclass(frozen=True)
class FittedPoint:
    """A measured depth beside what the fitted model says of it.

    Attributes:
        groups: its groups, e.g. ``18 of 1 full, 6 of 2 full``.
        use: ``fit`` or ``check``.
        median_ms: measured.
        p10_ms: measured, 10th percentile.
        p90_ms: measured, 90th percentile.
        predicted_ms: by the model.
    """

    groups: str
    use: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    predicted_ms: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted_ms / self.median_ms - 1


def describe_workload(workload: WorkloadProfile) -> str:
    """Name a workload, e.g. ``decode of 1 x 1024 tokens``."""
    return f"{workload.kind} of {workload.batch_size} x {workload.context_len} tokens"


def describe_kind(kind: str) -> str:
    """Name a kind of group for people, e.g. ``group of 2 full``."""
    return f"group of {kind}"


def list_fitted_points(workload: WorkloadProfile) -> tuple[FittedPoint, ...]:
    """Return what was measured of a workload beside what its fitted costs predict."""
    costs = GroupCosts(workload.overhead_ms, workload.cost_ms)
    return tuple(
        FittedPoint(
            groups=", ".join(f"{count} of {kind}" for kind, count in point.num_groups.items() if count),
            use=point.use,
            median_ms=point.median_ms,
            p10_ms=point.p10_ms,
            p90_ms=point.p90_ms,
            predicted_ms=costs.estimate_latency_ms({k: n for k, n in point.num_groups.items() if n}),
        )
        for point in workload.points
    )


def compute_breakdown(workload: WorkloadProfile, geometry: ProfileGeometry, plan: Plan) -> dict[str, float]:
    """Split a plan's estimated time by what causes it.

    Args:
        workload: whose costs are used.
        geometry: the model's.
        plan: a plan of that model.

    Returns:
        Milliseconds of ``overhead`` and of every kind of group that the workload has costs of, in its order.

    Raises:
        ConfigError: for a group of a kind that was not measured.
    """
    counts = geometry.count_groups(plan.groups)
    GroupCosts(workload.overhead_ms, workload.cost_ms).estimate_latency_ms(counts)
    return {"overhead": workload.overhead_ms} | {
        kind: counts.get(kind, 0) * cost_ms for kind, cost_ms in workload.cost_ms.items()
    }


def build_fit_figure(report: StudyReport, *, workload_index: int = 0, theme: Theme = LIGHT) -> go.Figure:
    """Draw measured times against predicted ones; points on the line are predicted exactly.

    Args:
        report: the study, with a latency model.
        workload_index: which workload of its profile.
        theme: colours.
    """
    assert report.latency_model is not None
    points = list_fitted_points(report.latency_model.profile.workloads[workload_index])
    ends = [value for point in points for value in (point.predicted_ms, point.p10_ms, point.p90_ms)]
    figure = go.Figure()
    figure.add_scatter(
        x=[min(ends), max(ends)],
        y=[min(ends), max(ends)],
        mode="lines",
        line={"color": theme.trial, "dash": "dot", "width": 1},
        name="predicted exactly",
        hoverinfo="skip",
    )
    looks = {"fit": ("fitted to", theme.front, "circle"), "check": ("only checked on", theme.heldout, "diamond")}
    for use, (name, colour, symbol) in looks.items():
        chosen = [point for point in points if point.use == use]
        if not chosen:
            continue
        figure.add_scatter(
            x=[point.predicted_ms for point in chosen],
            y=[point.median_ms for point in chosen],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [point.p90_ms - point.median_ms for point in chosen],
                "arrayminus": [point.median_ms - point.p10_ms for point in chosen],
                "thickness": 1.2,
                "width": 3,
            },
            text=[f"{point.groups}<br>{point.error:+.1%}" for point in chosen],
            mode="markers",
            marker={"color": colour, "size": 9, "symbol": symbol},
            name=name,
            hovertemplate="%{text}<br>predicted %{x:.3f} ms, measured %{y:.3f} ms<extra></extra>",
        )
    figure.update_xaxes(title="predicted (ms)")
    figure.update_yaxes(title="measured: median, p10 to p90 (ms)")
    return style_figure(figure, theme, height=380)


def build_breakdown_figure(report: StudyReport, *, workload_index: int = 0, theme: Theme = LIGHT) -> go.Figure:
    """Draw for each plan of the front where the estimated time of a step goes.

    Args:
        report: the study, with a latency model.
        workload_index: which workload of its profile.
        theme: colours.
    """
    assert report.latency_model is not None
    profile = report.latency_model.profile
    workload = profile.workloads[workload_index]
    labels, parts = [], []
    for result in report.front:
        try:
            parts.append(compute_breakdown(workload, profile.geometry, result.plan))
        except ConfigError:
            continue  # a larger group than those measured, of an enqueued plan
        labels.append(name_row(report, result))
    figure = go.Figure()
    unit = " joins" if report.row_title == "joins" else ""
    colours = [theme.trial, *theme.more]
    causes = [cause for cause in (parts[0] if parts else {}) if any(part[cause] for part in parts)]
    for number, cause in enumerate(causes):
        name = cause if cause == "overhead" else describe_kind(cause)
        figure.add_bar(
            x=[part[cause] for part in parts],
            y=labels,
            orientation="h",
            name=name,
            marker={"color": colours[number % len(colours)]},
            hovertemplate=f"%{{y}}{unit}: %{{x:.3f}} ms<extra>{name}</extra>",
        )
    figure.update_layout(barmode="stack", bargap=0.25, legend_traceorder="normal")
    figure.update_xaxes(title="estimated time of a step (ms)")
    figure.update_yaxes(title="joins" if unit else None, type="category", autorange="reversed")
    return style_figure(figure, theme, height=150 + 26 * len(labels))
