"""Plotly figures of a search: what it learned about joins and drops, and how it progressed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lpsearch.report.effects import ChoiceEffects, describe_choice
from lpsearch.report.figures import name_loss
from lpsearch.report.progress import get_saving, list_levels
from lpsearch.report.study import StudyReport
from lpsearch.report.theme import LIGHT, Theme, style_figure
from lpsearch.wording import name_count

__all__ = [
    "build_effects_figure",
    "build_interactions_figure",
    "build_progress_figure",
    "choose_best_lines",
    "name_best_line",
]

Unit = Literal["trials", "tokens"]

NUM_BEST_LINES = 6
"""Numbers of joins, or shares saved, whose progress is drawn."""

CLIPPED_SHARE = 0.02
"""Share of the largest interactions that all get the colour of the largest left."""


def build_effects_figure(report: StudyReport, *, theme: Theme = LIGHT) -> go.Figure:
    """Draw what each choice costs alone: measured with its error, or as the surrogate expects it.

    Args:
        report: the study, with effects.
        theme: colours.
    """
    effects = report.effects
    assert effects is not None
    if effects.has_drops:
        return _build_choices_figure(report, effects, theme)
    joins = range(len(effects.expected))
    measured = [i for i in joins if effects.measured[i] is not None]
    rest = [i for i in joins if effects.measured[i] is None]
    figure = go.Figure()
    figure.add_scatter(
        x=measured,
        y=[effects.measured[i] for i in measured],
        error_y={"type": "data", "array": [effects.measured_se[i] or 0.0 for i in measured], "thickness": 1},
        text=[f"{i}-{i + 1}" for i in measured],
        mode="markers",
        marker={"color": theme.front, "size": 8},
        name="measured alone",
        hovertemplate="layers %{text}: %{y:.4f} nats<extra>measured</extra>",
    )
    if rest:
        figure.add_scatter(
            x=rest,
            y=[effects.expected[i] for i in rest],
            text=[f"{i}-{i + 1}" for i in rest],
            mode="markers",
            marker={"color": theme.heldout, "size": 8, "symbol": "circle-open"},
            name="expected by the surrogate",
            hovertemplate="layers %{text}: %{y:.4f} nats<extra>expected</extra>",
        )
    figure.update_xaxes(title="join i: layers i and i + 1 in one group")
    return _finish_effects(figure, report, theme)


def _build_choices_figure(report: StudyReport, effects: ChoiceEffects, theme: Theme) -> go.Figure:
    """Draw joins and drops by layer, each kind with a colour and a shape; what is only expected is hollow."""
    figure = go.Figure()
    looks = {
        "join": ("joins", theme.front, "circle"),
        "drop_attention": ("attention dropped", theme.heldout, "triangle-up"),
        "drop_mlp": ("MLP dropped", theme.block, "triangle-down"),
    }
    for kind, (name, colour, symbol) in looks.items():
        for is_measured in (True, False):
            shown = [
                (choice, effects.measured[i], effects.measured_se[i], effects.expected[i])
                for i, choice in enumerate(effects.choices)
                if choice.kind == kind and (effects.measured[i] is not None) == is_measured
            ]
            if not shown:
                continue
            bars = {"type": "data", "array": [error or 0.0 for _, _, error, _ in shown], "thickness": 1, "width": 0}
            figure.add_scatter(
                x=[sum(choice.layers) / len(choice.layers) for choice, *_ in shown],
                y=[expected if value is None else value for _, value, _, expected in shown],
                error_y=bars if is_measured else None,
                text=[describe_choice(choice) for choice, *_ in shown],
                mode="markers",
                marker={"color": colour, "size": 8, "symbol": symbol if is_measured else f"{symbol}-open"},
                name=name if is_measured else f"{name}, expected",
                hovertemplate="%{text}: %{y:.4f} nats<extra>%{fullData.name}</extra>",
            )
    figure.update_xaxes(title="layer; a join stands between its two")
    return _finish_effects(figure, report, theme, height=440)


def _finish_effects(figure: go.Figure, report: StudyReport, theme: Theme, *, height: int = 360) -> go.Figure:
    positive = all(y > 0 for trace in figure.data for y in trace.y)
    figure.update_yaxes(title=name_loss(report), **_scale_losses(positive))
    return style_figure(figure, theme, height=height)


def build_interactions_figure(report: StudyReport, *, theme: Theme = LIGHT) -> go.Figure:
    """Draw what the surrogate expects two choices to cost together beyond the sum of each alone.

    Args:
        report: the study, with effects.
        theme: colours.
    """
    effects = report.effects
    assert effects is not None
    known = [abs(value) for row in effects.interactions for value in row if value is not None]
    limit = float(np.quantile(known, 1 - CLIPPED_SHARE)) if known else 0.0
    joins: list[Any] = list(range(len(effects.expected)))
    if effects.has_drops:
        joins = [describe_choice(choice) for choice in effects.choices]
    figure = go.Figure(
        go.Heatmap(
            z=[list(row) for row in effects.interactions],
            x=joins,
            y=joins,
            zmin=-(limit or 1.0),
            zmax=limit or 1.0,
            colorscale=[[0.0, theme.gain], [0.5, theme.neutral], [1.0, theme.harm]],
            colorbar={
                "title": {"text": "nats per token", "side": "bottom"},
                "orientation": "h",
                "y": -0.14,
                "yanchor": "top",
                "thickness": 12,
                "outlinewidth": 0,
            },
            hovertemplate=("" if effects.has_drops else "joins ") + "%{x} and %{y}: %{z:+.4f} nats<extra></extra>",
            hoverongaps=False,
        )
    )
    figure.update_xaxes(title="join", showgrid=False, constrain="domain")
    figure.update_yaxes(title="join", showgrid=False, autorange="reversed", scaleanchor="x", constrain="domain")
    if effects.has_drops:
        _name_kinds(figure, effects, theme)
    return style_figure(figure, theme, height=560)


def _name_kinds(figure: go.Figure, effects: ChoiceEffects, theme: Theme) -> None:
    """Name the kinds of choices along the axes, which have no room for every choice, and draw lines between them."""
    names = {"join": "joins", "drop_attention": "attention dropped", "drop_mlp": "MLP dropped"}
    places: dict[str, list[int]] = {}
    for place, choice in enumerate(effects.choices):
        places.setdefault(choice.kind, []).append(place)
    middles = [describe_choice(effects.choices[members[len(members) // 2]]) for members in places.values()]
    ticks = {"title": None, "tickvals": middles, "ticktext": [names[kind] for kind in places]}
    figure.update_xaxes(**ticks, tickangle=0)
    figure.update_yaxes(**ticks, tickangle=-90)
    line = {"color": theme.text, "width": 1}
    ends = (-0.5, len(effects.choices) - 0.5)
    for members in list(places.values())[1:]:
        edge = members[0] - 0.5
        figure.add_shape(type="line", x0=edge, x1=edge, y0=ends[0], y1=ends[1], line=line)
        figure.add_shape(type="line", y0=edge, y1=edge, x0=ends[0], x1=ends[1], line=line)


def build_progress_figure(report: StudyReport, *, unit: Unit = "trials", theme: Theme = LIGHT) -> go.Figure:
    """Draw the front's hypervolume and the least loss by number of joins, or by what is saved, over the search.

    Args:
        report: the study.
        unit: what the horizontal axis counts.
        theme: colours.
    """
    steps = report.progress
    places = [step.trial if unit == "trials" else step.tokens for step in steps]
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.4, 0.6], x_title=None
    )
    volumes = _keep_changes(places, [step.hypervolume for step in steps])
    figure.add_scatter(
        x=[x for x, _ in volumes],
        y=[y for _, y in volumes],
        mode="lines",
        line={"shape": "hv", "color": theme.front, "width": 2},
        name="hypervolume",
        showlegend=False,
        hovertemplate="%{x}: %{y:.4f}<extra>hypervolume</extra>",
        row=1,
        col=1,
    )
    shown = choose_best_lines(report)
    for colour, level in zip(theme.more, shown, strict=False):
        line = _keep_changes(places, [step.best.get(level) for step in steps])
        figure.add_scatter(
            x=[x for x, _ in line],
            y=[y for _, y in line],
            mode="lines+markers" if len(line) == 1 else "lines",
            line={"shape": "hv", "color": colour, "width": 2},
            name=name_best_line(report, level),
            hovertemplate="%{x}: %{y:.4f} nats<extra>%{fullData.name}</extra>",
            row=2,
            col=1,
        )
    figure.update_xaxes(title="trial" if unit == "trials" else "tokens evaluated", row=2, col=1)
    figure.update_yaxes(title="hypervolume", rangemode="tozero", row=1, col=1)
    positive = all(step.best.get(k, 1.0) > 0 for step in steps for k in shown)
    figure.update_yaxes(title="least loss (nats)", row=2, col=1, **_scale_losses(positive))
    return style_figure(figure, theme, height=480)


def choose_best_lines(report: StudyReport) -> tuple[int, ...]:
    """Choose the levels of ``ProgressStep.best`` that are drawn: spread evenly over the useful part of the front."""
    on_front = [
        result
        for result in report.front
        if not result.is_baseline and result.get_cost(report.metric) <= report.reference_cost
    ]
    if report.has_drops:
        most = max((get_saving(result, report.baseline, report.objective) for result in on_front), default=0.0)
        useful = {level for level in list_levels(most) if level > 0}
    else:
        useful = {result.num_joins for result in on_front}
    levels = sorted(useful) or sorted({k for step in report.progress for k in step.best if k > 0})
    places = np.unique(np.linspace(0, len(levels) - 1, min(NUM_BEST_LINES, len(levels))).round().astype(int))
    return tuple(levels[place] for place in places)


def name_best_line(report: StudyReport, level: int) -> str:
    """Name a level of ``ProgressStep.best``, e.g. ``3 joins``, or ``10 % saved`` where plans drop branches."""
    if not report.has_drops:
        return name_count(level, "join")
    return f"{level} % {'less depth' if report.objective == 'depth' else 'less time'}"


def _keep_changes(places: Sequence[int], values: Sequence[float | None]) -> list[tuple[int, float]]:
    """Return the points of a line of steps: where it begins, every change, and where it ends."""
    known = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
    changes = [point for i, point in enumerate(known) if i == 0 or point[1] != known[i - 1][1]]
    return changes if not known or changes[-1] == known[-1] else [*changes, known[-1]]


def _scale_losses(positive: bool) -> dict[str, Any]:
    """Return a logarithmic axis where all losses are positive: they span decades."""
    return {"type": "log", "dtick": 1, "exponentformat": "none"} if positive else {"type": "linear"}
