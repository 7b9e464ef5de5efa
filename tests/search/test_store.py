"""The store: what goes in comes out, and a database that is not a sound study is refused and left alone."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import socket
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from lpsearch.errors import ConfigError, ResumeError, StudyError
from lpsearch.evaluation.losses import WindowLosses
from lpsearch.plan import Plan
from lpsearch.search import (
    PlanSpace,
    StudyStore,
    compare_settings,
    evaluate_stored_plan,
    read_results,
    run_study,
)
from tests.search.evaluators import SyntheticEvaluator

PLAN = Plan.from_joins(6, (1, 3))
FORMER_STUDY = Path(__file__).parents[1] / "data" / "studies" / "without_variants.sql"


@pytest.fixture(params=["file", "memory"])
def store(request, tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}" if request.param == "file" else "sqlite://"
    with StudyStore(url, study_name="demo") as opened:
        yield opened


def test_settings_windows_and_documents_round_trip(store):
    assert store.load_settings() is None
    with pytest.raises(StudyError, match="no study 'demo'"):
        store.load_windows("proxy")
    store.save_settings({"model": "m", "windows": 4})
    store.save_settings({"model": "m", "windows": 5})
    assert store.load_settings() == {"model": "m", "windows": 5}

    assert store.load_windows("proxy") is None
    input_ids = np.arange(12, dtype=np.int64).reshape(3, 4) + 2**20
    for _ in range(2):
        store.save_windows("proxy", input_ids=input_ids, spec="wikitext2:validation")
    stored = store.load_windows("proxy")
    assert stored.spec == "wikitext2:validation"
    assert stored.input_ids.dtype == np.int32
    np.testing.assert_array_equal(stored.input_ids, input_ids)
    assert store.load_windows("heldout") is None
    with pytest.raises(StudyError, match="already has other proxy windows"):
        store.save_windows("proxy", input_ids=input_ids + 1, spec="wikitext2:validation")

    assert store.load_front() is None
    assert store.load_latency_profile() is None
    for value in (1, 2):
        store.save_front({"front": [value]})
        store.save_latency_profile({"ms": value})
    assert store.load_front() == {"front": [2]}
    assert store.load_latency_profile() == {"ms": 2}


def test_losses_round_trip_by_plan_split_and_window(store):
    store.save_settings({})
    store.losses.record(PLAN, [2, 0], WindowLosses((3.2, 3.0), None, 63), split="proxy")
    assert store.losses.find_evaluated_windows(PLAN, split="proxy") == {0, 2}
    assert store.losses.find_evaluated_windows(PLAN, split="heldout") == set()
    assert store.losses.load(PLAN, num_windows=3, split="proxy") is None
    store.losses.record(PLAN, [1], WindowLosses((math.inf,), None, 63), split="proxy")
    losses = store.losses.load(PLAN, num_windows=3, split="proxy")
    assert losses.nll_nats_per_token[0] == 3.0
    assert math.isnan(losses.nll_nats_per_token[1])
    assert losses.kl_nats_per_token is None
    assert store.losses.load(PLAN, num_windows=1, split="proxy") == WindowLosses((3.0,), None, 63)

    other = Plan.from_joins(6, (1, 4))
    store.losses.record(other, [0, 1], WindowLosses((3.0, 3.1), (0.1, 0.2), 63), split="heldout")
    assert store.losses.load(other, num_windows=2, split="heldout").kl_nats_per_token == (0.1, 0.2)
    assert store.losses.list_evaluated(num_windows=3, split="proxy") == [PLAN]
    assert store.losses.list_evaluated(num_windows=2, split="heldout") == [other]
    with pytest.raises(StudyError):
        store.losses.record(PLAN, [1], WindowLosses((1.0,), None, 63), split="proxy")


def test_losses_of_two_variants_never_mix(store):
    store.save_settings({})
    for nll, variant in [(3.0, "raw"), (2.5, "refit")]:
        store.losses.record(PLAN, [0], WindowLosses((nll,), None, 63), split="proxy", variant=variant)
    store.losses.record(PLAN, [1], WindowLosses((2.6,), None, 63), split="proxy", variant="refit")
    store.losses.record_state(PLAN, "complete", variant="refit")
    assert store.losses.load(PLAN, num_windows=1, split="proxy") == WindowLosses((3.0,), None, 63)
    assert store.losses.load(PLAN, num_windows=2, split="proxy") is None
    assert store.losses.load(PLAN, num_windows=2, split="proxy", variant="refit").nll_nats_per_token == (2.5, 2.6)
    assert store.losses.list_evaluated(num_windows=2, split="proxy") == []
    assert store.losses.list_evaluated(num_windows=2, split="proxy", variant="refit") == [PLAN]
    states = [store.losses.load_plans(variant=variant)[PLAN.key].state for variant in ("raw", "refit")]
    assert states == [None, "complete"]


def test_a_study_that_knew_no_variants_and_states_resumes(tmp_path):
    """The dump is of 12 trials of another version; this one's first 12 trials are the same."""
    evaluator = {"num_layers": 8, "num_windows": 8, "easy_windows": 4, "broken_join": 3}
    space = PlanSpace(8)
    urls = [f"sqlite:///{tmp_path / name}.db" for name in ("former", "fresh")]
    with closing(sqlite3.connect(tmp_path / "former.db")) as connection:
        connection.executescript(FORMER_STUDY.read_text(encoding="utf-8"))
    with StudyStore(urls[0], study_name="demo") as store:
        former = read_results(store)
    assert Counter(result.state for result in former) == {"complete": 8, "stopped": 3, "broken": 1}
    with StudyStore(urls[1], study_name="demo") as store:
        first = run_study(evaluator=SyntheticEvaluator(**evaluator), space=space, budget=12, seed=1, store=store)
        for result in first.front:
            evaluate_stored_plan(store, SyntheticEvaluator(8, num_windows=5), result.plan, split="heldout")
        fresh = read_results(store)
    plan_files = {result.plan: result.plan_file for result in former if result.plan_file}
    assert plan_files == {result.plan: f"plans/joins-{result.num_joins:02d}.json" for result in first.front}
    # not a number is unequal to itself
    shown = [[repr(dataclasses.replace(result, plan_file=None)) for result in results] for results in (former, fresh)]
    assert shown[0] == shown[1]

    both = []
    for url in urls:
        with StudyStore(url, study_name="demo") as store:
            rest = SyntheticEvaluator(**evaluator)
            run_study(evaluator=rest, space=space, budget=18, seed=1, store=store)
            both.append((rest.calls, [result.plan for result in read_results(store)]))
    assert both[0] == both[1]
    assert len(both[0][1]) == 18


