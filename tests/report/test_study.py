"""What is read of a study, against plain computations from what its evaluator says."""

from __future__ import annotations

import dataclasses
import json
import math
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from lpsearch.errors import StudyVersionError, UsageError
from lpsearch.plan import Plan
from lpsearch.report import load_report
from lpsearch.search import StudyStore
from lpsearch.search.samplers.surrogate import Surrogate
from tests.report.conftest import NUM_LAYERS, MakeStudy, build_profile
from tests.search.evaluators import SyntheticEvaluator
from tests.tolerances import FLOAT64_INTERACTIONS


def read(directory: Path):
    with StudyStore(f"sqlite:///{directory / 'study.db'}", study_name="demo") as store:
        return load_report(store, directory)


def test_front_and_held_out_values(make_study: MakeStudy) -> None:
    report = make_study()
    seen, unseen = SyntheticEvaluator(NUM_LAYERS, num_windows=8), SyntheticEvaluator(NUM_LAYERS, num_windows=5)

    def compare(evaluator: SyntheticEvaluator, plan: Plan) -> tuple[float, float]:
        indices = range(evaluator.num_windows)
        base = evaluator.evaluate_windows(Plan.baseline(NUM_LAYERS), indices).nll_nats_per_token
        losses = evaluator.evaluate_windows(plan, indices).nll_nats_per_token
        differences = [a - b for a, b in zip(losses, base, strict=True)]
        mean = sum(differences) / len(differences)
        variance = sum((value - mean) ** 2 for value in differences) / (len(differences) - 1)
        return mean, math.sqrt(variance / len(differences))

    complete = [record for record in report.results if record.proxy_tokens == 8 * 63]
    assert report.front[0].num_joins == 0
    for point in report.front:
        delta, error = compare(seen, point.plan)
        assert (point.loss.delta_nll, point.loss.delta_nll_se) == pytest.approx((delta, error))
        assert (point.heldout.delta_nll, point.heldout.delta_nll_se) == pytest.approx(compare(unseen, point.plan))
    expected = {
        a.plan
        for a in complete
        if not any(b.num_joins >= a.num_joins and b.loss.delta_nll < a.loss.delta_nll for b in complete if b.num_joins)
    }
    assert {point.plan for point in report.front} == expected | {Plan.baseline(NUM_LAYERS)}
    assert report.is_current
    assert not report.is_exact


def test_latencies_are_those_of_the_profile(make_study: MakeStudy) -> None:
    report = make_study()
    costs, kinds = build_profile().workloads[0].cost_ms, build_profile().geometry.layer_kinds
    base_ms = 1.5 + 8 * 0.9 + 2 * 0.7
    for point in report.front:
        expected = 1.5
        for group in point.plan.groups:
            names = sorted(kinds[layer_idx] for layer_idx in group)
            if len(names) == 1 or names[0] == names[1]:
                expected += costs[f"{len(names)} {names[0]}"]
            else:
                expected += costs["1 full + 1 sliding"]
        assert point.latency_ms == pytest.approx(expected)
        assert point.speedup == pytest.approx(base_ms / expected)


def test_effects_are_those_of_the_surrogate(make_study: MakeStudy) -> None:
    report = make_study()
    num_joins = NUM_LAYERS - 1
    plans = sorted((record for record in report.results if record.num_joins), key=lambda record: record.plan.joins)
    single = {record.plan.joins[0]: record for record in plans if record.num_joins == 1}
    assert len(single) == num_joins
    surrogate = Surrogate(
        joined=np.array([[i in record.plan.joins for i in range(num_joins)] for record in plans]),
        delta_nll=np.array([record.loss.delta_nll for record in plans]),
        sampling_error=np.array(
            [(record.loss.delta_nll_se or 0) * math.sqrt(1 - record.proxy_tokens / (8 * 63)) for record in plans]
        ),
        join_means=np.array([single[i].loss.delta_nll for i in range(num_joins)]),
        measured=np.ones(num_joins, dtype=bool),
    )

    def expect(*joins: int) -> float:
        return float(surrogate.estimate_mean(np.array([[i in joins for i in range(num_joins)]]))[0])

    assert report.effects.measured == tuple(single[i].loss.delta_nll for i in range(num_joins))
    assert report.effects.expected == pytest.approx([expect(i) for i in range(num_joins)])
    for i in range(num_joins):
        for j in range(num_joins):
            value = report.effects.interactions[i][j]
            if abs(i - j) <= 1:
                assert value is None, "a join and itself or its neighbour make no pairs"
            else:
                assert value == pytest.approx(expect(i, j) - expect(i) - expect(j), abs=FLOAT64_INTERACTIONS)


def test_a_broken_join_has_no_measured_cost(make_study: MakeStudy) -> None:
    report = make_study(evaluator=SyntheticEvaluator(NUM_LAYERS, num_windows=8, broken_join=4))
    assert report.effects.measured[4] is None
    assert math.isfinite(report.effects.expected[4])
    assert all(4 not in point.plan.joins for point in report.front)


