"""What is shown of plans that drop branches: never as the unmodified model, and beside what joins alone would give."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path

import plotly.graph_objects as go
import pytest
from rich.console import Console

from lpsearch.commands.plan import pick, show
from lpsearch.commands.tables import build_front_table as build_terminal_table
from lpsearch.front_file import load_front_file
from lpsearch.plan import Plan, load_plan
from lpsearch.report import StudyReport, build_html
from lpsearch.report.advice import LOSS_LIMITS, compare_ways, list_commands, pick_plans
from lpsearch.report.charts import build_charts
from lpsearch.report.figures import build_front_figure, build_layers_figure
from lpsearch.report.search_figures import choose_best_lines, name_best_line
from lpsearch.report.study import describe_cache, name_row
from lpsearch.report.tables import build_front_table, build_ways_table
from tests.report.conftest import EVERYTHING, NUM_LAYERS, DroppingEvaluator, search_formula
from tests.report.pages import parse
from tests.tolerances import FLOAT64_COSTS


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drops")


@pytest.fixture(scope="module")
def report(directory: Path) -> StudyReport:
    report = search_formula(directory, budget=40, objective="latency", allow=EVERYTHING)
    kinds = {(result.num_joins > 0, result.num_dropped > 0) for result in report.front}
    assert kinds == {(False, False), (True, False), (False, True), (True, True)}, "the front has plans of every kind"
    return report


def test_only_the_unmodified_model_is_shown_as_such(report: StudyReport) -> None:
    rows = build_front_table(report).rows
    assert rows[0][0] == "unmodified"
    assert "every layer alone" in rows[0]
    assert len({row[0] for row in rows}) == len(rows), "every plan has a name of its own"
    front = next(trace for trace in build_front_figure(report).data if trace.name == "front")
    texts = dict(zip(front.customdata, front.text, strict=True))
    for index, (row, result) in enumerate(zip(rows, report.front, strict=True)):
        for branch, name in (("attention", "attention"), ("mlp", "MLP")):
            if layers := result.plan.dropped[branch]:
                words = f"without {name} {', '.join(map(str, layers))}"
                assert words in row[-1]
                assert words in texts[index].replace("<br>", " ")
        assert (row[-1] == "every layer alone") == result.is_baseline


def test_every_plan_of_the_front_has_its_own_file(report: StudyReport, directory: Path) -> None:
    assert len({result.plan_file for result in report.front}) == len(report.front)
    for result in report.front:
        assert load_plan(directory / str(result.plan_file)) == result.plan
        assert list_commands(report, result)


def test_the_map_of_layers_shows_what_is_left_out(report: StudyReport) -> None:
    heatmap, *marks = build_layers_figure(report).data
    assert len(heatmap.z) == heatmap.meta * len(report.front) == 2 * len(report.front)
    drawn = {mark.name: set(zip(mark.x, mark.y, strict=True)) for mark in marks}
    assert len({mark.marker.symbol for mark in marks}) == 2, "told apart without colour"
    expected: dict[str, set[tuple[int, float]]] = {"attention left out": set(), "MLP left out": set()}
    for place, result in enumerate(report.front):
        for half, (branch, name) in enumerate((("attention", "attention"), ("mlp", "MLP"))):
            values, texts = heatmap.z[2 * place + half], heatmap.text[2 * place + half]
            for layer_idx in range(NUM_LAYERS):
                is_dropped = layer_idx in result.plan.dropped[branch]
                assert (values[layer_idx] is None) == is_dropped
                assert texts[layer_idx].startswith(f"{name_row(report, result)}<br>layer {layer_idx}: ")
                without = texts[layer_idx].partition(", without ")[2].split(" and ")
                assert (name in without) == is_dropped
                if is_dropped:
                    expected[f"{name} left out"].add((layer_idx, heatmap.y[2 * place + half]))
    assert drawn == expected


def test_what_joins_drops_and_both_give_is_that_of_all_trials(report: StudyReport) -> None:
    base_ms = report.baseline.latency_ms
    table = build_ways_table(report)
    for row, limit in zip(table.rows, LOSS_LIMITS.values(), strict=True):
        ways = compare_ways(report.results, metric="nll", objective="latency", max_loss=limit)
        best: dict[str, float] = {}
        for result in report.results:
            loss = result.loss if result.heldout is None else result.heldout
            saved = base_ms / result.latency_ms
            if result.proxy_tokens == report.baseline.proxy_tokens and loss.delta_nll <= limit and saved > 1:
                joins, drops = bool(result.plan.joins), result.plan.num_dropped > 0
                name = "both" if joins and drops else "joins" if joins else "drops"
                best[name] = max(saved, best.get(name, 0.0))
        assert best
        assert {name: found.speedup for name, found in ways.items() if found is not None} == pytest.approx(best)
        for name, cell in zip(ways, row[1:4], strict=True):
            assert cell.startswith(f"{best[name]:.3f}x at " if name in best else "no plan")
        assert row[4].split()[0] == max(best, key=best.__getitem__)
    on_front = {result.plan for result in report.front}
    ways = compare_ways(report.results, metric="nll", objective="latency", max_loss=0.4)
    assert any(found is not None and found.plan not in on_front for found in ways.values())


def test_a_study_of_joins_alone_compares_no_ways(tmp_path: Path) -> None:
    page = build_html(search_formula(tmp_path, budget=12))
    assert "Joins, drops or both" not in page
    assert "left out" not in page.split("</main>")[0]


def test_effects_are_those_of_every_choice(report: StudyReport) -> None:
    effects = report.effects
    assert effects is not None
    evaluator = DroppingEvaluator(NUM_LAYERS, num_windows=8)
    single = {result.plan: result.loss.delta_nll for result in report.results}
    assert len(effects.choices) == 3 * NUM_LAYERS - 1
    num_measured = 0
    for choice, measured in zip(effects.choices, effects.measured, strict=True):
        whole = Plan.baseline(NUM_LAYERS)
        first = choice.layers[0]
        plan = Plan.from_joins(NUM_LAYERS, [first]) if choice.kind == "join" else whole.drop({choice.kind[5:]: [first]})
        assert measured == single.get(plan)
        if measured is not None and choice.kind != "join":  # of joins, windows differ
            assert measured == pytest.approx(evaluator.compute_delta(plan), abs=FLOAT64_COSTS)
            num_measured += 1
    assert num_measured > NUM_LAYERS
    charts = build_charts(report)
    [figure] = charts["effects"].figures.values()
    assert sum(len(trace.x) for trace in figure.data) == len(effects.choices)
    [figure] = charts["interactions"].figures.values()
    assert len(figure.data[0].z) == len(effects.choices)
    names = {row[0] for row in charts["effects"].table.rows}
    assert {"join 0 and 1", "attention 0", f"MLP {NUM_LAYERS - 1}"} <= names


def test_progress_is_by_what_is_saved(report: StudyReport) -> None:
    base_ms = report.baseline.latency_ms
    shown = choose_best_lines(report)
    assert len(shown) > 2
    for level in shown:
        assert name_best_line(report, level) == f"{level} % less time"
        for step in report.progress[::7]:
            reached = [
                result.loss.delta_nll
                for result in report.results
                if result.trial <= step.trial
                and result.state == "complete"
                and result.latency_ms <= base_ms * (1 - level / 100) + FLOAT64_COSTS
            ]
            assert step.best.get(level, math.inf) == min(reached, default=math.inf)


def test_the_page_says_what_is_left_out_and_the_cache_that_it_saves(report: StudyReport) -> None:
    page = parse(build_html(report))
    whole = 2 * 2 * 4 * 4 * NUM_LAYERS  # keys and values of 2 heads of 4 float32 numbers
    for result in report.front:
        kept = NUM_LAYERS - len(result.plan.dropped["attention"])
        expected = f"{whole * kept // NUM_LAYERS:,} bytes a token"
        assert describe_cache(report, result).startswith(expected)
        assert expected in page.text
    assert "Joins, drops or both" in page.text
    drawn = json.loads(page.data)["figures"]["front"]
    assert next(iter(drawn)).startswith("latency"), "what was searched is drawn first"


def test_plan_pick_takes_plans_of_any_kind(report: StudyReport, directory: Path) -> None:
    for advised in pick_plans(report):
        picked = pick(directory, max_delta=advised.max_loss).document
        # Of the least limit no plan may be faster by more than its speed-up may be off.
        assert (advised.index is None) == (advised.gains is False)
        assert load_plan(picked["plan"]) == report.front[advised.index or 0].plan
    assert [advised.index is not None for advised in pick_plans(report)][1:] == [True, True]
    drops_alone = next(result for result in report.front if result.num_dropped and not result.num_joins)
    picked = pick(directory, max_delta=drops_alone.heldout.delta_nll, min_speedup=drops_alone.speedup).document
    assert (load_plan(picked["plan"]), picked["num_joins"]) == (drops_alone.plan, 0)
    assert set(picked["ways"]) == {"joins", "drops", "both"}
    ways = compare_ways(report.results, metric="nll", objective="latency", max_loss=drops_alone.heldout.delta_nll)
    for name, found in ways.items():
        said = picked["ways"][name]
        assert (said is None) == (found is None)
        if found is not None:
            assert Plan.from_groups(said["groups"], dropped=said["dropped"]) == found.plan
            assert (said["loss"], said["speedup"]) == (found.get_reported_cost("nll"), found.speedup)
    assert "ways" not in pick(directory, min_speedup=1.0).document, "no loss to compare them at"
    file = load_front_file(directory)
    assert file is not None
    assert [point.num_dropped for point in file.front] == [result.plan.num_dropped for result in report.front]


def test_plan_pick_answers_without_the_database(
    report: StudyReport, directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(directory / "front.json", tmp_path)
    whole, alone = dict(pick(directory, max_delta=0.1).document), pick(tmp_path, max_delta=0.1).document
    del whole["ways"]
    assert {**whole, "plan": ""} == {**alone, "plan": ""}
    (tmp_path / "study.db").write_bytes(b"no database" * 100)
    assert pick(tmp_path, max_delta=0.1).document == alone
    assert "joins and drops are not compared" in caplog.text


def test_plan_show_says_what_is_left_out(report: StudyReport, tmp_path: Path) -> None:
    from lpsearch.plan import ModelIdentity, PlanMetadata, PlanMetrics, save_plan

    assert report.latency_model is not None
    plan = Plan.from_joins(NUM_LAYERS, [3]).drop({"attention": [5, 7], "mlp": [8]})
    metadata = PlanMetadata(
        model=ModelIdentity(id="m", num_layers=NUM_LAYERS, fingerprint="a-b"),
        metrics=PlanMetrics(latency=report.latency_model.build_metrics(plan)),
    )
    save_plan(Plan(plan.groups, metadata), tmp_path / "plan.json")
    answer = show(tmp_path / "plan.json")
    assert answer.document["dropped"] == {"attention": [5, 7], "mlp": [8]}
    console = Console(file=io.StringIO(), width=200)
    console.print(answer.summary)
    shown = console.file.getvalue()
    assert "1 join, 2 attentions and 1 MLP dropped: 3-4; without attention 5, 7; without MLP 8" in shown
    assert "KV cache     512 bytes a token, for 640 of the unmodified model" in shown


def test_the_table_of_a_terminal_counts_drops(report: StudyReport) -> None:
    table = build_terminal_table(report.front, width=160)
    columns = {column.header: list(column.cells) for column in table.columns}
    assert columns["drops"] == [str(result.plan.num_dropped) for result in report.front]


def test_axes_name_kinds_of_choices(report: StudyReport) -> None:
    figure: go.Figure
    [figure] = build_charts(report)["interactions"].figures.values()
    assert list(figure.layout.xaxis.ticktext) == ["joins", "attention dropped", "MLP dropped"]
