"""The HTML report: one file that holds its figures, their data as tables, and the library that draws them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from lpsearch.latency.profile import describe_estimate, describe_profile_error
from lpsearch.models.aliases import describe_weights, name_model
from lpsearch.report.advice import Pick, describe_no_gain, list_commands, pick_plans
from lpsearch.report.charts import Chart, build_charts
from lpsearch.report.figures import describe_groups
from lpsearch.report.front_columns import format_loss
from lpsearch.report.kind_figure import describe_kind_losses
from lpsearch.report.latency_figures import describe_workload
from lpsearch.report.study import StudyReport, describe_cache
from lpsearch.report.tables import Table, build_ways_table
from lpsearch.report.theme import map_colours
from lpsearch.search import TrialResult, build_front
from lpsearch.wording import describe_changes, describe_origin, describe_speedup
from lpsearch.wording import escape_html as escape

__all__ = ["PAGE_TOP", "PageParts", "build_html", "build_parts", "read_asset", "write_html"]

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""What the browser may load: nothing from any network."""

_LONG_LIST = 16
"""Items from which a list is kept once, however many figures show it."""

_DIGITS = 7
"""Significant digits of the figures' numbers."""

_SERVE_NOTE = (
    "Run these commands where you ran optimize. Serving needs vLLM, which runs the exported checkpoint through its "
    "transformers backend and needs no lpsearch."
)


@dataclass(frozen=True)
class PageParts:
    """What changes from study to study on the page.

    Attributes:
        title: of the page, as HTML.
        body: ``<header>`` and ``<main>``.
        data: the figures, as the JSON that ``page.js`` draws.
    """

    title: str
    body: str
    data: str


def build_parts(report: StudyReport) -> PageParts:
    """Build what the page shows of a study; the rest of the page is the same for all.

    Args:
        report: the study.
    """
    charts = build_charts(report)
    shared: dict[str, int] = {}
    figures = {
        chart.name: {key: _share_lists(json.loads(figure.to_json()), shared) for key, figure in chart.figures.items()}
        for chart in charts.values()
    }
    lists = [json.loads(content) for content in shared]
    data = {"colours": map_colours(), "figures": figures, "lists": lists}
    body = "\n".join(
        [
            _render_head(report),
            '<main id="main">',
            _render_front(report, charts),
            _render_section("kinds", "Loss by kind of text", _explain_kinds(report), [charts["kinds"]])
            if "kinds" in charts
            else "",
            _render_advice(report),
            _render_layers(report, charts),
            _render_joins(report, charts),
            _render_section("search", "How the search progressed", _explain_progress(report), [charts["progress"]]),
            _render_latency(report, charts),
            "</main>",
        ]
    )
    return PageParts(
        title=escape(f"{report.name}: layer parallelism"),
        body=body,
        # "</" would end the element that holds the data
        data=json.dumps(data, allow_nan=False, separators=(",", ":")).replace("</", "<\\/"),
    )


def build_html(report: StudyReport, *, plotly_url: str | None = None) -> str:
    """Build the whole page as one file.

    Args:
        report: the study.
        plotly_url: where the page finds the library that draws its figures, for a site of several pages that share it;
            None puts it into the page, which then loads nothing and may load nothing.
    """
    parts = build_parts(report)
    if plotly_url is None:
        meta = f'\n<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        library = get_plotlyjs().replace("</script", "<\\/script")
        plotly = f"<script>{library}</script>"
    else:
        meta, plotly = "", f'<script src="{escape(plotly_url)}"></script>'
    return _PAGE.format(
        title=parts.title,
        meta=meta,
        style=read_asset("page.css"),
        body=parts.body,
        data=parts.data,
        plotly=plotly,
        script=read_asset("page.js"),
    )


def write_html(report: StudyReport, path: Path) -> int:
    """Write the page, whole or not at all.

    Args:
        report: the study.
        path: the file to write.

    Returns:
        Its size in bytes.

    Raises:
        OSError: if it cannot be written.
    """
    content = build_html(report).encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(content)


