"""Colours of the figures, light and dark. The same places have the same names, so a figure can change its colours."""

from __future__ import annotations

from dataclasses import dataclass, fields

import plotly.graph_objects as go

__all__ = ["DARK", "LIGHT", "Theme", "map_colours", "style_figure"]


@dataclass(frozen=True)
class Theme:
    """Colours by what they stand for; every colour of one theme is used for one thing.

    Attributes:
        background: of the page and the figures.
        text: of axes and legends.
        grid: lines behind the data.
        trial: every other trial, behind the front.
        front: plans of the front.
        heldout: held-out losses.
        block: blocks, the published method.
        chosen: the plan that is looked at.
        single: layers that are alone in their group.
        group_even: layers of every other group of several.
        group_odd: layers of the groups between these.
        gain: interactions below zero.
        neutral: interactions of zero.
        harm: interactions above zero.
        more: further lines.
    """

    background: str
    text: str
    grid: str
    trial: str
    front: str
    heldout: str
    block: str
    chosen: str
    single: str
    group_even: str
    group_odd: str
    gain: str
    neutral: str
    harm: str
    more: tuple[str, str, str, str, str, str]


LIGHT = Theme(
    background="#ffffff",
    text="#24292f",
    grid="#dde1e6",
    trial="#8a929b",
    front="#0b5fc0",
    heldout="#c2500c",
    block="#1b7a3a",
    chosen="#8a2be2",
    single="#e9ecef",
    group_even="#1f6fd0",
    group_odd="#e08a1e",
    gain="#2b6cb8",
    neutral="#f6f7f8",
    harm="#c0392b",
    more=("#1368ce", "#d95f02", "#22863a", "#9b2fae", "#b7791f", "#0e8088"),
)

DARK = Theme(
    background="#14181d",
    text="#d8dee6",
    grid="#303843",
    trial="#7c8794",
    front="#6cb0ff",
    heldout="#ff9e57",
    block="#56d07d",
    chosen="#d3a4ff",
    single="#262d36",
    group_even="#5a9ff0",
    group_odd="#f0a83f",
    gain="#5f9fe8",
    neutral="#1b2027",
    harm="#f0705f",
    more=("#62a8ff", "#ff9440", "#5ccf78", "#d58ae6", "#e0b45a", "#45c2c9"),
)


def map_colours() -> dict[str, str]:
    """Return the dark colour of every light one."""
    colours: dict[str, str] = {}
    for field in fields(Theme):
        light, dark = getattr(LIGHT, field.name), getattr(DARK, field.name)
        pairs = [(light, dark)] if isinstance(light, str) else zip(light, dark, strict=True)
        colours.update(pairs)
    return colours


def style_figure(figure: go.Figure, theme: Theme, *, height: int) -> go.Figure:
    """Give a figure what all have: colours, margins for a narrow page, a legend below."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 56, "r": 12, "t": 16, "b": 48},
        paper_bgcolor=theme.background,
        plot_bgcolor=theme.background,
        font={"color": theme.text, "size": 13, "family": "system-ui, sans-serif"},
        # In heights of the drawing: as many pixels as clear the title of its axis, whatever its height.
        legend={
            "orientation": "h",
            "x": 0,
            "y": -80 / (height - 112),
            "yanchor": "top",
            "bgcolor": "rgba(0,0,0,0)",
        },
        hoverlabel={"bgcolor": theme.background, "bordercolor": theme.text, "font": {"color": theme.text}},
        hovermode="closest",
        dragmode=False,
    )
    figure.update_xaxes(gridcolor=theme.grid, linecolor=theme.grid, zerolinecolor=theme.grid, automargin=True)
    figure.update_yaxes(gridcolor=theme.grid, linecolor=theme.grid, zerolinecolor=theme.grid, automargin=True)
    return figure
