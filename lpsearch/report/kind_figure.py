"""The plotly figure of losses by kind of text."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from lpsearch.kinds import name_kinds
from lpsearch.report.figures import get_saving_value, name_saving
from lpsearch.report.front_columns import choose_kind_losses, format_loss
from lpsearch.report.study import StudyReport
from lpsearch.report.theme import LIGHT, Theme, style_figure
from lpsearch.search import Loss, TrialResult
from lpsearch.wording import describe_changes, describe_layers

__all__ = ["build_kinds_figure", "describe_kind_losses", "list_kinds"]

_DASHES = ("solid", "dash", "dot", "dashdot")


def list_kinds(losses: Sequence[Loss | None]) -> list[str]:
    """Return short names of the kinds of text of some losses; empty where there is only one kind."""
    known = next((loss.by_kind for loss in losses if loss is not None), ())
    return name_kinds([part.kind.spec for part in known])


def describe_kind_losses(report: StudyReport, result: TrialResult) -> dict[str, str]:
    """Return a plan's losses on each kind of text in words; empty where there is only one kind."""
    kinds, is_heldout = choose_kind_losses([result])
    suffix = " (held out)" if is_heldout else ""
    names = name_kinds([part.kind.spec for part in kinds[0]])
    return {
        f"on {name}": format_loss(part.loss, report.metric) + suffix for name, part in zip(names, kinds[0], strict=True)
    }


def build_kinds_figure(report: StudyReport, *, theme: Theme = LIGHT) -> go.Figure:
    """Draw the loss of the front's plans on each kind of text: lines on the windows searched on, diamonds held out.

    Args:
        report: the study, with several kinds of text.
        theme: colours.
    """
    figure = go.Figure()
    proxy = list_kinds([result.loss for result in report.front])
    heldout = list_kinds([result.heldout for result in report.front])
    names = list(dict.fromkeys([*proxy, *heldout]))
    for index, name in enumerate(names):
        colour = theme.more[index % len(theme.more)]
        dash = _DASHES[index // len(theme.more) % len(_DASHES)]
        if name in proxy:
            _add_kind(figure, report, [result.loss for result in report.front], proxy.index(name), name, colour, dash)
    for index, name in enumerate(names):
        colour = theme.more[index % len(theme.more)]
        if name in heldout:
            losses = [result.heldout for result in report.front]
            _add_kind(figure, report, losses, heldout.index(name), f"{name}, held out", colour, None)
    figure.update_xaxes(title=name_saving(report.objective))
    figure.update_yaxes(title="loss added (nats per token)" if report.metric == "nll" else "KL (nats per token)")
    return style_figure(figure, theme, height=420)


def _add_kind(
    figure: go.Figure,
    report: StudyReport,
    losses: Sequence[Loss | None],
    index: int,
    name: str,
    colour: str,
    dash: str | None,
) -> None:
    """Add the losses on one kind; a line with error bars, or diamonds where there is no dash."""
    shown = [
        (saving, result, loss.by_kind[index].loss)
        for result, loss in zip(report.front, losses, strict=True)
        if loss is not None and loss.by_kind and (saving := get_saving_value(result, report.objective)) is not None
    ]
    shown.sort(key=lambda item: item[0])
    symbol, rim = "circle" if dash else "diamond-open", {"color": colour, "width": 2}
    figure.add_scatter(
        x=[saving for saving, _, _ in shown],
        y=[loss.get_cost(report.metric) for *_, loss in shown],
        error_y={
            "type": "data",
            "array": [loss.get_cost_se(report.metric) or 0.0 for *_, loss in shown],
            "thickness": 1.2,
            "width": 3,
        },
        text=[
            f"{describe_changes(result.plan)}<br>layers {describe_layers(result.plan) or 'all alone'}"
            for _, result, _ in shown
        ],
        mode="lines+markers" if dash else "markers",
        line={"color": colour, "width": 1.5, "dash": dash or "solid"},
        marker={"color": colour, "size": 7, "symbol": symbol, "line": rim},
        name=name,
        hovertemplate="%{y:.4f} nats<br>%{text}<extra>%{fullData.name}</extra>",
    )
