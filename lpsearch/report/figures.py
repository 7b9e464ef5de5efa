"""Plotly figures of a study; each is a pure function of what was read of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lpsearch.plan import Plan
from lpsearch.report.study import FrontPoint, StudyReport, name_row
from lpsearch.report.theme import LIGHT, Theme, style_figure
from lpsearch.search import PlanRecord
from lpsearch.search.records import compute_perplexity

__all__ = [
    "build_effects_figure",
    "build_front_figure",
    "build_interactions_figure",
    "build_layers_figure",
    "build_progress_figure",
    "describe_groups",
]

Saving = Literal["depth", "latency"]
Loss = Literal["delta", "perplexity"]
Unit = Literal["trials", "tokens"]

MAX_FAINT_TRIALS = 2000
"""Trials behind the front; of more, those of least loss are drawn, so that the file stays small."""

NUM_BEST_LINES = 6
"""Numbers of joins whose progress is drawn."""

CLIPPED_SHARE = 0.02
"""Share of the largest interactions that all get the colour of the largest left."""


def describe_groups(plan: Plan) -> str:
    """Write the groups of several layers, e.g. ``3-4 7-9``."""
    groups = [f"{group[0]}-{group[-1]}" for group in plan.groups if len(group) > 1]
    return " ".join(groups) or "every layer alone"


def name_loss(report: StudyReport, loss: Loss = "delta") -> str:
    """Return what an axis of losses is called."""
    if loss == "perplexity":
        return "perplexity"
    return "loss added (nats per token)" if report.metric == "nll" else "KL to the unmodified model (nats per token)"


def get_saving_value(record: PlanRecord, saving: Saving) -> float | None:
    """Return where a plan stands on the axis of savings: percent of the depth, or milliseconds."""
    return 100 * record.depth_reduction if saving == "depth" else record.latency_ms


def build_front_figure(
    report: StudyReport, *, saving: Saving = "depth", loss: Loss = "delta", theme: Theme = LIGHT
) -> go.Figure:
    """Draw the front over every trial, with held-out values and, where there are any, the best contiguous windows.

    The trace of the front carries each plan's place on the front as ``customdata``; the last trace is an empty ring for
    the plan that is looked at. The axis of losses ends where plans stop being useful.

    Args:
        report: the study.
        saving: what the horizontal axis shows.
        loss: what the vertical axis shows.
        theme: colours.
    """
    figure = go.Figure()
    _add_records(figure, report, _list_faint(report), saving=saving, loss=loss, name="every trial", colour=theme.trial)
    if report.windows_front:
        best = dict(name="best contiguous window", colour=theme.window, mode="lines+markers", symbol="square", size=7)
        _add_records(figure, report, report.windows_front, saving=saving, loss=loss, **best)
    _add_heldout(figure, report, saving=saving, loss=loss, theme=theme)
    records = [point.record for point in report.front]
    _add_records(
        figure,
        report,
        records,
        saving=saving,
        loss=loss,
        name="front",
        colour=theme.front,
        mode="lines+markers",
        size=9,
    )
    figure.data[-1].customdata = list(range(len(records)))
    ring = {"size": 18, "color": "rgba(0,0,0,0)", "line": {"width": 3, "color": theme.chosen}}
    figure.add_scatter(x=[], y=[], mode="markers", marker=ring, name="chosen plan", hoverinfo="skip", showlegend=False)
    figure.update_xaxes(
        title="depth removed (%)" if saving == "depth" else "estimated time of a step (ms)", rangemode="tozero"
    )
    if saving == "latency":
        figure.update_xaxes(rangemode="normal")
    figure.update_yaxes(title=name_loss(report, loss), range=_choose_range(report, loss), autorange=False)
    return style_figure(figure, theme, height=480)


def build_layers_figure(report: StudyReport, *, theme: Theme = LIGHT) -> go.Figure:
    """Draw a row for each plan of the front and a cell for each layer; layers of one group have one colour.

    Args:
        report: the study.
        theme: colours.
    """
    values, texts = [], []
    for point in report.front:
        row, text, parity = [], [], 0
        for group in point.record.plan.groups:
            if len(group) > 1:
                parity = 1 - parity
            row += [0 if len(group) == 1 else 1 + parity] * len(group)
            words = "alone" if len(group) == 1 else f"in group {group[0]}-{group[-1]}"
            text += [f"layer {layer_idx}: {words}" for layer_idx in group]
        values.append(row)
        texts.append(text)
    labels = [name_row(report, point.record) for point in report.front]
    colours = (theme.single, theme.group_even, theme.group_odd)
    scale = [[edge, colour] for i, colour in enumerate(colours) for edge in (i / 3, (i + 1) / 3)]
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=list(range(report.num_layers)),
            y=labels,
            text=texts,
            hovertemplate="%{y} joins<br>%{text}<extra></extra>",
            colorscale=scale,
            zmin=-0.5,
            zmax=2.5,
            showscale=False,
            xgap=1,
            ygap=2,
        )
    )
    figure.update_xaxes(title="layer", showgrid=False)
    figure.update_yaxes(title="joins", showgrid=False, type="category", autorange="reversed")
    return style_figure(figure, theme, height=90 + 24 * len(labels))


def build_effects_figure(report: StudyReport, *, theme: Theme = LIGHT) -> go.Figure:
    """Draw what each join costs alone: measured with its error, or as the surrogate expects it.

    Args:
        report: the study, with effects.
        theme: colours.
    """
    effects = report.effects
    assert effects is not None
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
    positive = all(y > 0 for trace in figure.data for y in trace.y)
    figure.update_yaxes(title=name_loss(report), type="log" if positive else "linear", dtick=1 if positive else None)
    return style_figure(figure, theme, height=360)


def build_interactions_figure(report: StudyReport, *, theme: Theme = LIGHT) -> go.Figure:
    """Draw what the surrogate expects two joins to cost together beyond the sum of each alone.

    Args:
        report: the study, with effects.
        theme: colours.
    """
    effects = report.effects
    assert effects is not None
    known = [abs(value) for row in effects.interactions for value in row if value is not None]
    limit = float(np.quantile(known, 1 - CLIPPED_SHARE)) if known else 0.0
    joins = list(range(len(effects.expected)))
    figure = go.Figure(
        go.Heatmap(
            z=[list(row) for row in effects.interactions],
            x=joins,
            y=joins,
            zmin=-(limit or 1.0),
            zmax=limit or 1.0,
            colorscale=[[0.0, theme.gain], [0.5, theme.neutral], [1.0, theme.harm]],
            colorbar={"title": {"text": "nats", "side": "top"}, "thickness": 12, "outlinewidth": 0},
            hovertemplate="joins %{x} and %{y}: %{z:+.4f} nats<extra></extra>",
            hoverongaps=False,
        )
    )
    figure.update_xaxes(title="join", showgrid=False, constrain="domain")
    figure.update_yaxes(title="join", showgrid=False, autorange="reversed", scaleanchor="x", constrain="domain")
    return style_figure(figure, theme, height=520)


def build_progress_figure(report: StudyReport, *, unit: Unit = "trials", theme: Theme = LIGHT) -> go.Figure:
    """Draw the front's hypervolume and the least loss by number of joins over the search.

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
    figure.add_scatter(
        x=places,
        y=[step.hypervolume for step in steps],
        mode="lines",
        line={"shape": "hv", "color": theme.front, "width": 2},
        name="hypervolume",
        showlegend=False,
        hovertemplate="%{x}: %{y:.4f}<extra>hypervolume</extra>",
        row=1,
        col=1,
    )
    shown = choose_best_lines(report)
    for colour, num_joins in zip(theme.more, shown, strict=False):
        known = [i for i, step in enumerate(steps) if num_joins in step.best]
        figure.add_scatter(
            x=[places[i] for i in known],
            y=[steps[i].best[num_joins] for i in known],
            mode="lines+markers" if len(known) == 1 else "lines",
            line={"shape": "hv", "color": colour, "width": 2},
            name=f"{num_joins} join" + "s" * (num_joins > 1),
            hovertemplate="%{x}: %{y:.4f} nats<extra>%{fullData.name}</extra>",
            row=2,
            col=1,
        )
    figure.update_xaxes(title="trial" if unit == "trials" else "tokens evaluated", row=2, col=1)
    figure.update_yaxes(title="hypervolume", rangemode="tozero", row=1, col=1)
    positive = all(step.best.get(k, 1.0) > 0 for step in steps for k in shown)
    figure.update_yaxes(title="least loss (nats)", type="log" if positive else "linear", row=2, col=1)
    return style_figure(figure, theme, height=480)