def test_damaged_windows_are_noticed(tmp_path):
    path = tmp_path / "study.db"
    with StudyStore(f"sqlite:///{path}", study_name="demo") as store:
        store.save_settings({})
        store.save_windows("proxy", input_ids=np.zeros((2, 3), dtype=np.int32), spec="self")
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE lpsearch_windows SET input_ids = ?", (b"\1" * 24,))
        with pytest.raises(StudyError, match="windows are damaged"):
            store.load_windows("proxy")


def make_text(path):
    path.write_text("not a database " * 1000)


def make_torn(path):
    make_study(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def make_scribbled(path):
    make_study(path)
    content = bytearray(path.read_bytes())
    content[8192:40960] = b"\xa5" * (40960 - 8192)
    path.write_bytes(content)


def make_foreign(path):
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE moz_places (id INTEGER PRIMARY KEY)")


def make_study(path):
    with StudyStore(f"sqlite:///{path}", study_name="demo") as store:
        run_study(evaluator=SyntheticEvaluator(6), space=PlanSpace(6), budget=2, store=store)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (make_text, "not a database"),
        (make_torn, "malformed|damaged"),
        (make_scribbled, "malformed|damaged"),
        (make_foreign, "another program .tables moz_places"),
    ],
)
def test_what_is_no_sound_study_is_named_and_left_untouched(tmp_path, damage, message):
    path = tmp_path / "study.db"
    damage(path)
    before, files = hashlib.sha256(path.read_bytes()).digest(), sorted(tmp_path.iterdir())
    with pytest.raises(StudyError, match=message) as caught:
        StudyStore(f"sqlite:///{path}", study_name="demo")
    assert str(path) in str(caught.value)
    assert "left as it is" in str(caught.value)
    assert caught.value.exit_code == 1
    assert hashlib.sha256(path.read_bytes()).digest() == before
    assert sorted(tmp_path.iterdir()) == files


