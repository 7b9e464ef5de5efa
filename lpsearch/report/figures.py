"""Plotly figures of a front: what its plans lose for what they save, and which layers they pair."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import plotly.graph_objects as go

from lpsearch.plan import Group, Plan
from lpsearch.report.study import StudyReport, name_row
from lpsearch.report.theme import LIGHT, Theme, style_figure
from lpsearch.search import TrialResult
from lpsearch.search.results import compute_perplexity
from lpsearch.wording import describe_changes, describe_layers

__all__ = [
    "build_front_figure",
    "build_layers_figure",
    "describe_groups",
    "get_saving_value",
    "name_loss",
    "name_saving",
]

Saving = Literal["depth", "latency"]
Loss = Literal["delta", "perplexity"]

MARKER_SIZE = 6
"""Pixels across every point of the front's figure."""

MAX_FAINT_TRIALS = 2000
"""Trials behind the front; of more, those of least loss are drawn, so that the file stays small."""


def describe_groups(plan: Plan) -> str:
    """Write the groups of several layers and the dropped branches, or that there are none of either."""
    return describe_layers(plan) or "every layer alone"


def name_loss(report: StudyReport, loss: Loss = "delta") -> str:
    """Return what an axis of losses is called."""
    if loss == "perplexity":
        return "perplexity"
    name = "loss added" if report.metric == "nll" else "KL to the unmodified model"
    return f"{name}{' on the worst kind' if report.is_worst_case else ''} (nats per token)"


def get_saving_value(result: TrialResult, saving: Saving) -> float | None:
    """Return where a plan stands on the axis of savings: percent of the depth, or milliseconds."""
    return 100 * result.depth_reduction if saving == "depth" else result.latency_ms


def name_saving(saving: Saving) -> str:
    """Return what an axis of savings is called."""
    return "depth removed (%)" if saving == "depth" else "estimated time of a step (ms)"


def build_front_figure(
    report: StudyReport, *, saving: Saving = "depth", loss: Loss = "delta", theme: Theme = LIGHT
) -> go.Figure:
    """Draw the front over every trial, with held-out values and, where there are any, the best blocks.

    Where losses are those after a refit, the plans of the front are drawn without it too.

    Every point carries its plan's place on the front as ``customdata``, or -1; the last trace is an empty ring for the
    plan that is looked at. The axis of losses ends where plans stop being useful.

    Args:
        report: the study.
        saving: what the horizontal axis shows.
        loss: what the vertical axis shows.
        theme: colours.
    """
    figure = go.Figure()
    faint = _list_faint(report)
    _add_results(figure, report, faint, saving=saving, loss=loss, name="every other trial", colour=theme.trial)
    if report.blocks:
        _add_results(
            figure,
            report,
            report.blocks,
            saving=saving,
            loss=loss,
            name="best block",
            colour=theme.block,
            mode="lines+markers",
            symbol="square",
            rim=1,
        )
    if len(report.untouched) > 1:
        _add_results(
            figure,
            report,
            report.untouched,
            saving=saving,
            loss=loss,
            name="the same plans without repair",
            colour=theme.more[0],
            mode="lines+markers",
            symbol="x-thin-open",
            rim=2,
        )
    _add_heldout(figure, report, saving=saving, loss=loss, theme=theme)
    _add_results(
        figure,
        report,
        report.front,
        saving=saving,
        loss=loss,
        name="front",
        colour=theme.front,
        mode="lines+markers",
        rim=3,
    )
    ring = {"size": 18, "color": "rgba(0,0,0,0)", "line": {"width": 3, "color": theme.chosen}}
    figure.add_scatter(x=[], y=[], mode="markers", marker=ring, name="chosen plan", hoverinfo="skip", showlegend=False)
    if saving == "depth":
        widest = max(100 * result.depth_reduction for result in report.results)
        figure.update_xaxes(range=[-0.03 * widest, 1.03 * widest or 1.0])
    figure.update_xaxes(title=name_saving(saving))
    figure.update_yaxes(title=name_loss(report, loss), range=_choose_range(report, loss), autorange=False)
    return style_figure(figure, theme, height=480)


