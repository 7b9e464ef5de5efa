"""The search, end to end: one contract for every sampler, interruption, resumption, refusals."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import TrialState

from lpsearch.errors import ConfigError, PlanError, ResumeError, StudyError
from lpsearch.evaluation.losses import WindowLosses, compute_paired_delta
from lpsearch.plan import Plan
from lpsearch.search import SAMPLER_NAMES, PlanSpace, StudyStore, evaluate_stored_plan, read_results, run_study
from lpsearch.search.front import build_front
from lpsearch.search.samplers.pairset import PairsetProposer
from tests.results import build_result
from tests.search.evaluators import BASE_NLL, SyntheticEvaluator, TableEvaluator
from tests.tolerances import FLOAT64_MEAN
from tests.warm import WarmProcess, run_warm

NUM_LAYERS = 10
SPACE = PlanSpace(NUM_LAYERS)
STATELESS = ("evolution", "pairset", "random", "window")


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'study.db'}"


def run(url, evaluator, *, budget=16, space=SPACE, **options):
    with StudyStore(url, study_name="demo") as store:
        return run_study(evaluator=evaluator, space=space, budget=budget, store=store, **options)


def load_trials(url, states=None):
    storage = optuna.storages.RDBStorage(url)
    trials = optuna.load_study(study_name="demo", storage=storage).get_trials(states=states)
    storage.remove_session()
    storage.engine.dispose()
    return trials


def test_every_evaluation_is_announced_as_it_begins(url):
    evaluator = SyntheticEvaluator(NUM_LAYERS, num_windows=8)
    begun, trials = [], []
    result = run(url, evaluator, budget=20, on_evaluation=begun.append, on_trial=trials.append)
    assert [(update.plan, update.num_windows) for update in begun] == [
        (plan, len(window_indices)) for plan, window_indices in evaluator.calls
    ]
    assert begun[0].origin == "baseline"
    assert begun[0].front == []
    origins = {update.result.plan: update.result.origin for update in trials}
    for update in begun:
        assert update.budget == 20
        assert update.origin in (origins[update.plan], "front")
    assert [record.plan for record in begun[-1].front] != []
    whole = [update.plan for update in begun if update.origin == "front"]
    assert set(whole) <= {record.plan for record in result.results}

    again = []
    run(url, evaluator, budget=21, on_evaluation=again.append)
    assert again[0].num_finished == 20
    assert again[0].front == list(result.front), "a resumed search knows its front at once"


def list_plans(evaluator):
    return [plan for plan, _ in evaluator.calls]


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_contract_of_every_sampler(url, sampler):
    evaluator = SyntheticEvaluator(NUM_LAYERS)
    updates = []
    result = run(
        url,
        evaluator,
        budget=20,
        sampler=sampler,
        estimate_latency_ms=lambda plan: 1.0 + plan.depth,
        on_trial=updates.append,
    )

    assert len(result.results) == 20 == result.num_new
    assert len(list_plans(evaluator)) == 20 == len(set(list_plans(evaluator)))
    assert result.num_new_tokens == 20 * 3 * 63
    assert not result.exact
    assert [update.num_finished for update in updates] == list(range(1, 21))
    assert updates[-1].front == list(result.front)

    trials = load_trials(url)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 20
    assert trials[0].user_attrs["origin"] == "baseline"
    assert trials[0].user_attrs["delta_nll"] == 0.0
    for trial, record in zip(trials, result.results, strict=True):
        plan = Plan.from_groups(json.loads(trial.user_attrs["groups"]))
        assert SPACE.is_valid(plan.joins)
        assert trial.user_attrs["groups"] == plan.key
        assert trial.params == SPACE.build_params(plan)
        assert trial.distributions == SPACE.distributions
        losses = evaluator.evaluate_windows(plan, range(3)).nll_nats_per_token
        base = evaluator.evaluate_windows(Plan.baseline(NUM_LAYERS), range(3)).nll_nats_per_token
        paired = compute_paired_delta(losses, base)
        assert trial.user_attrs["num_joins"] == plan.num_joins
        assert trial.user_attrs["delta_nll"] == pytest.approx(paired.delta, abs=FLOAT64_MEAN)
        assert trial.user_attrs["delta_nll_se"] == pytest.approx(paired.standard_error, abs=FLOAT64_MEAN)
        assert trial.user_attrs["latency_ms"] == 1.0 + plan.depth
        assert trial.user_attrs["proxy_tokens"] == 3 * 63
        assert trial.user_attrs["origin"] in {
            "baseline", "scan", "programme", "surrogate", "random", "window", "mutation", "nsga2", "tpe"
        }  # fmt: skip
        assert trial.values == pytest.approx([plan.depth_reduction, math.exp(sum(losses) / 3)])
        assert (record.plan, record.trial) == (plan, trial.number)
        assert record.loss.delta_nll == trial.user_attrs["delta_nll"]
    assert list(result.front) == build_front(result.results)
    with StudyStore(url, study_name="demo") as store:
        assert tuple(read_results(store)) == result.results


def list_whole(evaluator):
    """Return the plans that were evaluated on all windows, and on some of them."""
    seen = {}
    for plan, windows in evaluator.calls:
        seen.setdefault(plan, []).extend(windows)
    assert all(len(set(windows)) == len(windows) for windows in seen.values())
    whole = {plan for plan, windows in seen.items() if len(windows) == evaluator.num_windows}
    return whole, seen.keys() - whole


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_staged_search_looks_at_few_windows_first(tmp_path, sampler):
    evaluators = {staged: SyntheticEvaluator(NUM_LAYERS, num_windows=16) for staged in (True, False)}
    url = f"sqlite:///{tmp_path / 'True.db'}"
    results = {
        staged: run(f"sqlite:///{tmp_path / f'{staged}.db'}", evaluator, budget=20, sampler=sampler, staged=staged)
        for staged, evaluator in evaluators.items()
    }
    assert list_whole(evaluators[False])[1] == set()
    assert results[False].num_new_tokens == 20 * 16 * 63
    whole, partial = list_whole(evaluators[True])
    assert partial
    assert results[True].num_new_tokens < results[False].num_new_tokens
    assert {len(windows) for _, windows in evaluators[True].calls} <= {4, 8}  # rungs
    assert whole >= {record.plan for record in results[True].front}

    trials = load_trials(url)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 20
    reference = SyntheticEvaluator(NUM_LAYERS, num_windows=16)
    base = reference.evaluate_windows(Plan.baseline(NUM_LAYERS), range(16)).nll_nats_per_token
    for trial, record in zip(trials, results[True].results, strict=True):
        seen = range(record.proxy_tokens // 63)
        losses = reference.evaluate_windows(record.plan, seen).nll_nats_per_token
        paired = compute_paired_delta(losses, base[: len(losses)])
        assert record.loss.delta_nll == pytest.approx(paired.delta, abs=FLOAT64_MEAN)
        assert record.loss.delta_nll_se == pytest.approx(paired.standard_error, abs=FLOAT64_MEAN)
        assert record.loss.nll == pytest.approx(sum(base) / 16 + paired.delta)
        assert (record.plan in whole) == (len(seen) == 16)
        assert trial.user_attrs["proxy_tokens"] <= record.proxy_tokens
    with StudyStore(url, study_name="demo") as store:
        assert tuple(read_results(store)) == results[True].results
    again = SyntheticEvaluator(NUM_LAYERS, num_windows=16)
    resumed = run(url, again, budget=20, sampler=sampler)
    assert again.calls == []
    assert resumed.results == results[True].results
    assert resumed.front == results[True].front


def test_what_looks_good_on_few_windows_is_evaluated_whole_for_the_final_front(url):
    """On the first rung every plan loses next to nothing, so a plan that stops there looks better than all others."""
    evaluator = SyntheticEvaluator(NUM_LAYERS, num_windows=16, easy_windows=4)
    result = run(url, evaluator, budget=20)
    whole, partial = list_whole(evaluator)
    assert whole >= {record.plan for record in result.front}
    told = {trial.user_attrs["groups"]: trial.user_attrs["proxy_tokens"] for trial in load_trials(url)}
    settled = [plan for plan in whole if told[plan.key] < 16 * 63]
    assert settled
    for record in result.results:
        if record.plan in partial:
            rivals = [r.loss.delta_nll for r in result.front if r.num_joins >= record.num_joins]
            assert min(rivals) <= record.loss.delta_nll
    # the front is that of the plans with losses on all windows, by those losses
    base = evaluator.evaluate_windows(Plan.baseline(NUM_LAYERS), range(16)).nll_nats_per_token
    known = [
        build_result(
            record.plan,
            compute_paired_delta(evaluator.evaluate_windows(record.plan, range(16)).nll_nats_per_token, base).delta,
            trial=record.trial,
        )
        for record in result.results
        if record.plan in whole
    ]
    expected = [(found.plan, pytest.approx(found.loss.delta_nll)) for found in build_front(known)]
    assert [(record.plan, record.loss.delta_nll) for record in result.front] == expected


@pytest.mark.parametrize("num_layers", [10, 14])
def test_after_a_resume_pairset_learns_from_plans_that_were_completed_after_their_trial(url, num_layers):
    """The end of a run completes plans of the front, whose trials still say what their first look said."""
    space = PlanSpace(num_layers)
    evaluator = SyntheticEvaluator(num_layers, num_windows=16, easy_windows=4)
    run(url, evaluator, space=space, budget=24)
    told = {trial.user_attrs["groups"]: trial.user_attrs["proxy_tokens"] for trial in load_trials(url)}
    with StudyStore(url, study_name="demo") as store:
        results = read_results(store)
    assert any(told[result.plan.key] < result.proxy_tokens for result in results)
    # what a search knows that evaluated each plan once, on as many windows as it has by now
    base = evaluator.evaluate_windows(Plan.baseline(num_layers), range(16)).nll_nats_per_token
    known = []
    for result in results:
        losses = evaluator.evaluate_windows(result.plan, range(result.loss.num_windows)).nll_nats_per_token
        paired = compute_paired_delta(losses, base[: len(losses)])
        known.append(
            build_result(
                result.plan,
                paired.delta,
                trial=result.trial,
                delta_nll_se=paired.standard_error,
                num_windows=len(losses),
                num_tokens=63 * len(losses),
            )
        )
    expected = PairsetProposer(space=space, budget=25, seed=0).propose(known, [])
    assert run(url, evaluator, space=space, budget=25).results[-1].plan == expected.plan


def test_an_enumeration_completes_what_a_smaller_budget_had_stopped(url):
    evaluator = SyntheticEvaluator(6, num_windows=16)
    space = PlanSpace(6)
    assert not run(url, evaluator, space=space, budget=10).exact
    assert list_whole(evaluator)[1]
    assert run(url, evaluator, space=space, budget=50).exact
    assert len(list_whole(evaluator)[0]) == space.count_plans()


def test_interrupted_stages_are_neither_lost_nor_repeated(tmp_path):
    whole = SyntheticEvaluator(NUM_LAYERS, num_windows=16)
    expected = run(f"sqlite:///{tmp_path / 'whole.db'}", whole, budget=12)
    for fail_at in range(0, len(whole.calls), 3):
        url = f"sqlite:///{tmp_path / f'{fail_at}.db'}"
        interrupted = SyntheticEvaluator(NUM_LAYERS, num_windows=16, fail_at=fail_at)
        with pytest.raises(KeyboardInterrupt):
            run(url, interrupted, budget=12)
        rest = SyntheticEvaluator(NUM_LAYERS, num_windows=16)
        result = run(url, rest, budget=12)
        assert interrupted.calls + rest.calls == whole.calls
        assert [record.plan for record in result.results] == [record.plan for record in expected.results]
        fronts = [[(record.plan, record.loss.delta_nll) for record in r.front] for r in (result, expected)]
        assert fronts[0] == fronts[1]


def test_objectives_are_named(url):
    run(url, SyntheticEvaluator(NUM_LAYERS), budget=1)
    storage = optuna.storages.RDBStorage(url)
    study = optuna.load_study(study_name="demo", storage=storage)
    assert study.metric_names == ["depth_reduction", "perplexity"]
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    storage.engine.dispose()


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_small_space_is_enumerated(url, sampler):
    space = PlanSpace(6, frozen_layers=(5,))
    evaluator = SyntheticEvaluator(6)
    result = run(url, evaluator, space=space, budget=50, sampler=sampler)
    assert result.exact
    assert len(result.results) == space.count_plans() == 8
    assert sorted(list_plans(evaluator), key=str) == sorted(space.enumerate_plans(), key=str)
    assert run(url, evaluator, space=space, budget=50, sampler=sampler).num_new == 0
    losses = {plan: evaluator.evaluate_windows(plan, range(3)).nll_nats_per_token for plan in space.enumerate_plans()}
    base = losses[Plan.baseline(6)]
    deltas = {plan: compute_paired_delta(nll, base).delta for plan, nll in losses.items()}
    for num_joins in range(1, space.max_choices + 1):
        best = min(delta for plan, delta in deltas.items() if plan.num_joins >= num_joins)
        found = min(record.loss.delta_nll for record in result.front if record.num_joins >= num_joins)
        assert found == pytest.approx(best, abs=FLOAT64_MEAN)


@pytest.mark.parametrize("sampler", ["pairset", "nsga2"])
def test_interruption_at_every_trial_loses_and_repeats_nothing(tmp_path, sampler):
    budget = 6
    whole = run(f"sqlite:///{tmp_path / 'whole.db'}", SyntheticEvaluator(NUM_LAYERS), budget=budget, sampler=sampler)
    for fail_at in range(budget):
        url = f"sqlite:///{tmp_path / f'{fail_at}.db'}"
        interrupted = SyntheticEvaluator(NUM_LAYERS, fail_at=fail_at)
        with pytest.raises(KeyboardInterrupt):
            run(url, interrupted, budget=budget, sampler=sampler)
        rest = SyntheticEvaluator(NUM_LAYERS)
        result = run(url, rest, budget=budget, sampler=sampler)
        assert result.num_resumed == fail_at
        assert len(result.results) == budget
        plans = list_plans(interrupted) + list_plans(rest)
        assert len(plans) == budget == len(set(plans))
        assert result.results[0].num_joins == 0
        if sampler in STATELESS:
            assert [record.plan for record in result.results] == [record.plan for record in whole.results]
        assert len(load_trials(url, [TrialState.RUNNING, TrialState.WAITING])) == 0


PART_OF_A_RUN = """
import sys
from lpsearch.search import PlanSpace, StudyStore, run_study
from tests.search.evaluators import SyntheticEvaluator