def test_empty_file_of_a_run_killed_at_birth_becomes_a_study(tmp_path):
    path = tmp_path / "study.db"
    path.touch()
    make_study(path)


def test_missing_directory_and_directory_in_place_of_the_file(tmp_path):
    with pytest.raises(StudyError, match="directory does not exist"):
        StudyStore(f"sqlite:///{tmp_path / 'absent' / 'study.db'}", study_name="demo")
    with pytest.raises(StudyError, match="a directory stands"):
        StudyStore(f"sqlite:///{tmp_path}", study_name="demo")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only directory")
def test_read_only_directory(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StudyError, match="not writable"):
        StudyStore(f"sqlite:///{tmp_path / 'study.db'}", study_name="demo")
    tmp_path.chmod(0o700)


FULL_DISK_RUN = """
import resource, signal, sys
from lpsearch.errors import StudyError
from lpsearch.search import PlanSpace, StudyStore, run_study
from tests.search.evaluators import SyntheticEvaluator

with StudyStore(sys.argv[1], study_name="demo") as store:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
    try:
        run_study(evaluator=SyntheticEvaluator(20), space=PlanSpace(20), budget=40, store=store)
    except StudyError as error:
        sys.exit(f"StudyError: {error}")
"""


def test_no_space_left_is_said_and_loses_nothing(tmp_path):
    path = tmp_path / "study.db"
    url = f"sqlite:///{path}"
    with StudyStore(url, study_name="demo") as store:
        num_before = len(
            run_study(evaluator=SyntheticEvaluator(20), space=PlanSpace(20), budget=3, store=store).results
        )
    limit = path.stat().st_size + 300_000
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK_RUN, url, str(limit)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "StudyError" in done.stderr
    assert str(path) in done.stderr
    with StudyStore(url, study_name="demo") as store:
        result = run_study(evaluator=SyntheticEvaluator(20), space=PlanSpace(20), budget=40, store=store)
    assert result.num_resumed >= num_before
    assert len(result.results) == 40


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("study.db", "not a database URL"),
        ("nosuchdb://host/x", "not a database URL"),
        ("postgresql+psycopg://me:secret@localhost:1/x", r"lpsearch\[postgres\]|me:\*\*\*@localhost"),
    ],
)
def test_bad_urls(url, message):
    with pytest.raises((ConfigError, StudyError), match=message) as caught:
        StudyStore(url, study_name="demo")
    assert "secret" not in str(caught.value)


def test_one_coordinator_at_a_time(store):
    with store.hold_lock(), store.hold_lock():
        store.save_settings({})
        store.losses.record(PLAN, [0], WindowLosses((3.0,), None, 63), split="proxy")
    with store.hold_lock():
        pass


def test_lock_is_refused_to_a_second_holder_in_a_file(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    with StudyStore(url, study_name="demo") as first, StudyStore(url, study_name="demo") as second:
        with (
            first.hold_lock(),
            pytest.raises(StudyError, match=f"run by process {os.getpid()} on {socket.gethostname()}"),
            second.hold_lock(),
        ):
            pass
        with second.hold_lock():
            pass


def test_every_changed_setting_is_listed_with_both_values():
    recorded = {"model": "a", "windows": 8, "data": "self", "seed": 0, "sampler": "pairset"}
    compare_settings(recorded, {**recorded, "seed": 1})
    compare_settings(recorded, {"model": "a"})
    with pytest.raises(ResumeError) as caught:
        compare_settings(recorded, {"model": {"id": "b"}, "windows": 16, "data": "self"})
    message = str(caught.value)
    assert '--model was a, now {"id": "b"}' in message
    assert "--windows was 8, now 16" in message
    assert "--data" not in message
    assert "--fresh" in message
    assert caught.value.exit_code == 2