def choose_best_lines(report: StudyReport) -> tuple[int, ...]:
    """Choose the numbers of joins whose progress is drawn: spread evenly over the useful part of the front."""
    useful = [
        point.record.num_joins
        for point in report.front
        if point.record.num_joins > 0 and point.record.get_cost(report.metric) <= report.reference_cost
    ]
    useful = sorted(set(useful)) or sorted({k for step in report.progress for k in step.best if k > 0})
    places = np.unique(np.linspace(0, len(useful) - 1, min(NUM_BEST_LINES, len(useful))).round().astype(int))
    return tuple(useful[place] for place in places)


# ---- Parts of the front ----------------------------------------------------------------------------------------------


def _list_faint(report: StudyReport) -> list[PlanRecord]:
    records = [record for record in report.records if math.isfinite(record.get_cost(report.metric))]
    return sorted(records, key=lambda record: record.get_cost(report.metric))[:MAX_FAINT_TRIALS]


def _get_value(report: StudyReport, record: PlanRecord, loss: Loss) -> float:
    return record.get_cost(report.metric) if loss == "delta" else record.perplexity


def _add_records(
    figure: go.Figure,
    report: StudyReport,
    records: Iterable[PlanRecord],
    *,
    saving: Saving,
    loss: Loss,
    name: str,
    colour: str,
    mode: str = "markers",
    symbol: str = "circle",
    size: int = 6,
) -> None:
    """Add a trace of plans; only those of a line have error bars, for a cloud of them would hide everything."""
    shown = [(get_saving_value(record, saving), record) for record in records]
    shown = sorted(((x, record) for x, record in shown if x is not None), key=lambda item: item[0])
    is_faint = mode == "markers"
    errors: dict[str, Any] | None = None
    if not is_faint:
        bounds = [_build_bounds(report, record, loss) for _, record in shown]
        errors = _build_error_bars([high for _, high in bounds], [low for low, _ in bounds])
    figure.add_scatter(
        x=[x for x, _ in shown],
        y=[_get_value(report, record, loss) for _, record in shown],
        error_y=errors,
        text=[_describe(report, record) for _, record in shown],
        mode=mode,
        opacity=0.4 if is_faint else 1.0,
        marker={"color": colour, "size": size, "symbol": symbol},
        line={"color": colour, "width": 1.5},
        name=name,
        hovertemplate=f"%{{text}}<extra>{name}</extra>",
    )