PAGE_TOP = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">{meta}
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
"""
"""How a page begins; ``meta`` is for what the page must say early, each such element on a line of its own."""

_PAGE = (
    PAGE_TOP
    + """{body}
<script type="application/json" id="data">{data}</script>
{plotly}
<script>{script}</script>
</body>
</html>
"""
)

_EXPLAIN = {
    "layers": "A row for each plan of the front. Layers of one group share a colour and run in parallel; neighbouring "
    "groups alternate between two colours. Grey layers run alone. Choose a row to see its plan.",
    "drops": "The upper half of a cell is the layer's attention, the lower half its MLP. An empty half with a triangle "
    "is left out: one that points up stands for an attention, one that points down for an MLP.",
    "choices": "What it costs to join two neighbouring layers, or to drop the attention or the MLP of one, and nothing "
    "else. They save unlike times, so the least loss is not always the best choice.",
    "choice interactions": "What the search expects two choices to cost together beyond the sum of each alone, learned "
    "from all trials: red ones disturb each other, blue ones cost less together than apart. Empty cells were not "
    "possible together. The largest 2 % share a colour.",
    "effects": "What it costs to join two neighbouring layers and nothing else. Joins far below the others are the "
    "ones to set first.",
    "interactions": "What the search expects two joins to cost together beyond the sum of each alone, learned from all "
    "trials: red pairs disturb each other, blue pairs cost less together than apart. Empty cells were "
    "not possible together. The largest 2 % share a colour.",
    "fit": "Measured depths against what the fitted model says. It was fitted to some and only checked on others.",
    "breakdown": "Where the model puts the time of a step: a fixed overhead and a time for every group.",
}


def _share_lists(value: Any, shared: dict[str, int]) -> Any:
    """Replace long lists by references, since the choices of a chart mostly show the same plans, and round numbers.

    Args:
        value: part of a figure.
        shared: place of every list so far, by its content.
    """
    if isinstance(value, dict):
        return {key: _share_lists(item, shared) for key, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if not isinstance(value, list):
        return value
    value = [_share_lists(item, shared) for item in value]
    if len(value) >= _LONG_LIST and not isinstance(value[0], list | dict):
        return {"list": shared.setdefault(json.dumps(value), len(shared))}
    return value


def _render_head(report: StudyReport) -> str:
    settings = report.settings
    model = str(settings.get("model", "the model"))
    facts = {
        "plans": f"{len(report.results)}" + (", all there are" if report.is_exact else ""),
        "layers": str(report.num_layers),
        "unmodified": f"{report.baseline.loss.nll:.4f} nats/token, perplexity {report.baseline.perplexity:.2f}",
        "data": _describe_data(settings),
        "tokens evaluated": f"{report.proxy_tokens:,}",
        "sampler": str(settings.get("sampler", "not recorded")),
        "dtype": str(settings.get("dtype", "not recorded")),
    }
    if report.is_repaired:
        facts["repair"] = "closed-form refit of every plan"
    if report.latency_model is not None:
        profile = report.latency_model.profile
        ranks = "" if profile.num_ranks == 1 else f"{profile.num_ranks} x "
        workload = report.latency_model.description or describe_workload(report.latency_model.workload)
        facts["latency of"] = f"{ranks}{profile.device}, engine {profile.engine}, {workload}" + (
            " (emulated)" if profile.emulated else ""
        )
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    notes = (
        ""
        if report.is_current
        else "<p class='note'>This study is under way or was interrupted: the report shows what is there. "
        "Run the same <code>lpsearch optimize</code> again to resume it and to check its front on held-out windows.</p>"
    )
    warning = describe_profile_error(report.latency_error, name="Latency profile")
    notes += "" if warning is None else f"<p class='note'>{escape(warning)}.</p>"
    weights = describe_weights(model)
    notes += "" if weights is None else f"<p class='note'>{escape(weights)}</p>"
    choices = "Choices" if report.has_drops else "Joins"
    links = [("front", "Front"), ("next", "What next"), ("layers", "Layers"), ("joins", choices), ("search", "Search")]
    links[1:1] = [("kinds", "Kinds")] if report.has_kinds else []
    links += [("latency", "Latency")] if report.latency_model is not None else []
    nav = "".join(f'<a href="#{name}">{label}</a>' for name, label in links)
    return (
        f"<header><div class='bar'><h1>{escape(report.name)}</h1>"
        '<button type="button" id="theme" hidden>Dark</button></div>'
        f"<p class='sub'>Which layers of {escape(name_model(model))} can run in parallel, and what that costs</p>"
        f"<dl class='facts'>{items}</dl>{notes}<nav aria-label='Sections'>{nav}</nav></header>"
    )


def _describe_data(settings: Mapping[str, Any]) -> str:
    data = settings.get("data", "not recorded")
    size = f"{settings.get('windows', '?')} windows of {settings.get('seq_len', '?')} tokens"
    if isinstance(data, str):
        return f"{_name_text(data)}, {size}"
    judged = "the worst kind" if settings.get("worst_case") else "the mean"
    return f"{' + '.join(map(_name_text, data))}, {size} of each kind; plans are compared by {judged}"


def _name_text(data: str) -> str:
    """Name a text as people know it: a file by its name alone."""
    return Path(data).name if Path(data).is_absolute() else data


def _render_front(report: StudyReport, charts: dict[str, Chart]) -> str:
    plans = "".join(_render_plan(report, index, result) for index, result in enumerate(report.front))
    notes = "The axis of losses ends where plans stop being useful. Bars are one standard error over windows. "
    if any(result.get_heldout(report.metric) is not None for result in report.front):
        notes += "Held-out values are on windows that the search never saw. "
    elif len(report.front) > 1:
        notes += "Held-out values come when the search ends. "
    if report.is_repaired:
        notes += (
            "Losses are after a closed-form refit of each plan's weights, which <code>lpsearch recover</code> writes. "
        )
    if len(report.untouched) > 1:
        best = build_front(report.untouched, metric=report.metric, objective=report.objective)
        notes += (
            f"The same plans without repair are drawn too: {len(best) - 1} of the {len(report.front) - 1} would still "
            "be the best of these. A search without repair may find others. "
        )
    if not report.blocks:
        notes += "The study tried no blocks. "
    notes += "Click a point, or use the arrow keys on the figure, to see its plan."
    toggle = "<label class='check'><input type='checkbox' id='all-losses'> show every loss</label>"
    return (
        "<section id='front'><h2>Front</h2><div class='split'><div>"
        f"<p>{notes}</p>{_render_chart(charts['front'], extra=toggle, selects=True)}"
        f"</div><div class='plans' id='plans' aria-live='polite'><h3>The chosen plan</h3>{plans}</div></div></section>"
    )


def _render_plan(report: StudyReport, index: int, result: TrialResult) -> str:
    metric, estimated = report.metric, describe_estimate(report.latency_error)
    rows = {
        "joins": f"{result.num_joins} of {report.num_layers - 1}",
        "drops": f"{result.num_dropped} of {2 * report.num_layers} branches" if result.num_dropped else "",
        "depth": f"{result.plan.depth:g} of {report.num_layers} ({result.depth_reduction:.1%} less)",
        "loss": format_loss(result.loss, metric),
        "held out": format_loss(result.get_heldout(metric), metric),
        "without repair": format_loss(result.get_untouched(metric), metric),
        **describe_kind_losses(report, result),
        "perplexity": f"{result.perplexity:.3f}",
        "time of a step": "" if result.latency_ms is None else f"{result.latency_ms:.3f} ms ({estimated})",
        "speed-up": "" if result.speedup is None else describe_speedup(result.speedup, report.speedup_margin),
        "KV cache": describe_cache(report, result),
        "found by": f"{describe_origin(result.origin)}, trial {result.trial}",
        ("layers" if result.num_dropped else "layers together"): describe_groups(result.plan),
    }
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows.items() if value
    )
    return (
        f"<article id='plan-{index}' data-plan='{index}' data-trial='{result.trial}'><dl>{items}</dl>"
        f"{_render_commands(report, result)}</article>"
    )


def _render_commands(report: StudyReport, result: TrialResult) -> str:
    commands = list_commands(report, result)
    if not commands:
        return (
            "<p class='note'>Its plan file is not written yet. The search writes it when it ends; run the same "
            "<code>lpsearch optimize</code> again if it was interrupted.</p>"
        )
    return (
        "<ul class='commands'>"
        + "".join(
            f"<li><span>{escape(command.purpose)}</span><div class='line'>"
            f"<code tabindex='0'>{_render_words(command.line)}</code>"
            f"<button type='button' class='copy' hidden aria-label='Copy: {escape(command.purpose)}'>Copy</button>"
            "</div></li>"
            for command in commands
        )
        + "</ul>"
    )


def _render_words(line: str) -> str:
    """Keep a line from being broken inside its words, such as after the first hyphen of an option."""
    return " ".join(escape(word) if word.isalnum() else f"<span>{escape(word)}</span>" for word in line.split(" "))


def _render_advice(report: StudyReport) -> str:
    cards = "".join(_render_pick(report, pick) for pick in pick_plans(report))
    loss = "loss" if report.metric == "nll" else "KL divergence"
    sentence = describe_no_gain(report)
    no_gain = "" if sentence is None else f"<p class='note'>{escape(sentence)}</p>"
    best = "of least depth" if report.objective == "depth" else "of least estimated time"
    ways = (
        "<h3>Joins, drops or both</h3><p>What each would give at the same loss. The best plan of one kind may be "
        "beaten by one of another, and is then not on the front. Such plans were not checked on held-out windows, so "
        f"their losses are those that the search saw.</p>{_render_table(build_ways_table(report))}"
        if report.has_drops
        else ""
    )
    return (
        f"<section id='next'><h2>What to do next</h2><p>Three plans to start from: of all plans of the front within a "
        f"{loss}, the one {best}. The held-out value counts where there is one. "
        f"<code>lpsearch plan pick DIR --max-delta NATS</code> picks the same way, and the unmodified model where no "
        f"other plan is within.</p>"
        f"{no_gain}<div class='cards'>{cards}</div><p class='small'>{_SERVE_NOTE}</p>{ways}</section>"
    )


def _render_pick(report: StudyReport, pick: Pick) -> str:
    rule = f"at most {pick.max_loss} nats per token"
    if pick.index is None:
        if pick.gains is False:
            return (
                f"<article class='card' data-pick='{pick.name}'><h3>{pick.name}</h3><p class='small'>{rule}</p>"
                "<p>No plan within this loss is measurably faster than the unmodified model.</p></article>"
            )
        losses = [result.get_reported_cost(report.metric) for result in report.front if not result.is_baseline]
        least = f" The least is {min(losses):.4f}." if losses else ""
        return (
            f"<article class='card' data-pick='{pick.name}'><h3>{pick.name}</h3><p class='small'>{rule}</p>"
            f"<p>No plan but the unmodified model loses so little.{least}</p></article>"
        )
    result = report.front[pick.index]
    speed = "" if result.speedup is None else f", {describe_speedup(result.speedup, report.speedup_margin)}"
    lost = "lost" if report.metric == "nll" else "of KL divergence"
    gain = "" if pick.gains is not False else "<p>No faster here that could be measured; of least depth:</p>"
    return (
        f"<article class='card' data-pick='{pick.name}'><h3>{pick.name}</h3><p class='small'>{rule}</p>{gain}"
        f"<p><strong>{describe_changes(result.plan)}, {result.depth_reduction:.1%} less depth{escape(speed)}"
        f"</strong><br>{result.get_reported_cost(report.metric):.4f} nats per token {lost}; "
        f"layers {escape(describe_groups(result.plan))}</p>"
        f"<button type='button' class='show' data-show='{pick.index}' hidden>Show in the front</button>"
        f"{_render_commands(report, result)}</article>"
    )


def _render_layers(report: StudyReport, charts: dict[str, Chart]) -> str:
    if report.row_title == "joins":
        return _render_section("layers", "Which layers pair", _EXPLAIN["layers"], [charts["layers"]])
    text = f"{_EXPLAIN['layers']} {_EXPLAIN['drops']}"
    return _render_section("layers", "Which layers pair, and what is left out", text, [charts["layers"]])


def _render_joins(report: StudyReport, charts: dict[str, Chart]) -> str:
    what = "joins and drops" if report.has_drops else "joins"
    if "effects" not in charts:
        return _render_section("joins", f"What {what} cost", "No plan with a join is finished yet.", [])
    names = ("choices", "choice interactions") if report.has_drops else ("effects", "interactions")
    parts = "".join(
        f"<div><p>{_EXPLAIN[text]}</p>{_render_chart(charts[name])}</div>"
        for name, text in zip(("effects", "interactions"), names, strict=True)
    )
    return f"<section id='joins'><h2>What {what} cost, alone and together</h2><div class='pair'>{parts}</div></section>"


def _render_latency(report: StudyReport, charts: dict[str, Chart]) -> str:
    if report.latency_model is None:
        return ""
    workload = report.latency_model.workload
    error = (
        ""
        if workload.check_error is None
        else f" Largest error on depths it was not fitted to: {workload.check_error:.1%}."
    )
    parts = "".join(
        f"<div><p>{_EXPLAIN[name]}{error if name == 'fit' else ''}</p>{_render_chart(charts[name])}</div>"
        for name in ("fit", "breakdown")
    )
    return f"<section id='latency'><h2>Latency model</h2><div class='pair'>{parts}</div></section>"


def _explain_kinds(report: StudyReport) -> str:
    judged = "the loss on the worst kind" if report.is_worst_case else "the mean over the kinds, by their weights"
    return (
        f"What each plan of the front loses on each kind of text. Plans were judged by {judged}. What costs little on "
        "one kind may cost much on another, so look at the kind that you serve."
    )


def _explain_progress(report: StudyReport) -> str:
    by = "of plans that save at least some shares of it" if report.has_drops else "for some numbers of joins"
    saving = "share of the depth" if report.objective == "depth" else "share of the time"
    cost = report.reference_cost
    return (
        f"The hypervolume is the area between the front and a loss of {cost:.3g} {'nat' if cost == 1 else 'nats'} per "
        f"token, over the {saving} that is saved; larger is better. Below it, the least loss {by}. Losses are those "
        "known now: tokens that a plan got after its trial count with the trial."
    )


def _render_section(name: str, title: str, text: str, charts: Sequence[Chart]) -> str:
    return f"<section id='{name}'><h2>{title}</h2><p>{text}</p>{''.join(map(_render_chart, charts))}</section>"


def _render_chart(chart: Chart, *, extra: str = "", selects: bool = False) -> str:
    choices = "".join(
        f"<label>{escape(label)} <select data-choice>"
        + "".join(f"<option value='{key}'>{escape(words)}</option>" for key, words in options.items())
        + "</select></label>"
        for label, options in chart.choices
    )
    controls = f"<div class='controls' hidden>{choices}{extra}</div>" if choices or extra else ""
    focus = " tabindex='0' role='application' aria-roledescription='figure'" if selects else " role='img'"
    return (
        f"<figure class='chart' data-chart='{chart.name}'>{controls}<div class='scroll'>"
        f"<div class='plot' id='chart-{chart.name}'{focus} aria-label='{escape(chart.summary)}'></div></div>"
        f"<details><summary>The same as a table</summary>{_render_table(chart.table)}</details></figure>"
    )


def _render_table(table: Table) -> str:
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in table.columns)
    rows = []
    for index, row in enumerate(table.rows):
        first, *rest = row
        cell = escape(first)
        if table.selects:
            cell = f"<button type='button' class='show' data-show='{index}'>{cell}</button>"
        cells = "".join(f"<td>{escape(value)}</td>" for value in rest)
        rows.append(f"<tr><th scope='row'>{cell}</th>{cells}</tr>")
    return (
        f"<div class='scroll' tabindex='0'><table><caption>{escape(table.caption)}</caption><thead><tr>{head}</tr>"
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def read_asset(name: str) -> str:
    """Return the text of ``page.css`` or ``page.js``."""
    return files("lpsearch.report").joinpath(name).read_text(encoding="utf-8")