url, sampler, fail_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
evaluator = SyntheticEvaluator(10, num_windows=16, fail_at=fail_at)
with StudyStore(url, study_name="demo") as store:
    run_study(evaluator=evaluator, space=PlanSpace(10), budget=14, store=store, sampler=sampler, seed=3)
"""


@pytest.mark.parametrize("sampler", STATELESS)
def test_second_process_continues_the_same_search(tmp_path, sampler):
    """A process that is interrupted and one that resumes propose, evaluate and learn what one process does."""
    evaluator = SyntheticEvaluator(NUM_LAYERS, num_windows=16)
    at_once = run(f"sqlite:///{tmp_path / 'a.db'}", evaluator, budget=14, sampler=sampler, seed=3)
    url = f"sqlite:///{tmp_path / 'b.db'}"
    num_calls = len(evaluator.calls)
    for fail_at in (num_calls - 6, num_calls):
        done = run_warm(url, sampler, fail_at, code=PART_OF_A_RUN)
        assert ("KeyboardInterrupt" in done.stderr) == (fail_at < num_calls), done.stderr
        assert (3 < len(load_trials(url, [TrialState.COMPLETE])) < 14) == (fail_at < num_calls)
    with StudyStore(url, study_name="demo") as store:
        in_parts = read_results(store)
    key = [(record.plan, record.origin, record.state, record.loss) for record in at_once.results]
    assert [(record.plan, record.origin, record.state, record.loss) for record in in_parts] == key


KILLED_RUN = """
import sys, threading
from lpsearch.search import PlanSpace, StudyStore, run_study
from tests.search.evaluators import SyntheticEvaluator

