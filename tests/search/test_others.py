"""What other coordinators do, beside all that Optuna reads of a study, on a real PostgreSQL and a real MariaDB."""

from __future__ import annotations

from contextlib import contextmanager

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy import event

from lpsearch.plan import Plan
from lpsearch.search import PlanSpace, StudyStore
from lpsearch.search.others import Others
from lpsearch.search.settings import open_study
from lpsearch.search.trials import _create_trial

SPACE = PlanSpace(10)
PLANS = list(SPACE.enumerate_plans())


@pytest.fixture
def stores(server_url):
    """Return two stores of a study that has begun, whose coordinators search it."""
    with StudyStore(server_url, study_name="demo") as first, StudyStore(server_url, study_name="demo") as second:
        first.save_settings({})
        with first.hold_lock(), second.hold_lock():
            yield first, second


def begin(study, owner, plan=None):
    """Begin a trial as a coordinator does that asks its sampler; without a plan it has not chosen yet."""
    noted = {} if plan is None else {"groups": plan.key, "origin": "random"}
    return _create_trial(
        study,
        {"owner": owner, **noted},
        params={} if plan is None else SPACE.build_params(plan),
        distributions={} if plan is None else SPACE.distributions,
    )


def look_by_reading_everything(store, study, *, own, known):
    """Return what :meth:`Others.look` does, and the plans of the running trials."""
    trials = study.get_trials(deepcopy=False)
    live = store.list_live_ids() - {store.claims.owner}
    running, orphans = {}, []
    for trial in trials:
        if trial.state == TrialState.RUNNING and trial.number not in own:
            if trial.user_attrs.get("owner") not in live:
                orphans.append(trial)
            else:
                running[trial.number] = SPACE.build_plan(trial.params) if trial.params else None
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.number not in known]
    return running, finished, orphans


def test_all_that_others_do_is_seen(stores):
    store, other = stores
    study, their_study = (open_study(opened, "nll", "depth") for opened in stores)
    others, known = Others(store, study), set()
    mine = begin(study, store.claims.owner, PLANS[1])

    def check():
        news = others.look(own={mine.number}, known=known)
        expected = look_by_reading_everything(store, study, own={mine.number}, known=known)
        assert (others.running, news.finished, news.orphans) == expected
        known.update(trial.number for trial in news.finished)
        return news

    assert check().finished == []
    theirs = [begin(their_study, other.claims.owner, plan) for plan in PLANS[2:6]]
    undecided = begin(their_study, other.claims.owner)
    check()
    assert others.running == {1: PLANS[2], 2: PLANS[3], 3: PLANS[4], 4: PLANS[5], undecided.number: None}
    their_study.tell(theirs[2], [0.1, 3.0])
    assert [trial.number for trial in check().finished] == [3]
    study.tell(mine, [0.1, 3.0])
    known.add(mine.number)
    their_study.tell(theirs[0], state=TrialState.FAIL)
    assert check().finished == []
    their_study.tell(theirs[1], [0.1, 3.0])
    study.enqueue_trial(SPACE.build_params(PLANS[7]))  # nobody runs it yet
    lost = begin(their_study, "of nobody", PLANS[8])
    news = check()
    assert [trial.number for trial in news.finished] == [2]
    assert [Plan.from_key(trial.user_attrs["groups"]) for trial in news.orphans] == [PLANS[8]]
    study.tell(lost.number, state=TrialState.FAIL)
    their_study.tell(theirs[3], [0.1, 3.0])
    their_study.tell(undecided, state=TrialState.FAIL)
    assert [trial.number for trial in check().finished] == [4]
    assert not check().finished
    assert not others.running


@contextmanager
def note_statements(store):
    """Yield a list that gets the statements which the database is asked."""
    statements = []

    def note(connection, cursor, statement, *ignored):
        statements.append(statement)

    event.listen(store._engine, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        event.remove(store._engine, "before_cursor_execute", note)


def test_what_is_known_is_not_read_again(stores):
    store, other = stores
    study = open_study(store, "nll", "depth")
    for plan in PLANS[:5]:
        study.tell(begin(study, other.claims.owner, plan), [0.1, 3.0])
    others = Others(store, study)
    known = {trial.number for trial in others.look(own=(), known=set()).finished}
    assert known == {0, 1, 2, 3, 4}
    others.look(own=(), known=known)
    with note_statements(store) as statements:
        assert others.look(own=(), known=known).finished == []
    (statement,) = statements
    assert "trial_params" not in statement
    assert others._first == 5


def test_one_coordinator_at_a_time_has_no_others(tmp_path):
    with StudyStore(f"sqlite:///{tmp_path / 'study.db'}", study_name="demo") as store:
        store.save_settings({})
        with store.hold_lock():
            study = optuna.create_study(storage=store.optuna_storage, study_name="demo", directions=["maximize"] * 2)
            study.ask()
            others = Others(store, study)
            with note_statements(store) as statements:
                news = others.look(own=(), known=set())
            assert (news.finished, news.orphans, others.running, statements) == ([], [], {}, [])