def test_blocks_are_compared_where_the_study_tried_them(make_study: MakeStudy) -> None:
    report = make_study(sampler="window", budget=40)
    evaluator = SyntheticEvaluator(NUM_LAYERS, num_windows=8)
    for record in report.blocks:
        k = record.num_joins
        windows = [
            tuple(range(first, first + 2 * k, 2)) for first in range(NUM_LAYERS - 1) if first + 2 * k <= NUM_LAYERS
        ]
        evaluated = {other.plan.joins for other in report.results if other.proxy_tokens == 8 * 63}
        losses = [
            float(np.mean(evaluator.evaluate_windows(Plan.from_joins(NUM_LAYERS, joins), range(8)).nll_nats_per_token))
            for joins in windows
            if joins in evaluated
        ]
        assert record.loss.nll == pytest.approx(min(losses))
    assert {record.num_joins for record in report.blocks} >= {1, 2, 3}


def test_blocks_met_by_chance_are_no_comparison(make_study: MakeStudy) -> None:
    assert make_study(sampler="pairset").blocks == ()


def test_kl_studies_compare_kl(make_study: MakeStudy) -> None:
    report = make_study(metric="kl", objective="latency")
    assert [point.heldout.kl_nats_per_token for point in report.front] == pytest.approx(
        [SyntheticEvaluator(NUM_LAYERS).compute_delta(point.plan) for point in report.front]
    )


def test_an_unfinished_study_shows_what_is_there(make_study: MakeStudy, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make_study(evaluator=SyntheticEvaluator(NUM_LAYERS, num_windows=8, fail_at=6))
    report = read(tmp_path)
    assert 1 <= len(report.results) <= 6
    assert not report.is_current
    assert all(point.plan_file is None and point.heldout is None for point in report.front)


def test_a_front_that_went_on_is_not_current(make_study: MakeStudy, tmp_path: Path) -> None:
    make_study(budget=14)
    report = make_study(budget=20, files=False)
    assert not report.is_current
    kept = [point for point in report.front if point.plan_file is not None]
    assert all((tmp_path / point.plan_file).is_file() for point in kept)
    (tmp_path / report.front[0].plan_file).unlink()
    assert read(tmp_path).front[0].plan_file is None


def test_a_study_without_a_finished_plan_is_named(make_study: MakeStudy, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make_study(evaluator=SyntheticEvaluator(NUM_LAYERS, num_windows=8, fail_at=0))
    with pytest.raises(UsageError, match="no plan of the study 'demo' is finished yet"):
        read(tmp_path)


def test_studies_of_other_versions_are_refused(make_study: MakeStudy, tmp_path: Path) -> None:
    report = make_study()
    front_file = tmp_path / "front.json"
    document = json.loads(front_file.read_text(encoding="utf-8"))
    front_file.write_text(json.dumps({**document, "schema_version": 0}), encoding="utf-8")
    with pytest.raises(StudyVersionError, match="schema_version is 0, this lpsearch reads 1"):
        read(tmp_path)
    front_file.write_text("not json", encoding="utf-8")
    assert [point.plan_file for point in read(tmp_path).front] == [None] * len(report.front)
    front_file.unlink()
    with closing(sqlite3.connect(tmp_path / "study.db")) as connection, connection:
        connection.execute("DELETE FROM trial_user_attributes WHERE key = 'groups' AND trial_id = 3")
    with pytest.raises(StudyVersionError, match="another version of lpsearch: a trial lacks"):
        read(tmp_path)
    with closing(sqlite3.connect(tmp_path / "study.db")) as connection, connection:
        connection.execute("""UPDATE lpsearch_studies SET settings = '{"model": "m"}'""")
    with pytest.raises(StudyVersionError, match="its record has no num_layers, max_group, metric, objective"):
        read(tmp_path)


def test_the_front_file_of_another_study_is_left_out(
    make_study: MakeStudy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_study(budget=12)
    path = tmp_path / "front.json"
    front = json.loads(path.read_text(encoding="utf-8"))
    for named, is_own in (("demo", True), ("other", False)):
        path.write_text(json.dumps({**front, "study": named}), encoding="utf-8")
        report = read(tmp_path)
        assert report.is_current == is_own
        assert all((point.plan_file is not None) == is_own for point in report.front)
        assert ("of the study 'other', not 'demo'" in caplog.text) == (not is_own)


def test_a_profile_of_another_version_is_left_out(make_study: MakeStudy, tmp_path: Path) -> None:
    report = make_study()
    with StudyStore(f"sqlite:///{tmp_path / 'study.db'}", study_name="demo") as store:
        store.save_latency_profile({"schema_version": 1})
        again = load_report(store, tmp_path)
    assert again.latency_model is None
    assert [dataclasses.replace(record, latency_ms=None, speedup=None) for record in again.results] == [
        dataclasses.replace(record, latency_ms=None, speedup=None) for record in report.results
    ]