class Evaluator(SyntheticEvaluator):
    def evaluate_windows(self, plan, window_indices):
        if len(self.calls) == 8:
            sys.stdin.readline()
        if len(self.calls) == 15:
            threading.Event().wait()  # until it is killed
        losses = super().evaluate_windows(plan, window_indices)
        print(plan.key, flush=True)
        return losses

with StudyStore(sys.argv[1], study_name="demo") as store:
    run_study(evaluator=Evaluator(10, delay_s=0.02), space=PlanSpace(10), budget=60, store=store)
"""


def test_kill_minus_nine_mid_run(url):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_RUN, url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with process:
        evaluated = [process.stdout.readline().strip() for _ in range(8)]
        with StudyStore(url, study_name="demo") as store, pytest.raises(StudyError, match=f"process {process.pid}"):
            run_study(evaluator=SyntheticEvaluator(NUM_LAYERS), space=SPACE, budget=60, store=store)
        process.stdin.write("go on\n")
        process.stdin.flush()
        evaluated += [process.stdout.readline().strip() for _ in range(2)]
        process.send_signal(signal.SIGKILL)
        evaluated += [line.strip() for line in process.stdout]
    assert len(evaluated) <= 15
    assert all(evaluated)

    with StudyStore(url, study_name="demo") as store:
        kept = {plan.key for plan in store.losses.list_evaluated(num_windows=3, split="proxy")}
    assert set(evaluated[:-1]) <= kept  # the last may have been evaluated but not yet written

    evaluator = SyntheticEvaluator(NUM_LAYERS)
    result = run(url, evaluator, budget=20)
    assert len(result.results) == 20
    assert kept <= {record.plan.key for record in result.results}
    assert kept.isdisjoint(plan.key for plan in list_plans(evaluator))
    assert len(evaluator.calls) == 20 - len(kept)
    assert len(load_trials(url, [TrialState.RUNNING])) == 0


SLOW_RUN = """
import sys, time
from lpsearch.search import PlanSpace, StudyStore, run_study
from tests.search.evaluators import SyntheticEvaluator

