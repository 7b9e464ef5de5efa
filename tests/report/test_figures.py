"""The data of every figure, against what the records say."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go
import pytest

from lpsearch.latency.model import LatencyModel
from lpsearch.plan import Plan
from lpsearch.report.advice import LOSS_LIMITS, list_commands, pick_plans
from lpsearch.report.charts import build_charts
from lpsearch.report.figures import build_front_figure, build_layers_figure, describe_groups
from lpsearch.report.latency_figures import build_breakdown_figure, build_fit_figure, compute_breakdown
from lpsearch.report.search_figures import (
    build_effects_figure,
    build_interactions_figure,
    build_progress_figure,
)
from lpsearch.report.theme import DARK, map_colours
from lpsearch.search import Loss, TrialResult
from tests.report.conftest import MakeStudy, build_profile
from tests.tolerances import PRINTED_DIGITS


def get_trace(figure: go.Figure, name: str) -> Any:
    [trace] = [trace for trace in figure.data if trace.name == name]
    return trace


@pytest.mark.parametrize("saving", ["depth", "latency"])
@pytest.mark.parametrize("loss", ["delta", "perplexity"])
def test_front_figure(make_study: MakeStudy, saving: str, loss: str) -> None:
    report = make_study(sampler="window", budget=34)
    figure = build_front_figure(report, saving=saving, loss=loss)

    def place(record: Any) -> tuple[float, float]:
        return (
            100 * (1 - record.plan.depth / report.num_layers) if saving == "depth" else record.latency_ms,
            record.loss.delta_nll if loss == "delta" else math.exp(record.loss.nll),
        )

    drawn = {"front": report.front, "best block": report.blocks}
    drawn["every other trial"] = [record for record in report.results if record not in report.front]
    for name, records in drawn.items():
        trace = get_trace(figure, name)
        expected = sorted(place(record) for record in records)
        for found, wanted in zip(sorted(zip(trace.x, trace.y, strict=True)), expected, strict=True):
            assert found == pytest.approx(wanted)
    front = get_trace(figure, "front")
    for x, y, text, index, above in zip(
        front.x, front.y, front.text, front.customdata, front.error_y.array, strict=True
    ):
        record = report.front[index]
        assert (x, y) == pytest.approx(place(record)), "a click on a point must find its own plan"
        assert f"layers {describe_groups(record.plan)}" in text.replace("<br>", " ")
        error = record.loss.delta_nll_se or 0.0
        nll = record.loss.nll
        assert above == pytest.approx(error if loss == "delta" else math.exp(nll + error) - math.exp(nll))
    heldout = get_trace(figure, "front, held out")
    losses = [point.heldout.delta_nll for point in report.front]
    base = report.baseline.loss.nll
    assert list(heldout.y) == pytest.approx(losses if loss == "delta" else [math.exp(base + x) for x in losses])
    assert figure.data[-1].name == "chosen plan"


def test_layers_of_a_group_share_a_colour_and_neighbouring_groups_do_not(make_study: MakeStudy) -> None:
    report = make_study()
    [trace] = build_layers_figure(report).data
    assert len(trace.z) == len(report.front)
    for row, text, point in zip(trace.z, trace.text, report.front, strict=True):
        for group in point.plan.groups:
            assert {row[i] for i in group} == {row[group[0]]}
            assert (row[group[0]] == 0) == (len(group) == 1)
            assert text[group[0]].endswith("alone" if len(group) == 1 else f"{group[0]}-{group[-1]}")
        for left, right in pairwise(point.plan.groups):
            if len(left) > 1 and len(right) > 1:
                assert row[left[0]] != row[right[0]]


def test_search_figures(make_study: MakeStudy) -> None:
    report = make_study()
    effects = report.effects
    measured = get_trace(build_effects_figure(report), "measured alone")
    assert dict(zip(measured.x, measured.y, strict=True)) == dict(enumerate(effects.measured))
    [heatmap] = build_interactions_figure(report).data
    assert [list(row) for row in heatmap.z] == [list(row) for row in effects.interactions]
    assert heatmap.zmin == -heatmap.zmax
    for unit in ("trials", "tokens"):
        figure = build_progress_figure(report, unit=unit)
        steps = report.progress
        places = [step.trial if unit == "trials" else step.tokens for step in steps]
        drawn = {"hypervolume": [step.hypervolume for step in steps]}
        for trace in figure.data[1:]:
            num_joins = int(trace.name.split()[0])
            drawn[trace.name] = [step.best.get(num_joins) for step in steps]
        assert len(drawn) > 3
        for name, values in drawn.items():
            trace = get_trace(figure, name)
            points = dict(zip(trace.x, trace.y, strict=True))
            assert max(points) == places[-1]
            for place, value in zip(places, values, strict=True):
                reached = [x for x in points if x <= place]
                assert (points[max(reached)] if reached else None) == value, "between its points a line stays level"


def test_joins_that_were_not_measured_are_shown_as_expected(make_study: MakeStudy) -> None:
    report = make_study(budget=6)
    figure = build_effects_figure(report)
    expected = get_trace(figure, "expected by the surrogate")
    assert set(expected.x) == {i for i, value in enumerate(report.effects.measured) if value is None}
    assert list(expected.y) == [report.effects.expected[i] for i in expected.x]


def test_latency_figures(make_study: MakeStudy) -> None:
    report = make_study()
    figure = build_fit_figure(report)
    fitted, checked = get_trace(figure, "fitted to"), get_trace(figure, "only checked on")
    assert (fitted.x[0], fitted.y[0]) == pytest.approx((1.5 + 8 * 0.9 + 2 * 0.7, 10.0))
    assert (checked.x[0], checked.y[0]) == pytest.approx((1.5 + 4 * 1.3 + 1.1, 7.5))
    assert (checked.error_y.array[0], checked.error_y.arrayminus[0]) == pytest.approx((12.0 - 7.5, 0.5))
    for index in (0, 1):
        bars = build_breakdown_figure(report, workload_index=index).data
        model = LatencyModel(build_profile(), index)
        for row, point in enumerate(report.front):
            assert sum(bar.x[row] for bar in bars) == pytest.approx(model.estimate_latency_ms(point.plan))
    parts = compute_breakdown(build_profile().workloads[0], build_profile().geometry, Plan.from_joins(10, (0, 7)))
    assert parts == pytest.approx(
        {
            "overhead": 1.5,
            "1 full": 5 * 0.9,
            "2 full": 1.3,
            "1 sliding": 0.7,
            "2 sliding": 0.0,
            "1 full + 1 sliding": 1.25,
        }
    )


def test_recoloured_figures_are_those_of_the_dark_theme(make_study: MakeStudy) -> None:
    report = make_study(sampler="window", budget=34)
    colours = map_colours()

    def recolour(value: Any) -> Any:
        if isinstance(value, str):
            return colours.get(value, value)
        if isinstance(value, list):
            return [recolour(item) for item in value]
        return {key: recolour(item) for key, item in value.items()} if isinstance(value, dict) else value

    for build in (
        build_front_figure,
        build_layers_figure,
        build_effects_figure,
        build_interactions_figure,
        build_progress_figure,
        build_fit_figure,
        build_breakdown_figure,
    ):
        light = json.loads(build(report).to_json())
        assert recolour(light) == json.loads(build(report, theme=DARK).to_json())


def test_tables_hold_the_data_of_their_figures(make_study: MakeStudy) -> None:
    report = make_study(sampler="window", budget=34)
    charts = build_charts(report)
    assert list(charts) == ["front", "layers", "progress", "effects", "interactions", "fit", "breakdown"]
    for chart in charts.values():
        assert chart.table.rows
        assert {len(row) for row in chart.table.rows} == {len(chart.table.columns)}
    for row, point in zip(charts["front"].table.rows, report.front, strict=True):
        assert row[0] == str(point.num_joins)
        assert row[2].startswith(f"{point.loss.delta_nll:.4f}")
        assert row[3].startswith(f"{point.heldout.delta_nll:.4f}")
        assert row[-1] == describe_groups(point.plan)
    strongest = charts["interactions"].table.rows[0][1]
    values = [value for row in report.effects.interactions for value in row if value is not None]
    assert abs(float(strongest)) == pytest.approx(max(map(abs, values)), abs=PRINTED_DIGITS)


def test_picks_are_the_deepest_plans_within_their_loss(make_study: MakeStudy) -> None:
    report = make_study()
    for pick in pick_plans(report):
        assert pick.max_loss == LOSS_LIMITS[pick.name]
        within = [
            point.num_joins for point in report.front if point.heldout.delta_nll <= pick.max_loss and point.num_joins
        ]
        if not within:
            assert pick.index is None
        else:
            assert report.front[pick.index].num_joins == max(within)
    assert any(pick.index is not None for pick in pick_plans(report))


def test_picks_of_a_search_for_latency_are_the_fastest_within_their_loss(make_study: MakeStudy) -> None:
    found = make_study()
    num_points = len(found.front)
    assert num_points > 3

    def set_delta(point: TrialResult, delta: float) -> Loss:
        return dataclasses.replace(point.loss, delta_nll=delta)

    # Layers unlike each other: the plan of most joins is not the fastest.
    speedups = [1.0, 1.5, 1.1, *(1.2 + 0.001 * index for index in range(num_points - 3))]
    front = tuple(
        dataclasses.replace(point, speedup=speedup, heldout=set_delta(point, 0.001 * index))
        for index, (point, speedup) in enumerate(zip(found.front, speedups, strict=True))
    )
    by_depth = dataclasses.replace(found, front=front)
    by_latency = dataclasses.replace(by_depth, settings={**found.settings, "objective": "latency"})
    assert [pick.index for pick in pick_plans(by_depth)] == [num_points - 1] * 3
    assert [pick.index for pick in pick_plans(by_latency)] == [1] * 3
    slow = tuple(dataclasses.replace(point, heldout=set_delta(point, 9.0)) for point in front[:2])
    by_latency = dataclasses.replace(by_latency, front=(*slow, *front[2:]))
    assert [pick.index for pick in pick_plans(by_latency)] == [num_points - 1] * 3


def test_commands_quote_what_a_shell_would_read(make_study: MakeStudy) -> None:
    import dataclasses
    import shlex

    report = dataclasses.replace(make_study(), directory="a dir/$x")
    lines = [command.line for command in list_commands(report, report.front[1])]
    words = [shlex.split(line) for line in lines]
    assert words[0] == [
        *("lpsearch", "evaluate", f"a dir/$x/{report.front[1].plan_file}"),
        *("--data", "a text.txt", "--windows", "8", "--seq-len", "64"),
    ]
    assert [line[:2] for line in words] == [
        ["lpsearch", "evaluate"],
        ["lpsearch", "generate"],
        ["lpsearch", "export"],
        ["lpsearch", "generate"],
        ["vllm", "serve"],
    ]
    assert words[2][3] == words[3][2] == words[4][2], "what is exported is what is served"
