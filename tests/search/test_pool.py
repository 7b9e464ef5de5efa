"""Pools: the thread that evaluates, and a search in several slots."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import count

import optuna
import pytest
from optuna.trial import TrialState

from lpsearch.errors import ConfigError, StudyError
from lpsearch.plan import Plan
from lpsearch.search import PlanSpace, StudyStore, ThreadPool, run_study
from tests.search.evaluators import SyntheticEvaluator

SPACE = PlanSpace(10)
BASE = Plan.baseline(10)
PATIENCE_S = 60.0


class CallingEvaluator:
    """Calls a function with the plan instead of evaluating it; its losses are what the function returns."""

    num_windows = 1

    def __init__(self, function):
        self._function = function

    def evaluate_windows(self, plan, window_indices):
        return self._function(plan)


def test_a_thread_pool_evaluates_in_one_other_thread_and_in_order():
    plans = [Plan.from_joins(10, (join,)) for join in range(5)]
    with ThreadPool(CallingEvaluator(lambda plan: (plan, threading.get_ident()))) as pool:
        futures = [pool.submit(plan, [0]) for plan in plans]
    results = [future.result() for future in futures]
    assert [plan for plan, _ in results] == plans
    assert len({ident for _, ident in results}) == 1
    assert threading.get_ident() not in {ident for _, ident in results}


def test_errors_come_back_with_the_result():
    def fail(plan):
        raise KeyError("missing")

    with ThreadPool(CallingEvaluator(fail)) as pool, pytest.raises(KeyError, match="missing"):
        pool.submit(BASE, [0]).result()


def test_leaving_by_an_error_interrupts_what_runs_and_drops_what_waits():
    began, unwound, second = threading.Event(), threading.Event(), threading.Event()

    def work_for_minutes(plan):
        if plan != BASE:
            second.set()
        began.set()
        try:
            for _ in range(60_000):
                time.sleep(0.005)
        finally:
            unwound.set()

    def enter_and_fail():
        with ThreadPool(CallingEvaluator(work_for_minutes)) as pool:
            pool.submit(BASE, [0])
            pool.submit(Plan.from_joins(10, (1,)), [0])
            assert began.wait(PATIENCE_S)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        enter_and_fail()
    assert unwound.is_set()
    assert not second.is_set()


def test_interrupt_between_two_evaluations_hits_neither():
    with ThreadPool(CallingEvaluator(lambda plan: sum(range(10_000)))) as pool:
        assert pool.submit(BASE, [0]).result() == 49_995_000
        pool.interrupt()
        assert pool.submit(BASE, [0]).result() == 49_995_000


class ManySlots(AbstractContextManager):
    """A pool of several threads, each with the same evaluator.

    Attributes:
        num_submitted: evaluations that were submitted, and did not end, by each submission.
    """

    def __init__(self, evaluator, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_windows = evaluator.num_windows
        self.num_submitted: list[int] = []
        self._evaluator = evaluator
        self._executor = ThreadPoolExecutor(num_slots)
        self._futures: list[Future] = []

    def submit(self, plan, window_indices):
        self._futures.append(self._executor.submit(self._evaluator.evaluate_windows, plan, window_indices))
        self.num_submitted.append(sum(not future.done() for future in self._futures))
        return self._futures[-1]

    def close(self) -> None:
        self._executor.shutdown()

    def __exit__(self, *error: object) -> None:  # noqa: D105
        self.close()


def search(tmp_path, evaluator, *, num_slots=3, name="study", **options):
    """Run a search in a pool of slots; return the pool, its result and the states of the trials."""
    with StudyStore(f"sqlite:///{tmp_path / name}.db", study_name="demo") as store:
        with ManySlots(evaluator, num_slots) as pool:
            result = run_study(pool=pool, space=SPACE, store=store, **options)
        trials = optuna.load_study(study_name="demo", storage=store.optuna_storage).get_trials()
    return pool, result, [trial.state for trial in trials]


@pytest.mark.parametrize("sampler", ["pairset", "evolution", "tpe"])
def test_a_search_in_slots_finishes_every_plan_once(tmp_path, sampler):
    evaluator = SyntheticEvaluator(10, num_windows=16, delay_s=0.002)
    _, result, states = search(tmp_path, evaluator, budget=25, sampler=sampler)
    assert states == [TrialState.COMPLETE] * 25
    assert len({found.plan for found in result.results}) == 25
    windows = [(plan, window) for plan, chosen in evaluator.calls for window in chosen]
    assert len(windows) == len(set(windows)), "no plan is evaluated on a window twice"
    assert all(found.state == "complete" for found in result.front)


@pytest.mark.parametrize("slow_one", [1, 2, 3])
def test_no_slot_waits_for_another(tmp_path, slow_one):
    """One evaluation ends only after six that began later have ended: behind a barrier that would never be."""
    ended = threading.Semaphore(0)
    others_ended, overtaken = [], []

    class Evaluator(SyntheticEvaluator):
        def evaluate_windows(self, plan, window_indices):
            losses = super().evaluate_windows(plan, window_indices)
            if len(plan.joins) == 1 and plan.joins == (slow_one,):
                for _ in range(6):
                    assert ended.acquire(timeout=PATIENCE_S), "the other slots were not refilled"
                overtaken.append(len(others_ended))
            elif slow_one_has_begun():
                others_ended.append(plan)
                ended.release()
            return losses

    evaluator = Evaluator(10)

    def slow_one_has_begun():
        return any(plan.joins == (slow_one,) for plan, _ in list(evaluator.calls))

    pool, result, states = search(tmp_path, evaluator, budget=16)
    assert overtaken
    assert overtaken[0] >= 6
    assert max(pool.num_submitted) <= 3
    assert states == [TrialState.COMPLETE] * 16
    assert result.num_new == 16


@pytest.mark.parametrize(("num_slots", "num_ahead"), [(7, 0), (16, 2)])
def test_plans_wait_in_a_pool_of_many_slots(tmp_path, num_slots, num_ahead):
    """No evaluation ends before as many are submitted as may be."""
    can_end, began = threading.Semaphore(0), []

    class Evaluator(SyntheticEvaluator):
        def evaluate_windows(self, plan, window_indices):
            assert can_end.acquire(timeout=PATIENCE_S), "too few were submitted"
            return super().evaluate_windows(plan, window_indices)

    def note(update):
        began.append(update.plan)
        if len(began) == num_slots + num_ahead:
            can_end.release(1000)

    options = {"num_slots": num_slots, "budget": 40, "staged": False, "on_evaluation": note}
    pool, result, states = search(tmp_path, Evaluator(10), **options)
    assert max(pool.num_submitted) == num_slots + num_ahead
    assert states == [TrialState.COMPLETE] * 40
    assert len({found.plan for found in result.results}) == 40


def test_what_has_ended_is_told_before_the_next_plan_is_chosen(tmp_path):
    """Sixteen evaluations end while the seventeenth plan is asked for; the eighteenth is chosen by all of them."""
    together, order, known = threading.Barrier(16, timeout=PATIENCE_S), count(), []

    class Evaluator(SyntheticEvaluator):
        def evaluate_windows(self, plan, window_indices):
            if next(order) < 16:
                together.wait()
            return super().evaluate_windows(plan, window_indices)

    def note(update):
        known.append(update.num_finished)
        if len(known) == 16:
            time.sleep(1.0)

    search(tmp_path, Evaluator(10), num_slots=16, budget=30, staged=False, on_evaluation=note)
    assert known[:17] == [0] * 17
    assert known[17] >= 16


def test_an_error_in_one_slot_ends_the_search_and_loses_only_what_ran(tmp_path):
    three_run = threading.Barrier(3, timeout=PATIENCE_S)

    class Evaluator(SyntheticEvaluator):
        def evaluate_windows(self, plan, window_indices):
            if len(self.calls) >= 4:
                three_run.wait()  # every slot is at work, then each evaluation fails
                raise MemoryError("no room")
            return super().evaluate_windows(plan, window_indices)

    evaluator = Evaluator(10)
    with pytest.raises(MemoryError, match="no room"):
        search(tmp_path, evaluator, budget=16)
    rest = SyntheticEvaluator(10)
    _, result, states = search(tmp_path, rest, budget=16)
    assert result.num_resumed == len(evaluator.calls) == 4
    assert TrialState.RUNNING not in states
    plans = [plan for plan, _ in evaluator.calls + rest.calls]
    assert len(plans) == len(set(plans)) == 16


def test_one_slot_of_a_pool_is_the_search_of_one_evaluator(tmp_path):
    one, many = SyntheticEvaluator(10, num_windows=16), SyntheticEvaluator(10, num_windows=16)
    _, in_pool, _ = search(tmp_path, many, num_slots=1, name="pool", budget=25)
    with StudyStore(f"sqlite:///{tmp_path / 'one.db'}", study_name="demo") as store:
        alone = run_study(evaluator=one, space=SPACE, store=store, budget=25)
    assert many.calls == one.calls
    assert in_pool.results == alone.results


@pytest.mark.parametrize("given", [{}, {"evaluator": SyntheticEvaluator(10), "pool": object()}])
def test_an_evaluator_or_a_pool_is_needed(tmp_path, given):
    with (
        StudyStore(f"sqlite:///{tmp_path / 'study.db'}", study_name="demo") as store,
        pytest.raises(ConfigError, match="one of the two"),
    ):
        run_study(space=SPACE, store=store, budget=5, **given)


def test_no_slot_waits_for_the_unmodified_model(tmp_path):
    """The unmodified model's evaluation ends only after another plan's: behind a barrier that would never be."""
    other_ended = threading.Event()

    class Evaluator(SyntheticEvaluator):
        def evaluate_windows(self, plan, window_indices):
            losses = super().evaluate_windows(plan, window_indices)
            if plan == BASE:
                assert other_ended.wait(PATIENCE_S)
            else:
                other_ended.set()
            return losses

    told = []
    _, result, states = search(tmp_path, Evaluator(10), budget=12, on_trial=lambda update: told.append(update.result))
    assert told[0].is_baseline, "what ended before is told after it, since it is relative to it"
    assert states == [TrialState.COMPLETE] * 12
    assert {found.plan for found in told} == {found.plan for found in result.results}
    reference = SyntheticEvaluator(10)
    for found in result.results:
        assert found.loss.delta_nll == pytest.approx(
            sum(reference.evaluate_windows(found.plan, range(3)).nll_nats_per_token) / 3
            - sum(reference.evaluate_windows(BASE, range(3)).nll_nats_per_token) / 3
        )


def test_an_unmodified_model_whose_loss_is_not_finite_ends_a_search_in_slots(tmp_path):
    class Evaluator(SyntheticEvaluator):
        def compute_delta(self, plan):
            return float("nan") if plan == BASE else super().compute_delta(plan)

    with pytest.raises(StudyError, match="the unmodified model's loss is not finite"):
        search(tmp_path, Evaluator(10), budget=12)