class Evaluator(SyntheticEvaluator):
    def evaluate_windows(self, plan, window_indices):
        if len(self.calls) == 3:
            print("slow", flush=True)
            for _ in range(30_000):
                time.sleep(0.01)
        return super().evaluate_windows(plan, window_indices)

with StudyStore(sys.argv[1], study_name="demo") as store:
    run_study(evaluator=Evaluator(10), space=PlanSpace(10), budget=60, store=store)
"""


def test_ctrl_c_ends_an_evaluation_of_minutes_and_loses_only_it(url):
    process = WarmProcess(url, code=SLOW_RUN)
    try:
        assert process.stdout.readline().strip() == "slow"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.close()
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert load_trials(url, [TrialState.RUNNING]) == []
    rest = SyntheticEvaluator(NUM_LAYERS)
    assert len(run(url, rest, budget=6).results) == 6
    assert len(rest.calls) == 3


def test_trials_are_asked_and_told_while_their_neighbour_is_evaluated(url):
    """Each evaluation waits for the tell before it and the ask after it, which a sequential search would never do."""
    told = []

    class Evaluator(SyntheticEvaluator):
        def evaluate_windows(self, plan, window_indices):
            number = len(self.calls)
            deadline = time.monotonic() + 60
            while len(told) < number or (0 < number < 11 and num_asked[0] < number + 2):
                assert time.monotonic() < deadline, "nothing happened while this plan was evaluated"
                time.sleep(0.002)
            return super().evaluate_windows(plan, window_indices)

    num_asked = [0]
    create_trial = _CachedStorage.create_new_trial

    def count_trials(*args, **kwargs):
        trial_id = create_trial(*args, **kwargs)
        num_asked[0] += 1
        return trial_id

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_CachedStorage, "create_new_trial", count_trials)
        result = run(url, Evaluator(NUM_LAYERS), budget=12, on_trial=told.append)
    assert [update.result for update in told] == list(result.results)
    assert num_asked == [12]


@pytest.mark.parametrize("sampler", ["evolution", "pairset"])
def test_search_does_not_depend_on_how_long_evaluations_take(tmp_path, sampler):
    plans = []
    for index, delay_s in enumerate((0.0, 0.1)):
        evaluator = SyntheticEvaluator(NUM_LAYERS, delay_s=delay_s)
        result = run(f"sqlite:///{tmp_path / f'{index}.db'}", evaluator, budget=20, sampler=sampler)
        plans.append([record.plan for record in result.results])
    assert plans[0] == plans[1]


def test_failed_evaluation_leaves_no_trial_running(url):
    class Evaluator(SyntheticEvaluator):
        def evaluate_windows(self, plan, window_indices):
            if len(self.calls) == 4:
                raise MemoryError("no room")
            return super().evaluate_windows(plan, window_indices)

    with pytest.raises(MemoryError, match="no room"):
        run(url, Evaluator(NUM_LAYERS), budget=16)
    states = [trial.state for trial in load_trials(url)]
    assert states == [TrialState.COMPLETE] * 4 + [TrialState.FAIL] * 2


def test_plan_that_was_evaluated_but_not_told_is_finished_without_evaluation(url):
    run(url, SyntheticEvaluator(NUM_LAYERS), budget=5)
    plan = Plan.from_joins(NUM_LAYERS, (0, 2, 4))
    with StudyStore(url, study_name="demo") as store:
        evaluate_stored_plan(store, SyntheticEvaluator(NUM_LAYERS), plan)
        study = optuna.load_study(study_name="demo", storage=store.optuna_storage)
        study.ask().set_user_attr("groups", plan.key)
    evaluator = SyntheticEvaluator(NUM_LAYERS)
    result = run(url, evaluator, budget=6)
    assert result.results[-1].plan == plan
    assert evaluator.calls == []


def test_half_evaluated_plan_pays_for_its_missing_windows_only(url):
    plan = Plan.from_joins(NUM_LAYERS, (3,))
    run(url, SyntheticEvaluator(NUM_LAYERS), budget=1)
    with StudyStore(url, study_name="demo") as store:
        evaluator = SyntheticEvaluator(NUM_LAYERS)
        store.losses.record(plan, [1], evaluator.evaluate_windows(plan, [1]), split="proxy")
        evaluation = evaluate_stored_plan(store, evaluator, plan)
        assert store.losses.load_plans()[plan.key].state == "complete"
    assert [windows for _, windows in evaluator.calls] == [(1,), (0, 2)]
    assert evaluation.losses == evaluator.evaluate_windows(plan, range(3))
    assert evaluation.num_new_tokens == 2 * 63


def test_waiting_trials_that_a_killed_run_left_are_used_up(url):
    run(url, SyntheticEvaluator(NUM_LAYERS), budget=3)
    with StudyStore(url, study_name="demo") as store:
        study = optuna.load_study(study_name="demo", storage=store.optuna_storage)
        for joins in [(), (5,)]:
            study.enqueue_trial(SPACE.build_params(Plan.from_joins(NUM_LAYERS, joins)))
    evaluator = SyntheticEvaluator(NUM_LAYERS)
    result = run(url, evaluator, budget=4)
    assert result.results[-1].plan.joins == (5,)
    assert len(evaluator.calls) == 1
    assert [t.number for t in load_trials(url, [TrialState.FAIL])] == [3]


def test_enqueued_plans_come_right_after_the_baseline(url):
    enqueued = [Plan.from_joins(NUM_LAYERS, joins) for joins in [(1, 3, 5), (2,), (1, 3, 5)]]
    result = run(url, SyntheticEvaluator(NUM_LAYERS), budget=5, enqueue=enqueued)
    assert [record.plan for record in result.results[:3]] == [Plan.baseline(NUM_LAYERS), enqueued[0], enqueued[1]]
    assert [record.origin for record in result.results[:4]] == ["baseline", "enqueued", "enqueued", "scan"]


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_plans_whose_loss_is_not_finite_are_recorded_once(url, sampler):
    evaluator = SyntheticEvaluator(NUM_LAYERS, broken_join=4)
    result = run(url, evaluator, budget=25, sampler=sampler, enqueue=[Plan.from_joins(NUM_LAYERS, (4,))])
    assert len(list_plans(evaluator)) == 25 == len(set(list_plans(evaluator)))
    broken = [record for record in result.results if 4 in record.plan.joins]
    assert broken
    assert all(math.isnan(record.loss.delta_nll) and math.isinf(record.perplexity) for record in broken)
    assert not any(4 in record.plan.joins for record in result.front)
    trial = load_trials(url)[broken[0].trial]
    assert trial.user_attrs["delta_nll"] is None
    assert trial.values[1] == math.inf


def test_baseline_whose_loss_is_not_finite_ends_the_study(url):
    class Broken(SyntheticEvaluator):
        def evaluate_windows(self, plan, window_indices):
            return WindowLosses((math.inf,) * len(window_indices), None, 63)

    with pytest.raises(StudyError, match="unmodified model"):
        run(url, Broken(NUM_LAYERS), budget=3)


def test_kl_is_searched_and_named(url):
    result = run(url, SyntheticEvaluator(NUM_LAYERS), budget=12, metric="kl")
    for trial, record in zip(load_trials(url), result.results, strict=True):
        assert trial.values == [record.depth_reduction, record.loss.kl_nats_per_token]
        assert trial.user_attrs["kl_nats_per_token"] == record.loss.kl_nats_per_token
        assert trial.user_attrs["delta_nll"] == pytest.approx(record.loss.nll - BASE_NLL - 0.1)
    assert list(result.front) == build_front(result.results, metric="kl")


def test_latency_objective(url):
    result = run(
        url,
        SyntheticEvaluator(NUM_LAYERS),
        budget=12,
        objective="latency",
        estimate_latency_ms=lambda plan: 2.0 * plan.depth,
    )
    assert [trial.values[0] for trial in load_trials(url)] == [2.0 * record.plan.depth for record in result.results]
    with pytest.raises(ConfigError, match="latency estimate"):
        run(url, SyntheticEvaluator(NUM_LAYERS), objective="latency")


def test_timeout_ends_between_trials(url):
    result = run(url, SyntheticEvaluator(NUM_LAYERS), budget=16, timeout_s=1e-9)
    assert result.timed_out
    assert [record.origin for record in result.results] == ["baseline"]
    assert run(url, SyntheticEvaluator(NUM_LAYERS), budget=4, timeout_s=600.0).num_new == 3


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"space": PlanSpace(NUM_LAYERS, 3)}, "--max-group was 2, now 3"),
        ({"space": PlanSpace(NUM_LAYERS + 1)}, "--num-layers was 10, now 11"),
        ({"metric": "kl"}, "--metric was nll, now kl"),
        ({"objective": "latency", "estimate_latency_ms": float}, "--objective was depth, now latency"),
    ],
)
def test_resuming_with_other_settings_is_refused(url, changes, difference):
    run(url, SyntheticEvaluator(NUM_LAYERS), budget=2)
    with pytest.raises(ResumeError, match=difference):
        run(url, SyntheticEvaluator(NUM_LAYERS), budget=3, **changes)


def test_another_sampler_may_continue_and_says_so(url, caplog):
    run(url, SyntheticEvaluator(NUM_LAYERS), budget=2, sampler="random")
    result = run(url, SyntheticEvaluator(NUM_LAYERS), budget=4, sampler="pairset")
    assert "sampler random and goes on with pairset" in caplog.text
    assert len(result.results) == 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": 0}, ConfigError, "at least 1"),
        ({"sampler": "magic"}, ConfigError, "choose one of evolution, nsga2, pairset"),
        ({"metric": "bleu"}, ConfigError, "nll, kl"),
        ({"objective": "width"}, ConfigError, "depth, latency"),
        ({"enqueue": [Plan.baseline(4)]}, PlanError, "4 layers, the model 10"),
        ({"enqueue": [Plan.from_joins(NUM_LAYERS, (0, 1))]}, PlanError, "at most 2 layers"),
    ],
)
def test_impossible_arguments_are_refused(url, options, error, message):
    with pytest.raises(error, match=message):
        run(url, SyntheticEvaluator(NUM_LAYERS), **options)


def test_two_studies_share_a_database(url):
    for name, num_layers in [("one", 6), ("two", 8)]:
        with StudyStore(url, study_name=name) as store:
            run_study(evaluator=SyntheticEvaluator(num_layers), space=PlanSpace(num_layers), budget=4, store=store)
    for name, num_layers in [("one", 6), ("two", 8)]:
        with StudyStore(url, study_name=name) as store:
            assert [record.plan.num_layers for record in read_results(store)] == [num_layers] * 4


def test_study_moved_aside_keeps_its_trials_and_frees_its_name(url):
    run(url, SyntheticEvaluator(NUM_LAYERS), budget=3)
    with StudyStore(url, study_name="demo") as store:
        aside = store.move_aside()
        assert store.load_settings() is None
        assert store.move_aside() is None
    assert run(url, SyntheticEvaluator(NUM_LAYERS), budget=2, metric="kl").num_resumed == 0
    with StudyStore(url, study_name=aside) as store:
        assert len(read_results(store)) == 3
        assert len(store.losses.list_evaluated(num_windows=3, split="proxy")) == 3


def test_pairset_beats_random_on_a_real_table(tmp_path):
    table = TableEvaluator()
    space = PlanSpace(table.num_layers)
    base = table.nll_of_mask[0]
    best = {k: min(nll for mask, nll in table.nll_of_mask.items() if mask.bit_count() >= k) - base for k in range(1, 7)}
    regret = {}
    for sampler in ("pairset", "random"):
        result = run(f"sqlite:///{tmp_path / sampler}.db", table, space=space, budget=60, sampler=sampler)
        found = {k: min(r.loss.delta_nll for r in result.results if r.num_joins >= k) for k in best}
        regret[sampler] = sum(found[k] - best[k] for k in best) / len(best)
    assert 0 <= regret["pairset"] < regret["random"]
