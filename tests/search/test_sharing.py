"""Several coordinators of one study, on a real PostgreSQL and a real MariaDB."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import delete, select, update

from lpsearch.errors import StudyError
from lpsearch.evaluation.losses import WindowLosses
from lpsearch.plan import Plan
from lpsearch.search import PlanSpace, StudyStore, evaluate_stored_plan, read_results, run_study
from lpsearch.search.claims import ClaimLostError
from lpsearch.search.schema import claims_table, coordinators_table
from tests.search.evaluators import SyntheticEvaluator

NUM_LAYERS = 10
PLAN = Plan.from_joins(NUM_LAYERS, (1, 4))
LOSSES = WindowLosses((3.0,), None, 63)


class Recorder(SyntheticEvaluator):
    """Notes what several coordinators evaluate, and waits with its first plan until each of them has one."""

    def __init__(self, calls: list, barrier: threading.Barrier, **options) -> None:
        super().__init__(NUM_LAYERS, num_windows=16, **options)
        self.all_calls = calls
        self.barrier = barrier
        self.has_begun = False

    def evaluate_windows(self, plan, window_indices):
        if plan.joins and not self.has_begun:
            self.has_begun = True
            self.barrier.wait(timeout=60)
        self.all_calls.append((plan, tuple(window_indices)))
        return super().evaluate_windows(plan, window_indices)


@pytest.mark.parametrize("sampler", ["pairset", "random"])
def test_coordinators_share_a_study_and_evaluate_nothing_twice(server_url, sampler):
    num_coordinators, budget = 3, 14
    calls, barrier = [], threading.Barrier(num_coordinators)

    def run(index):
        with StudyStore(server_url, study_name="demo") as store:
            evaluator = Recorder(calls, barrier)
            return run_study(
                evaluator=evaluator, space=PlanSpace(NUM_LAYERS), budget=budget, store=store, sampler=sampler, seed=3
            ), len(evaluator.calls)

    StudyStore(server_url, study_name="demo").close()  # makes the tables
    with ThreadPoolExecutor(num_coordinators) as threads:
        ends = list(threads.map(run, range(num_coordinators)))
    seen = Counter((plan, window_idx) for plan, windows in calls for window_idx in windows)
    assert set(seen.values()) == {1}, "a plan was evaluated on a window twice"
    assert all(num_calls for _, num_calls in ends), "each of them took part"
    with StudyStore(server_url, study_name="demo") as store:
        known = read_results(store)
        assert len(known) == budget == len({result.plan for result in known})
        assert sum(result.num_new for result, _ in ends) == budget
        for result, _ in ends:
            assert [(found.plan, found.loss) for found in result.results] == [(one.plan, one.loss) for one in known]
            assert result.front == ends[0][0].front
        assert store.lock.find_holder() is None
        with store.begin_transaction() as connection:
            assert connection.execute(select(claims_table)).all() == []
            assert connection.execute(select(coordinators_table)).all() == []


def test_a_small_space_is_enumerated_by_several(server_url):
    space = PlanSpace(6)
    calls = []

    def run(_):
        with StudyStore(server_url, study_name="demo") as store:
            evaluator = SyntheticEvaluator(6)
            result = run_study(evaluator=evaluator, space=space, budget=50, store=store)
            calls.extend(evaluator.calls)
            return result

    StudyStore(server_url, study_name="demo").close()
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(run, range(2)))
    assert all(result.exact for result in results)
    assert sorted(str(plan) for plan, _ in calls) == sorted(map(str, space.enumerate_plans()))


@pytest.fixture
def stores(server_url):
    """Return two stores of a study that has begun."""
    with StudyStore(server_url, study_name="demo") as first, StudyStore(server_url, study_name="demo") as second:
        first.save_settings({})
        yield first, second


def test_a_claim_has_one_owner(stores):
    first, second = stores
    with first.hold_lock(), second.hold_lock():
        assert first.claims.take("x")
        assert first.claims.take("x")
        assert not second.claims.take("x")
        assert second.claims.take("y")
        first.claims.give_back("y")  # not its own
        assert not first.claims.take("y")
        first.claims.give_back("x")
        assert second.claims.take("x")
    with first.hold_lock():
        assert first.claims.take("x"), "who leaves gives back what it has claimed"


def age_lease(store, member_id, by_s):
    """Have a lease look as if it had not been renewed for some time."""
    with store.begin_transaction() as connection:
        table = coordinators_table
        aged = update(table).where(table.c.id == member_id).values(renewed_at=table.c.renewed_at - by_s)
        assert connection.execute(aged).rowcount == 1


def test_a_claim_is_taken_over_once_the_lease_of_its_owner_has_ended(stores):
    first, second = stores
    with first.hold_lock(), second.hold_lock():
        subject = first.losses.name_subject(PLAN, split="proxy")
        assert first.claims.take(subject)
        age_lease(first, first.claims.owner, 50.0)
        assert not second.claims.take(subject)
        age_lease(first, first.claims.owner, 20.0)
        assert second.claims.take(subject)
        assert second.lock.find_holder().count(" on ") == 1
        # the first comes back, and changes nothing
        with pytest.raises(ClaimLostError, match="took over the proxy losses"):
            first.losses.record(PLAN, [0], LOSSES, split="proxy")
        with pytest.raises(ClaimLostError), first.claims.finish(subject):
            pytest.fail("it is not its own")
        second.losses.record(PLAN, [0], LOSSES, split="proxy")
        first.lock.announce(9)  # renews its lease
        assert [member.budget for member in second.lock.list_searching()] == [9]
    assert first.losses.find_evaluated_windows(PLAN, split="proxy") == {0}


def test_a_process_that_is_gone_from_this_machine_has_no_lease(stores):
    first, second = stores
    with first.hold_lock(), second.hold_lock():
        assert first.claims.take("x")
        with first.begin_transaction() as connection:
            process = connection.execute(select(coordinators_table.c.process)).scalars().first()
        boot, namespace, *_ = process.split(" ")
        for text, is_lost in (
            (f"another {namespace} 1 1", False),
            (f"{boot} another 1 1", False),
            (f"{boot} {namespace} 1 1", True),  # process 1 lives, but began at another time
        ):
            with first.begin_transaction() as connection:
                own = coordinators_table.c.id == first.claims.owner
                connection.execute(update(coordinators_table).where(own).values(process=text))
            assert second.claims.take("x") == is_lost


def test_what_another_coordinator_evaluates_is_waited_for(stores):
    first, second = stores
    began, may_end = threading.Event(), threading.Event()

    class Slow(SyntheticEvaluator):
        def evaluate_windows(self, plan, window_indices):
            began.set()
            assert may_end.wait(120)
            return super().evaluate_windows(plan, window_indices)

    idle = SyntheticEvaluator(NUM_LAYERS)
    with first.hold_lock(), second.hold_lock(), ThreadPoolExecutor(2) as threads:
        one = threads.submit(evaluate_stored_plan, first, Slow(NUM_LAYERS), PLAN, split="heldout")
        assert began.wait(120)
        two = threads.submit(evaluate_stored_plan, second, idle, PLAN, split="heldout")
        assert not two.done()
        may_end.set()
        assert two.result(120).losses == one.result(120).losses
    assert idle.calls == []


def test_a_study_that_others_search_is_not_moved_aside(stores):
    first, second = stores
    with first.hold_lock(), second.hold_lock():
        first.lock.announce(5)
        with pytest.raises(StudyError, match="is being run by process"):
            second.move_aside()
        assert second.load_settings() is not None
    with second.hold_lock():
        assert second.move_aside() is not None
        assert second.load_settings() is None


def test_coordinators_begin_a_study_one_after_another(stores):
    first, second = stores
    with first.hold_lock(), second.hold_lock(), ThreadPoolExecutor(1) as threads:
        first.lock.wait_for_turn()
        turn = threads.submit(second.lock.wait_for_turn)
        assert not turn.done()
        first.lock.end_turn()
        turn.result(120)


def test_the_plan_of_a_lost_coordinator_is_evaluated_elsewhere(stores):
    """Its trial is failed, and its plan comes first; what it knew of the plan is kept."""
    first, second = stores
    space = PlanSpace(NUM_LAYERS)
    reached, may_go_on = threading.Event(), threading.Event()

    class Stuck(SyntheticEvaluator):
        def evaluate_windows(self, plan, window_indices):
            if len(self.calls) == 6:
                reached.set()
                assert may_go_on.wait(240)
            return super().evaluate_windows(plan, window_indices)

    stuck, other = Stuck(NUM_LAYERS, num_windows=16), SyntheticEvaluator(NUM_LAYERS, num_windows=16)
    with ThreadPoolExecutor(1) as threads:
        lost = threads.submit(run_study, evaluator=stuck, space=space, budget=16, store=first)
        assert reached.wait(120)
        age_lease(first, first.claims.owner, 1e6)
        result = run_study(evaluator=other, space=space, budget=16, store=second)
        may_go_on.set()
        assert lost.result(120).front == result.front
    assert len(result.results) == 16
    seen = Counter((plan, window_idx) for plan, windows in stuck.calls + other.calls for window_idx in windows)
    twice = {plan for (plan, _), times in seen.items() if times > 1}
    assert len(twice) == 1, "only what the lost one was at work on is evaluated again"
    with second.begin_transaction() as connection:
        assert connection.execute(delete(claims_table)).rowcount == 0
