"""A database server that restarts in the middle, a full disk, a truncated file, and clocks that jump."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError, PendingRollbackError

from lpsearch.errors import StudyError
from lpsearch.search import PlanSpace, StudyStore, run_study
from lpsearch.search import study as searching
from lpsearch.search.storage_url import is_connection_lost, translate_storage_errors
from tests.search.evaluators import SyntheticEvaluator
from tests.servers import Server

SPACE = PlanSpace(10)
BUDGET = 8
ROOT = Path(__file__).parents[2]


def search(url: str, evaluator: SyntheticEvaluator, *, lease_s: float = 60.0) -> list[tuple]:
    """Search, and return what is known of every finished plan."""
    with StudyStore(url, study_name="demo", lease_s=lease_s) as store:
        result = run_study(evaluator=evaluator, space=SPACE, budget=BUDGET, store=store, seed=3)
    return [(found.plan, found.origin, found.state, found.loss) for found in result.results]


class Interrupting(SyntheticEvaluator):
    """Calls a function before one of its evaluations."""

    def __init__(self, function, *, at: int) -> None:
        super().__init__(10, num_windows=16)
        self.function = function
        self.at = at

    def evaluate_windows(self, plan, window_indices):
        if len(self.calls) == self.at:
            self.function()
        return super().evaluate_windows(plan, window_indices)


@pytest.fixture
def unbroken(tmp_path: Path) -> tuple[list[tuple], list]:
    """Return what an unbroken search finds, and what it evaluates."""
    evaluator = SyntheticEvaluator(10, num_windows=16)
    return search(f"sqlite:///{tmp_path / 'unbroken.db'}", evaluator), evaluator.calls


@pytest.mark.parametrize("kind", ["postgres", "mariadb"])
def test_a_search_outlives_a_restart_of_its_server(
    request: pytest.FixtureRequest, kind: str, unbroken: tuple[list[tuple], list], caplog: pytest.LogCaptureFixture
) -> None:
    """The evaluation that was under way when the server ended counts: nothing is evaluated twice."""
    server: Server = request.getfixturevalue(kind)
    starters = []

    def restart() -> None:
        server.stop()
        starters.append(threading.Thread(target=start_when_missed))
        starters[0].start()

    def start_when_missed() -> None:
        for _ in range(600):
            if "waiting up to" in caplog.text:
                break
            time.sleep(0.1)
        server.start()

    evaluator = Interrupting(restart, at=9)
    try:
        found = search(server.create_database(), evaluator)
    finally:
        for starter in starters:
            starter.join()
    assert len(starters) == 1
    assert "waiting up to" in caplog.text
    assert (found, evaluator.calls) == unbroken


@pytest.mark.parametrize("kind", ["postgres", "mariadb"])
def test_a_transaction_that_goes_on_after_its_connection_was_lost_says_so(
    request: pytest.FixtureRequest, kind: str
) -> None:
    """What asks again in such a transaction gets another error than the first one; Optuna reports only the last."""
    server: Server = request.getfixturevalue(kind)
    engine = create_engine(server.create_database())

    def ask_again() -> None:
        with translate_storage_errors("it"), engine.connect() as connection:
            connection.execute(text("SELECT 1"))
            server.stop()
            with suppress(OperationalError):
                connection.execute(text("SELECT 1"))
            connection.execute(text("SELECT 1"))

    try:
        with pytest.raises(StudyError, match="in the middle of a transaction; check that the database is") as caught:
            ask_again()
    finally:
        server.start()
        engine.dispose()
    assert isinstance(caught.value.__cause__, PendingRollbackError)
    assert is_connection_lost(caught.value)


def test_a_server_that_stays_away_ends_the_search_which_can_be_resumed(
    postgres: Server, unbroken: tuple[list[tuple], list], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "OUTAGE_S", 0.1)
    url = postgres.create_database()
    first = Interrupting(postgres.stop, at=9)
    try:
        with pytest.raises(StudyError, match="check that the database is reachable"):
            search(url, first, lease_s=2.0)
    finally:
        postgres.start()
    with StudyStore(url, study_name="demo") as store:
        while store.lock.find_holder() is not None:  # this process lives, so the lease of its first search has to end
            time.sleep(0.1)
    rest = SyntheticEvaluator(10, num_windows=16)
    found = search(url, rest)
    assert found == unbroken[0]
    assert first.calls[:-1] + rest.calls == unbroken[1], "what was under way is lost"


ON_A_SMALL_DISK = """
import json, os, sys
from pathlib import Path
from lpsearch.errors import StudyError
from lpsearch.search import PlanSpace, StudyStore
from tests.faults.test_outages import search
from lpsearch.search.storage_url import is_connection_lost, translate_storage_errors
from tests.search.evaluators import SyntheticEvaluator

