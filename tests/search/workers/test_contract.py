"""What every pool must do: the thread, a process of this machine, and a Ray actor."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import psutil
import pytest

from lpsearch.errors import DataError
from lpsearch.plan import Plan
from lpsearch.search import PlanSpace, StudyStore, run_study
from tests.search.evaluators import SyntheticEvaluator
from tests.search.workers.pools import POOLS
from tests.search.workers.scripted import NUM_LAYERS, await_log, make_builder, read_log, release

PLANS = [Plan.from_joins(NUM_LAYERS, joins) for joins in ((), (0,), (2, 5), (8,), (1, 3, 6))]

pytestmark = pytest.mark.parametrize("pool_kind", POOLS, indirect=True)


def test_losses_are_those_of_the_evaluator(pool_kind, tmp_path):
    reference = SyntheticEvaluator(NUM_LAYERS, num_windows=4)
    with POOLS[pool_kind](make_builder(tmp_path)) as pool:
        assert (pool.num_slots, pool.num_windows) == (1, 4)
        futures = [pool.submit(plan, [3, 1]) for plan in PLANS]
        assert [future.result() for future in futures] == [reference.evaluate_windows(plan, [3, 1]) for plan in PLANS]


def test_plans_begin_in_the_order_of_their_submission(pool_kind, tmp_path):
    with POOLS[pool_kind](make_builder(tmp_path)) as pool:
        for plan in PLANS:
            pool.submit(plan, [0])
    assert [plan for _, plan, what in read_log(tmp_path) if what == "began"] == PLANS


def test_leaving_waits_for_what_was_submitted(pool_kind, tmp_path):
    with POOLS[pool_kind](make_builder(tmp_path, {4: "wait"})) as pool:
        futures = [pool.submit(Plan.from_joins(NUM_LAYERS, (join,)), [0]) for join in (4, 5)]
        threading.Timer(0.3, release, [tmp_path]).start()
    assert [future.done() for future in futures] == [True, True]
    assert all(len(future.result().nll_nats_per_token) == 1 for future in futures)


def test_an_error_of_an_evaluation_comes_back_with_its_message(pool_kind, tmp_path):
    with (
        POOLS[pool_kind](make_builder(tmp_path, {2: "error"})) as pool,
        pytest.raises(Exception, match=r"missing") as caught,
    ):
        pool.submit(Plan.from_joins(NUM_LAYERS, (2,)), [0]).result()
    assert "KeyError" in f"{type(caught.value).__name__} {caught.value}"


def test_refused_input_comes_back_as_it_was_raised_and_the_pool_goes_on(pool_kind, tmp_path):
    refused, fine = (Plan.from_joins(NUM_LAYERS, (join,)) for join in (3, 4))
    with POOLS[pool_kind](make_builder(tmp_path, {3: "refuse"})) as pool:
        with pytest.raises(DataError, match="too little text"):
            pool.submit(refused, [0]).result()
        assert pool.submit(fine, [0]).result().tokens_per_window == 63
    began = [plan for _, plan, what in read_log(tmp_path) if what == "began"]
    assert began == [refused, fine], "what is refused is not tried again"


def test_leaving_by_an_error_ends_what_runs_and_drops_what_waits(pool_kind, tmp_path):
    running, waiting = (Plan.from_joins(NUM_LAYERS, (join,)) for join in (1, 3))

    def enter_and_fail():
        with POOLS[pool_kind](make_builder(tmp_path, {1: "wait"})) as pool:
            futures.extend(pool.submit(plan, [0]) for plan in (running, waiting))
            pids.extend(await_log(tmp_path, running))
            raise KeyboardInterrupt

    futures, pids = [], []
    with pytest.raises(KeyboardInterrupt):
        enter_and_fail()
    assert futures[1].cancelled()
    assert futures[0].done()
    assert [(plan, what) for _, plan, what in read_log(tmp_path)] == [(running, "began")]
    if pids[0] != os.getpid():
        _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
        assert not alive


def test_a_search_in_one_slot_is_that_of_one_evaluator(pool_kind, tmp_path):
    space, options = PlanSpace(NUM_LAYERS), {"budget": 25, "seed": 3}
    with StudyStore(f"sqlite:///{tmp_path / 'one.db'}", study_name="demo") as store:
        evaluator = SyntheticEvaluator(NUM_LAYERS, num_windows=16)
        alone = run_study(evaluator=evaluator, space=space, store=store, **options)
    with (
        StudyStore(f"sqlite:///{tmp_path / 'pool.db'}", study_name="demo") as store,
        POOLS[pool_kind](make_builder(tmp_path, num_windows=16)) as pool,
    ):
        in_pool = run_study(pool=pool, space=space, store=store, **options)
    assert replace(in_pool, elapsed_s=0.0) == replace(alone, elapsed_s=0.0)
    began = [plan for _, plan, what in read_log(tmp_path) if what == "began"]
    assert began == [plan for plan, _ in evaluator.calls]