def build_layers_figure(report: StudyReport, *, theme: Theme = LIGHT) -> go.Figure:
    """Draw a row for each plan of the front and a cell for each layer; layers of one group have one colour.

    Where plans drop branches, the upper half of a cell is the layer's attention and the lower half its MLP. A half that
    is dropped is empty but for a mark, whose shape says which it is, so that no colour is needed to tell.

    Args:
        report: the study.
        theme: colours.
    """
    has_halves = report.row_title != "joins"
    values: list[list[int | None]] = []
    texts: list[list[str]] = []
    for result in report.front:
        colours, layer_texts = _colour_layers(result.plan)
        if not has_halves:
            values.append(list(colours))
            texts.append(layer_texts)
            continue
        for dropped in result.plan.dropped.values():
            values.append([None if i in dropped else colour for i, colour in enumerate(colours)])
            # Both halves say the same, so that the page holds it once.
            texts.append([f"{name_row(report, result)}<br>{text}" for text in layer_texts])
    labels = [name_row(report, result) for result in report.front]
    shades = (theme.single, theme.group_even, theme.group_odd)
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=list(range(report.num_layers)),
            y=[row / 2 for row in range(len(values))] if has_halves else labels,
            text=texts,
            hovertemplate=("" if has_halves else "%{y} joins<br>") + "%{text}<extra></extra>",
            hoverongaps=True,
            colorscale=[[edge, shade] for i, shade in enumerate(shades) for edge in (i / 3, (i + 1) / 3)],
            zmin=-0.5,
            zmax=2.5,
            showscale=False,
            xgap=1,
            ygap=0 if has_halves else 2,
            meta=2 if has_halves else 1,  # rows of a plan
        )
    )
    figure.update_xaxes(title="layer", showgrid=False)
    figure.update_yaxes(showgrid=False)
    if not has_halves:
        figure.update_yaxes(title="joins", type="category", autorange="reversed")
        return style_figure(figure, theme, height=90 + 24 * len(labels))
    _add_marks(figure, report, theme)
    ticks = [row + 0.25 for row in range(len(labels))]
    figure.update_yaxes(
        tickvals=ticks, ticktext=labels, range=[len(labels) - 0.25, -0.25], zeroline=False, ticks="", autorange=False
    )
    for row in range(1, len(labels)):
        line = {"color": theme.background, "width": 4}
        figure.add_shape(type="line", xref="paper", x0=0, x1=1, y0=row - 0.25, y1=row - 0.25, line=line)
    return style_figure(figure, theme, height=130 + 28 * len(labels))


# ---- Parts of the map of layers --------------------------------------------------------------------------------------


def _colour_layers(plan: Plan) -> tuple[list[int], list[str]]:
    """Return for each layer the number of its colour, 0 where it is alone in its group, and what to say of it."""
    colours: list[int] = []
    texts: list[str] = []
    for group in plan.groups:
        # A group keeps its colour from row to row, but for one that would look like the group beside it.
        colour = 0 if len(group) == 1 else 1 + group[0] // 2 % 2
        if colour and colours and colours[-1] == colour:
            colour = 3 - colour
        colours += [colour] * len(group)
        texts += [f"layer {layer_idx}: {_describe_layer(group, layer_idx)}" for layer_idx in group]
    return colours, texts


def _describe_layer(group: Group, layer_idx: int) -> str:
    kept = {"attention": group.attention_layers, "MLP": group.mlp_layers}
    dropped = [branch for branch, layers in kept.items() if layer_idx not in layers]
    words = f", without {' and '.join(dropped)}" if dropped else ""
    return f"{'alone' if len(group) == 1 else f'in group {group[0]}-{group[-1]}'}{words}"


def _add_marks(figure: go.Figure, report: StudyReport, theme: Theme) -> None:
    """Mark the halves of cells that plans of the front drop; the heatmap below answers to the mouse."""
    looks = {"attention": ("attention left out", "triangle-up", 0.0), "mlp": ("MLP left out", "triangle-down", 0.5)}
    for branch, (name, symbol, offset) in looks.items():
        places = [
            (layer_idx, row + offset)
            for row, result in enumerate(report.front)
            for layer_idx in result.plan.dropped[branch]
        ]
        if places:
            figure.add_scatter(
                x=[x for x, _ in places],
                y=[y for _, y in places],
                mode="markers",
                marker={"color": theme.text, "size": 8, "symbol": symbol},
                name=name,
                hoverinfo="skip",
            )


# ---- Parts of the front ----------------------------------------------------------------------------------------------


def _list_faint(report: StudyReport) -> list[TrialResult]:
    """Return the plans behind the front; its own would lie under it and answer in its place."""
    on_front = _find_places(report)
    results = [
        result
        for result in report.results
        if math.isfinite(result.get_cost(report.metric)) and result.plan not in on_front
    ]
    return sorted(results, key=lambda result: result.get_cost(report.metric))[:MAX_FAINT_TRIALS]


def _find_places(report: StudyReport) -> dict[Plan, int]:
    return {result.plan: index for index, result in enumerate(report.front)}


def _get_value(report: StudyReport, result: TrialResult, loss: Loss) -> float:
    return result.get_cost(report.metric) if loss == "delta" else result.perplexity


