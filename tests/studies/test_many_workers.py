"""The simulation of many workers: its cost against an enumeration, its clock, and that its search is the real one."""

from __future__ import annotations

import json

import pytest

from lpsearch.plan import Plan
from lpsearch.search import PlanSpace, StudyStore, run_study
from studies import coordinator_load, many_workers, search_workers
from tests.tolerances import FLOAT64_MEAN


def test_the_cheapest_plans_of_the_synthetic_cost_are_those_of_an_enumeration():
    problem = many_workers.build_synthetic(10, seed=4)
    plans = list(PlanSpace(10).enumerate_plans())
    for k, least in enumerate(problem.least_nll, start=1):
        assert least == pytest.approx(
            min(problem.get_nll(plan) for plan in plans if plan.num_joins >= k), abs=FLOAT64_MEAN
        )
    assert many_workers.compute_regret(problem, plans) == pytest.approx(0.0, abs=1e-12)
    assert many_workers.compute_regret(problem, [Plan.baseline(10)]) > 1


def build_still_clock():
    """Return a clock by which the coordinator takes no time."""
    return lambda: 0.0


def test_a_coordinator_that_takes_no_time_keeps_every_worker_at_work():
    problem = many_workers.build_synthetic(12)
    pool = many_workers.simulate(
        problem, num_workers=4, evaluations=40, seconds=5.0, sampler="random", seed=0, read_clock=build_still_clock()
    )
    assert pool.now_s == 50.0, "forty evaluations of five seconds on four workers"
    assert len(set(pool.plans)) == len(pool.plans) == 40


def test_one_simulated_worker_is_the_search_of_one_evaluator(tmp_path):
    problem = many_workers.build_synthetic(12)

    class Evaluator:
        num_windows = 1

        def evaluate_windows(self, plan, window_indices):
            return many_workers.WindowLosses((problem.get_nll(plan),), None, 1)

    pool = many_workers.simulate(
        problem, num_workers=1, evaluations=30, seconds=5.0, sampler="pairset", seed=0, read_clock=build_still_clock()
    )
    with StudyStore(f"sqlite:///{tmp_path / 'study.db'}", study_name="demo") as store:
        result = run_study(evaluator=Evaluator(), space=problem.space, store=store, budget=30)
    assert pool.plans == [found.plan for found in result.results]


def test_many_workers_find_the_front_too():
    problem = many_workers.build_synthetic(14)
    pool = many_workers.simulate(
        problem, num_workers=16, evaluations=120, seconds=5.0, sampler="pairset", seed=0, read_clock=build_still_clock()
    )
    assert len(set(pool.plans)) == 120
    assert many_workers.compute_regret(problem, pool.plans) == pytest.approx(0.0, abs=1e-3)


def test_the_load_benchmark_prints_its_curve(capsys, tmp_path):
    arguments = ["--layers", "8", "--trials", "20", "--workers", "2", "--seconds", "0.001", "--every", "5"]
    assert coordinator_load.main([*arguments, "--plot", str(tmp_path / "load.html")]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [point["num_trials"] for point in summary["points"]] == [10, 15, 20]
    assert summary["least_trials_per_s"] > 0
    assert "finished trials" in (tmp_path / "load.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("warm_starts")
def test_a_study_of_a_random_model_is_timed_on_one_and_two_workers(tiny_model_dir, capsys):
    arguments = ["--model", str(tiny_model_dir), "--workers", "1,2", "--trials", "13", "--windows", "3"]
    assert search_workers.main([*arguments, "--seq-len", "20", "--device", "cpu", "--dtype", "float32"]) == 0
    one, two = map(json.loads, capsys.readouterr().out.splitlines()[-2:])
    assert (one["workers"], two["workers"]) == (1, 2)
    assert one["trials"] == two["trials"] == 13
    assert one["front"] == two["front"], "the whole space, whichever worker evaluated a plan"
    assert min(one["study_s"], two["study_s"]) > 0