def _build_bounds(report: StudyReport, record: PlanRecord, loss: Loss) -> tuple[float, float]:
    """Return how far one standard error reaches below and above a plan's value."""
    error = (record.get_cost_se(report.metric) if loss == "delta" else record.delta_nll_se) or 0.0
    if loss == "delta":
        return error, error
    value = record.perplexity
    return value - value * math.exp(-error), value * math.exp(error) - value


def _build_error_bars(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": list(above),
        "arrayminus": list(below),
        "thickness": 1.2,
        "width": 3,
    }


def _add_heldout(figure: go.Figure, report: StudyReport, *, saving: Saving, loss: Loss, theme: Theme) -> None:
    """Add the held-out losses; as a perplexity, of the baseline's on the proxy windows, so that both compare."""
    shown = [
        (x, point, point.heldout)
        for point in report.front
        if point.heldout is not None and (x := get_saving_value(point.record, saving)) is not None
    ]
    if not shown or (loss == "perplexity" and report.metric == "kl"):
        return
    values, above, below = [], [], []
    for _, _, heldout in shown:
        error = heldout.standard_error or 0.0
        deltas = (heldout.delta, heldout.delta + error, heldout.delta - error)
        if loss == "perplexity":
            deltas = tuple(compute_perplexity(report.baseline.nll + delta) for delta in deltas)
        values.append(deltas[0])
        above.append(deltas[1] - deltas[0])
        below.append(deltas[0] - deltas[2])
    figure.add_scatter(
        x=[x for x, _, _ in shown],
        y=values,
        error_y=_build_error_bars(above, below),
        text=[
            f"held out: {heldout.delta:.4f} nats<br>{_describe(report, point.record)}" for _, point, heldout in shown
        ],
        mode="markers",
        marker={"color": theme.heldout, "size": 8, "symbol": "diamond-open"},
        name="front, held out",
        hovertemplate="%{text}<extra>held out</extra>",
    )


def _choose_range(report: StudyReport, loss: Loss) -> list[float]:
    """Return the part of the axis of losses where plans are useful."""
    top = report.reference_cost * 1.1
    values: Iterable[FrontPoint] = report.front
    bottom = min([0.0, *(point.record.get_cost(report.metric) for point in values)]) - 0.04 * top
    if loss == "delta":
        return [bottom, top]
    base = report.baseline.nll
    if report.metric == "kl":
        useful = [point.record for point in report.front if point.record.get_cost("kl") <= report.reference_cost]
        top = max(record.nll for record in useful) - base + 0.1
    low, high = compute_perplexity(base + min(bottom, 0.0)), compute_perplexity(base + top)
    return [low - 0.02 * (high - low), high]


def _describe(report: StudyReport, record: PlanRecord) -> str:
    words = [
        f"{record.num_joins} joins, {record.depth_reduction:.1%} less depth",
        f"{record.get_cost(report.metric):.4f} nats, perplexity {record.perplexity:.2f}",
    ]
    if record.latency_ms is not None:
        words.append(f"{record.latency_ms:.3f} ms")
    return "<br>".join([*words, *_wrap(f"layers {describe_groups(record.plan)}"), f"trial {record.trial}"])


def _wrap(text: str, width: int = 44) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
