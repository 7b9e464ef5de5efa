"""Ctrl-C at any moment of a search: no transaction is left half done, and no trial running."""

from __future__ import annotations

import signal
import threading

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy import event
from sqlalchemy.engine import Engine

from lpsearch.search import PlanSpace, StudyStore, run_study
from lpsearch.search.interrupts import hold_back_interrupts, let_interrupts_through
from tests.search.evaluators import SyntheticEvaluator

NUM_LAYERS = 10
BUDGET = 8


@pytest.fixture
def handled():
    """Return the signals that reach a handler of the program's own, which raises nothing."""
    numbers = []
    former = signal.signal(signal.SIGTERM, lambda number, frame: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGTERM, former)


def press():
    signal.raise_signal(signal.SIGINT)


@hold_back_interrupts()
def run_block(*steps):
    """Take the steps of a block in which Ctrl-C is held back; where one is a list, the block waits meanwhile."""
    for step in steps:
        if isinstance(step, list):
            with let_interrupts_through():
                for inner in step:
                    inner()
        else:
            step()


def test_ctrl_c_waits_for_the_end_of_a_block():
    steps = []
    with pytest.raises(KeyboardInterrupt):
        run_block(press, lambda: steps.append("went on"))
    assert steps == ["went on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_waits_for_nothing():
    steps = []
    with pytest.raises(KeyboardInterrupt):
        run_block(press, press, lambda: steps.append("went on"))
    assert steps == []


@pytest.mark.parametrize("waiting", [[press], []], ids=["while it waits", "before"])
def test_a_block_that_waits_is_ended_at_once(waiting):
    steps = []
    before = () if waiting else (press,)
    with pytest.raises(KeyboardInterrupt):
        run_block(*before, [*waiting, lambda: steps.append("went on")])
    assert steps == []


def test_ctrl_c_is_not_lost_where_the_block_fails():
    with pytest.raises(KeyboardInterrupt) as caught:
        run_block(press, lambda: 1 / 0)
    assert isinstance(caught.value.__context__, ZeroDivisionError)


def test_a_handler_of_the_program_is_called_later(handled):
    with hold_back_interrupts():
        with hold_back_interrupts():
            signal.raise_signal(signal.SIGTERM)
        assert handled == [], "the outer block holds it back"
        with let_interrupts_through():
            assert handled == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)
        assert handled == [signal.SIGTERM]
    assert handled == [signal.SIGTERM, signal.SIGTERM]


def test_another_thread_changes_no_handler():
    seen = []

    def work():
        with hold_back_interrupts(), let_interrupts_through():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


class _Statements:
    """Presses Ctrl-C at one of the statements that the main thread sends to a database."""

    def __init__(self, press_at: int | None = None) -> None:
        self.count = 0
        self._press_at = press_at

    def __enter__(self):
        event.listen(Engine, "after_cursor_execute", self._step)
        return self

    def __exit__(self, *details):
        event.remove(Engine, "after_cursor_execute", self._step)

    def _step(self, *args):
        if threading.current_thread() is threading.main_thread():
            self.count += 1
            if self.count == self._press_at:
                signal.raise_signal(signal.SIGINT)


def _search(url):
    evaluator = SyntheticEvaluator(NUM_LAYERS)
    with StudyStore(url, study_name="demo") as store:
        return run_study(evaluator=evaluator, space=PlanSpace(NUM_LAYERS), budget=BUDGET, store=store)


def _list_running(url):
    storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 1}})
    try:
        studies = [study for study in storage.get_all_studies() if study.study_name == "demo"]
        return [
            trial for study in studies for trial in storage.get_all_trials(study._study_id, states=[TrialState.RUNNING])
        ]
    finally:
        storage.remove_session()
        storage.engine.dispose()


def test_ctrl_c_at_any_statement_leaves_no_trial_running_and_no_lock(tmp_path):
    with _Statements() as statements:
        expected = _search(f"sqlite:///{tmp_path / 'unbroken.db'}")
    num_interrupted = 0
    for press_at in range(1, statements.count + 1, max(1, statements.count // 20)):
        url = f"sqlite:///{tmp_path / f'{press_at}.db'}"
        with _Statements(press_at):
            try:
                _search(url)
            except KeyboardInterrupt:
                num_interrupted += 1
                assert _list_running(url) == []
        result = _search(url)
        assert [found.plan for found in result.front] == [found.plan for found in expected.front]
        assert len(result.results) == BUDGET
    assert num_interrupted > 15