directory = Path(sys.argv[1])
url = f"sqlite:///{directory / 'study.db'}"
StudyStore(url, study_name="demo").close()
filler = directory / "filler"
status = os.statvfs(directory)
filler.write_bytes(bytes(status.f_bavail * status.f_frsize - 150_000))
first, rest = (SyntheticEvaluator(10, num_windows=16) for _ in range(2))
try:
    search(url, first)
    message = "it fitted"
except StudyError as error:
    message = str(error)
filler.unlink()
found = search(url, rest)
known = [(plan.key, origin, state, loss.nll) for plan, origin, state, loss in found]
calls = [[(plan.key, windows) for plan, windows in evaluator.calls] for evaluator in (first, rest)]
print(json.dumps([message, known, *calls]))
"""


def test_a_full_disk_ends_the_search_which_can_be_resumed(unbroken: tuple[list[tuple], list], tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not on this machine")
    mount = 'mount -t tmpfs -o size=2m tmpfs "$1" || exit 77; exec "$2" -c "$3" "$1"'
    command = ["unshare", "-m", "bash", "-c", mount, "bash", str(tmp_path), sys.executable, ON_A_SMALL_DISK]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, cwd=ROOT)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no tmpfs may be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    message, known, first, rest = json.loads(done.stdout.splitlines()[-1])
    assert "free some space" in message
    expected, calls = unbroken
    assert known == [[plan.key, origin, state, loss.nll] for plan, origin, state, loss in expected]
    names = [[plan.key, list(windows)] for plan, windows in calls]
    assert 0 < len(first) < len(names)
    assert first + rest == names or first[:-1] + rest == names, "at most what was under way is lost"


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_study_is_refused_by_name_and_left_untouched(tmp_path: Path, share: float) -> None:
    path = tmp_path / "study.db"
    search(f"sqlite:///{path}", SyntheticEvaluator(10, num_windows=16))
    os.truncate(path, int(path.stat().st_size * share))
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    evaluator = SyntheticEvaluator(10, num_windows=16)
    with pytest.raises(StudyError, match=f"{path}: .*(malformed|damaged).*left as it is"):
        search(f"sqlite:///{path}", evaluator)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    assert sorted(other.name for other in tmp_path.iterdir()) == ["study.db", "study.db.lock"]
    assert evaluator.calls == []


WITH_A_JUMPING_CLOCK = """
import json, os, sys, time
from pathlib import Path
from types import SimpleNamespace
from lpsearch.search import PlanSpace, StudyStore, run_study
from tests.search import evaluators
from lpsearch.search.storage_url import is_connection_lost, translate_storage_errors
from tests.search.evaluators import SyntheticEvaluator

evaluators.time = SimpleNamespace(sleep=lambda seconds: None)  # libfaketime refuses to sleep when the clock has jumped
url, offsets = sys.argv[1], ["+1d", "-3d", "+20y", "-1h", "+0s"]
seen = []

class Evaluator(SyntheticEvaluator):
    def evaluate_windows(self, plan, window_indices):
        Path(os.environ["FAKETIME_TIMESTAMP_FILE"]).write_text(offsets[len(self.calls) % len(offsets)] + "\\n")
        seen.append(time.time())
        return super().evaluate_windows(plan, window_indices)

evaluator = Evaluator(10, num_windows=16)
with StudyStore(url, study_name="demo", lease_s=60.0) as store:
    result = run_study(
        evaluator=evaluator, space=PlanSpace(10), budget=8, store=store, seed=3, timeout_s=3600.0
    )
known = [(one.plan.key, one.origin, one.state, one.loss.nll) for one in result.results]
print(json.dumps([known, len(evaluator.calls), result.timed_out, result.elapsed_s, max(seen) - min(seen)]))
"""


def find_faketime() -> Path | None:
    return next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_clocks_that_jump_change_nothing(
    request: pytest.FixtureRequest, kind: str, unbroken: tuple[list[tuple], list], tmp_path: Path
) -> None:
    library = find_faketime()
    if library is None:
        pytest.skip("Debian's package faketime is not on this machine")
    url = f"sqlite:///{tmp_path / 'study.db'}"
    if kind == "postgres":
        url = request.getfixturevalue(kind).create_database()
    offset = tmp_path / "offset"
    offset.write_text("+0s\n")
    environment = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    began_at = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", WITH_A_JUMPING_CLOCK, url],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    known, num_calls, timed_out, elapsed_s, jumped_s = json.loads(done.stdout.splitlines()[-1])
    expected, calls = unbroken
    assert known == [[plan.key, origin, state, loss.nll] for plan, origin, state, loss in expected]
    assert num_calls == len(calls)
    assert not timed_out
    assert 0 < elapsed_s < time.monotonic() - began_at
    assert jumped_s > 10 * 365 * 86400, "the clock did jump"
