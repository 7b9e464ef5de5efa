"""What a report says of several kinds of text."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lpsearch.commands.tables import build_front_table
from lpsearch.kinds import TextKind
from lpsearch.report.annotations import _describe_result
from lpsearch.report.charts import build_charts
from lpsearch.report.figures import build_front_figure
from lpsearch.report.front_columns import format_loss, list_front_columns
from lpsearch.report.html import build_parts
from lpsearch.report.kind_figure import build_kinds_figure
from tests.report.conftest import MakeStudy

KINDS = (TextKind("wikitext2:validation", 3.0), TextKind("/texts/<code>.py"))


@pytest.mark.parametrize("worst_case", [False, True])
def test_losses_by_kind_are_drawn_and_tabled(make_study: MakeStudy, worst_case: bool) -> None:
    report = make_study(kinds=KINDS, worst_case=worst_case, data=["wikitext2@3", "/texts/<code>.py"])
    assert (report.has_kinds, report.is_worst_case) == (True, worst_case)
    charts = build_charts(report)
    figure = build_kinds_figure(report)
    names = ["wikitext2:validation", "<code>.py"]
    assert [trace.name for trace in figure.data] == [*names, *(f"{name}, held out" for name in names)]
    table = charts["kinds"].table
    assert list(table.columns) == ["joins", *(trace.name for trace in figure.data)]
    for index, trace in enumerate(figure.data):
        losses = [point.loss if index < 2 else point.heldout for point in report.front]
        of_kind = [loss.by_kind[index % 2].loss for loss in losses]
        drawn = dict(zip(trace.x, trace.y, strict=True))
        assert drawn == {100 * p.depth_reduction: k.delta_nll for p, k in zip(report.front, of_kind, strict=True)}
        assert [row[1 + index] for row in table.rows] == [format_loss(loss, "nll") for loss in of_kind]
    assert ("on the worst kind" in build_front_figure(report).layout.yaxis.title.text) == worst_case
    assert ("perplexity" in dict(charts["front"].choices).get("loss as", {})) != worst_case
    keys = [""]
    for _, values in charts["front"].choices:
        keys = [f"{key} {value}".strip() for key in keys for value in values]
    assert set(charts["front"].figures) == set(keys), "there is a figure for everything that can be chosen"


def test_the_page_names_the_kinds_and_how_plans_are_judged(make_study: MakeStudy) -> None:
    report = make_study(kinds=KINDS, worst_case=True, data=["wikitext2@3", "/texts/<code>.py"])
    body = build_parts(report).body
    assert "<code>.py" not in body, "names are escaped"
    for words in ("Loss by kind of text", "wikitext2@3 + &lt;code&gt;.py", "compared by the worst kind"):
        assert words in body
    result = report.front[-1]
    value = format_loss(result.heldout.by_kind[1].loss, "nll")
    assert f"<dt>on &lt;code&gt;.py</dt><dd>{value} (held out)</dd>" in body
    assert f"- on \\<code\\>.py: {value} (held out)" in _describe_result(report, result)


def test_a_terminal_shows_the_kinds_where_there_is_room(make_study: MakeStudy) -> None:
    report = make_study(kinds=KINDS, metric="kl")
    columns = list_front_columns(report.front, metric="kl", digits=3, sign=" ±")
    assert columns["on <code>.py"] == [
        format_loss(point.heldout.by_kind[1].loss, "kl", digits=3, sign=" ±") for point in report.front
    ]
    shown = {}
    for width in (200, 50):
        stream = io.StringIO()
        Console(file=stream, width=width).print(build_front_table(report.front, width=width))
        shown[width] = stream.getvalue()
        assert max(map(len, shown[width].splitlines())) <= width
    assert "on wikitext2:validation" in shown[200]
    assert columns["on <code>.py"][-1] in shown[200]
    assert "on wikitext2" not in shown[50]


def test_a_study_of_one_kind_shows_none(make_study: MakeStudy) -> None:
    report = make_study()
    assert not report.has_kinds
    assert "kinds" not in build_charts(report)
    assert "Loss by kind of text" not in build_parts(report).body
    assert not any(name.startswith("on ") for name in list_front_columns(report.front, metric="nll"))