def _add_results(
    figure: go.Figure,
    report: StudyReport,
    results: Iterable[TrialResult],
    *,
    saving: Saving,
    loss: Loss,
    name: str,
    colour: str,
    mode: str = "markers",
    symbol: str = "circle",
    rim: int = 0,
) -> None:
    """Add a trace of plans; only those of a line have error bars, for a cloud of them would hide everything.

    Where points overlap, plotly answers with the smallest, and of equal ones with the last: so all have one size, and
    those that matter are drawn later and with a rim.
    """
    shown = [(x, result) for result in results if (x := get_saving_value(result, saving)) is not None]
    is_faint = mode == "markers"
    if not is_faint:
        shown.sort(key=lambda item: item[0])
    places = _find_places(report)
    errors: dict[str, Any] | None = None
    if not is_faint:
        bounds = [_build_bounds(report, result, loss) for _, result in shown]
        errors = _build_error_bars([high for _, high in bounds], [low for low, _ in bounds])
    figure.add_scatter(
        x=[x for x, _ in shown],
        y=[_get_value(report, result, loss) for _, result in shown],
        error_y=errors,
        text=[_describe(report, result) for _, result in shown],
        customdata=[places.get(result.plan, -1) for _, result in shown],
        mode=mode,
        opacity=0.55 if is_faint else 1.0,
        marker={"color": colour, "size": MARKER_SIZE, "symbol": symbol, "line": {"color": colour, "width": rim}},
        line={"color": colour, "width": 1.5},
        name=name,
        hovertemplate=f"%{{text}}<extra>{name}</extra>",
    )


def _build_bounds(report: StudyReport, result: TrialResult, loss: Loss) -> tuple[float, float]:
    """Return how far one standard error reaches below and above a plan's value."""
    error = (result.get_cost_se(report.metric) if loss == "delta" else result.loss.delta_nll_se) or 0.0
    if loss == "delta":
        return error, error
    value = result.perplexity
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
        (x, result, heldout)
        for result in report.front
        if (heldout := result.get_heldout(report.metric)) is not None
        and (x := get_saving_value(result, saving)) is not None
    ]
    if not shown or (loss == "perplexity" and report.metric == "kl"):
        return
    places = _find_places(report)
    values, above, below = [], [], []
    for _, _, heldout in shown:
        cost, error = heldout.get_cost(report.metric), heldout.get_cost_se(report.metric) or 0.0
        deltas: tuple[float, ...] = (cost, cost + error, cost - error)
        if loss == "perplexity":
            deltas = tuple(compute_perplexity(report.baseline.loss.nll + delta) for delta in deltas)
        values.append(deltas[0])
        above.append(deltas[1] - deltas[0])
        below.append(deltas[0] - deltas[2])
    figure.add_scatter(
        x=[x for x, _, _ in shown],
        y=values,
        error_y=_build_error_bars(above, below),
        customdata=[places[result.plan] for _, result, _ in shown],
        text=[
            f"held out: {heldout.get_cost(report.metric):.4f} nats<br>{_describe(report, result)}"
            for _, result, heldout in shown
        ],
        mode="markers",
        marker={"color": theme.heldout, "size": MARKER_SIZE, "symbol": "diamond-open", "line": {"width": 2}},
        name="front, held out",
        hovertemplate="%{text}<extra>held out</extra>",
    )


def _choose_range(report: StudyReport, loss: Loss) -> list[float]:
    """Return the part of the axis of losses where plans are useful."""
    top = report.reference_cost * 1.1
    bottom = min([0.0, *(result.get_cost(report.metric) for result in report.front)]) - 0.04 * top
    if loss == "delta":
        return [bottom, top]
    base = report.baseline.loss.nll
    if report.metric == "kl":
        useful = [result for result in report.front if result.get_cost("kl") <= report.reference_cost]
        top = max(result.loss.nll for result in useful) - base + 0.1
    low, high = compute_perplexity(base + min(bottom, 0.0)), compute_perplexity(base + top)
    return [low - 0.02 * (high - low), high]


def _describe(report: StudyReport, result: TrialResult) -> str:
    words = [
        f"{describe_changes(result.plan)}, {result.depth_reduction:.1%} less depth",
        f"{result.get_cost(report.metric):.4f} nats, perplexity {result.perplexity:.2f}",
    ]
    if result.latency_ms is not None:
        words.append(f"{result.latency_ms:.3f} ms")
    return "<br>".join([*words, *_wrap(f"layers {describe_groups(result.plan)}"), f"trial {result.trial}"])


def _wrap(text: str, width: int = 44) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
