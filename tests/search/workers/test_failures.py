"""Several workers: none waits for another, one that dies costs nothing but time, and a bad one is left out."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import optuna
import psutil
import pytest
from optuna.trial import TrialState

from lpsearch.errors import DataError, LpsearchError
from lpsearch.plan import Plan
from lpsearch.search import PlanSpace, StudyStore, run_study
from tests.search.evaluators import SyntheticEvaluator
from tests.search.workers.pools import make_worker_pool
from tests.search.workers.scripted import (
    NUM_LAYERS,
    await_log,
    fail_to_build,
    make_builder,
    read_log,
    refuse_to_build,
    release,
)
from tests.tolerances import FLOAT64_MEAN

both_kinds = pytest.mark.parametrize("pool_kind", ["local", "ray"], indirect=True)
BASE = Plan.baseline(NUM_LAYERS)


def build_plan(*joins):
    return Plan.from_joins(NUM_LAYERS, joins)


def await_workers(pool, count):
    """Wait until so many workers can evaluate."""
    for _ in range(600):
        if pool.num_slots >= count:
            return
        time.sleep(0.1)
    raise AssertionError(f"{pool.num_slots} workers instead of {count}")


@both_kinds
def test_a_search_on_two_workers_finishes_every_plan_once(pool_kind, tmp_path):
    reference = SyntheticEvaluator(NUM_LAYERS, num_windows=16)
    with (
        StudyStore(f"sqlite:///{tmp_path / 'study.db'}", study_name="demo") as store,
        make_worker_pool(pool_kind, make_builder(tmp_path, num_windows=16, delay_s=0.02), num_workers=2) as pool,
    ):
        await_workers(pool, 2)
        result = run_study(pool=pool, space=PlanSpace(NUM_LAYERS), store=store, budget=25)
        trials = optuna.load_study(study_name="demo", storage=store.optuna_storage).get_trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 25
    assert len({found.plan for found in result.results}) == 25
    for found in result.front:
        assert found.loss.nll == pytest.approx(
            sum(reference.evaluate_windows(found.plan, range(16)).nll_nats_per_token) / 16
        )
    assert len({pid for pid, _, _ in read_log(tmp_path)}) == 2


@both_kinds
def test_no_worker_waits_for_another(pool_kind, tmp_path):
    """One evaluation ends only after six that began later have ended: behind a barrier that would never be."""
    with make_worker_pool(pool_kind, make_builder(tmp_path, {1: "wait"}), num_workers=2) as pool:
        await_workers(pool, 2)
        slow = pool.submit(build_plan(1), [0])
        fast = [pool.submit(build_plan(join), [0]) for join in range(2, 8)]
        for future in fast:
            future.result(timeout=60)
        assert not slow.done()
        release(tmp_path)
        assert slow.result(timeout=60)


@both_kinds
def test_a_plan_goes_to_the_free_worker_that_ran_its_beginning(pool_kind, tmp_path):
    with make_worker_pool(pool_kind, make_builder(tmp_path, {0: "wait", 1: "wait"}), num_workers=2) as pool:
        await_workers(pool, 2)
        first, second = build_plan(0), build_plan(1)
        both = [pool.submit(first, [0]), pool.submit(second, [0])]
        pids = {plan: await_log(tmp_path, plan)[0] for plan in (first, second)}
        release(tmp_path)
        for future in both:
            future.result()
        assert len(set(pids.values())) == 2
        for plan, beginning in [((1, 7), second), ((0, 5), first), ((1, 7, 3), second), ((0, 8), first)]:
            pool.submit(build_plan(*plan), [0]).result()
            assert await_log(tmp_path, build_plan(*plan)) == [pids[beginning]]


@both_kinds
def test_the_plan_of_a_worker_that_was_killed_is_evaluated_elsewhere(pool_kind, tmp_path, caplog):
    with make_worker_pool(pool_kind, make_builder(tmp_path, {1: "wait"}), num_workers=2) as pool:
        await_workers(pool, 2)
        future = pool.submit(build_plan(1), [0])
        (victim,) = await_log(tmp_path, build_plan(1))
        os.kill(victim, signal.SIGKILL)
        pids = await_log(tmp_path, build_plan(1), count=2)
        release(tmp_path)
        assert future.result(timeout=60) == SyntheticEvaluator(NUM_LAYERS, num_windows=4).evaluate_windows(
            build_plan(1), [0]
        )
        assert pids[1] != victim
        await_workers(pool, 2)  # the one that was killed was started again
    assert "failed and is started again" in caplog.text


@both_kinds
def test_a_study_survives_the_death_of_a_worker_with_nothing_evaluated_twice(pool_kind, tmp_path):
    with (
        StudyStore(f"sqlite:///{tmp_path / 'study.db'}", study_name="demo") as store,
        make_worker_pool(pool_kind, make_builder(tmp_path, {4: "die once"}), num_workers=2) as pool,
    ):
        await_workers(pool, 2)
        result = run_study(pool=pool, space=PlanSpace(NUM_LAYERS), store=store, budget=20)
        trials = optuna.load_study(study_name="demo", storage=store.optuna_storage).get_trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 20
    ended = [plan for _, plan, what in read_log(tmp_path) if what == "ended"]
    assert sorted(plan.key for plan in ended) == sorted(found.plan.key for found in result.results)


@pytest.mark.parametrize("pool_kind", ["ray"], indirect=True)
def test_a_study_survives_ten_kills_of_its_workers_at_random_moments(pool_kind, tmp_path):
    """Each hits a worker that has evaluated something, so that none is left out for failing three times in a row."""
    rng, delay_s, num_kills, budget = random.Random(16), 0.03, 10, 60
    moments = sorted(rng.sample(range(2, budget - 15), num_kills))
    killed = []

    def kill_when_due(update):
        if len(killed) == num_kills or update.num_finished < moments[len(killed)]:
            return
        time.sleep(rng.uniform(0, 2 * delay_s))
        able = {pid for pid, _, what in read_log(tmp_path) if what == "ended"} - set(killed)
        able &= {report.pid for report in pool.reports}
        if able:  # else at a later trial
            killed.append(rng.choice(sorted(able)))
            os.kill(killed[-1], signal.SIGKILL)

    with (
        StudyStore(f"sqlite:///{tmp_path / 'study.db'}", study_name="demo") as store,
        make_worker_pool(pool_kind, make_builder(tmp_path, delay_s=delay_s), num_workers=2) as pool,
    ):
        await_workers(pool, 2)
        result = run_study(
            pool=pool, space=PlanSpace(NUM_LAYERS), store=store, budget=budget, staged=False, on_trial=kill_when_due
        )
        trials = optuna.load_study(study_name="demo", storage=store.optuna_storage).get_trials()
        await_workers(pool, 2)
    assert len(set(killed)) == num_kills
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * budget
    assert len({found.plan for found in result.results}) == budget
    reference = SyntheticEvaluator(NUM_LAYERS, num_windows=4)
    for found in result.results:
        nll = reference.evaluate_windows(found.plan, range(4)).nll_nats_per_token
        assert found.loss.nll == pytest.approx(sum(nll) / 4, abs=FLOAT64_MEAN)


@both_kinds
def test_a_plan_that_ends_every_worker_is_named_and_the_pool_goes_on(pool_kind, tmp_path):
    with make_worker_pool(pool_kind, make_builder(tmp_path, {6: "die"}), num_workers=3) as pool:
        await_workers(pool, 3)
        with pytest.raises(LpsearchError, match=r"5 workers failed on plan .*\[6,7\]") as caught:
            pool.submit(build_plan(6), [0]).result()
        assert "ended" in str(caught.value)
        assert pool.submit(BASE, [0]).result()


def test_a_worker_that_fails_three_times_in_a_row_is_reported_and_left_out(tmp_path, caplog):
    builder = make_builder(tmp_path, dict.fromkeys(range(9), "die in 0"))
    with make_worker_pool("local", builder, num_workers=2) as pool:
        await_workers(pool, 2)
        with StudyStore(f"sqlite:///{tmp_path / 'study.db'}", study_name="demo") as store:
            result = run_study(pool=pool, space=PlanSpace(NUM_LAYERS), store=store, budget=30, sampler="random")
        deadline = time.monotonic() + 120
        while "left out" not in caplog.text:
            assert time.monotonic() < deadline
            both = [pool.submit(build_plan(join), [0]) for join in (0, 1)]  # one for each, where both are there
            assert all(future.result() for future in both)
        assert pool.num_slots == 1
    assert len(result.results) == 30
    assert caplog.text.count("failed and is started again") == 2
    assert "failed three times in a row and is left out: process" in caplog.text
    assert "SIGKILL" in caplog.text


@both_kinds
def test_workers_that_cannot_load_end_the_search_with_the_reason(pool_kind, caplog):
    builder = partial(fail_to_build, "no driver")
    with pytest.raises(LpsearchError, match=r"every worker failed and was left out; the last: RuntimeError.*no driver"):
        make_worker_pool(pool_kind, builder, num_workers=1).__enter__()
    assert caplog.text.count("failed and is started again") == 2


def test_a_model_that_is_refused_is_not_loaded_again(caplog):
    builder = partial(refuse_to_build, "no such model")
    with pytest.raises(DataError, match="no such model"):
        make_worker_pool("local", builder, num_workers=2).__enter__()
    assert "started again" not in caplog.text


def test_workers_hold_several_evaluators(tmp_path):
    with make_worker_pool("local", make_builder(tmp_path), num_workers=1) as pool:
        other = pool.view("other")
        assert (other.num_slots, other.num_windows) == (1, 5)
        with other:
            losses = other.submit(BASE, [4]).result()
        assert losses == SyntheticEvaluator(NUM_LAYERS, num_windows=5).evaluate_windows(BASE, [4])
        assert pool.submit(BASE, [0]).result(), "closing a view closes nothing"


def test_a_worker_says_where_it_is(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with make_worker_pool("local", make_builder(tmp_path), num_workers=1) as pool:
        (report,) = pool.reports
        assert psutil.Process(report.pid).parent() == psutil.Process()
    assert f"worker 0 (process {report.pid} on {report.host}) evaluates on cpu" in caplog.text
    assert multiprocessing.active_children() == []


def test_workers_end_with_a_coordinator_that_is_killed(tmp_path):
    command = [sys.executable, "-m", "tests.search.workers.coordinator_main", str(tmp_path)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[3])
    (pid,) = await_log(tmp_path, build_plan(1))
    worker = psutil.Process(pid)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs([worker], timeout=20)
    assert not alive
