"""Opening a database: any path, several processes at once, media that cannot be written, and what is said of it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy.engine import URL

from lpsearch.errors import ConfigError, LpsearchError, StudyError
from lpsearch.search import PlanSpace, StudyStore, read_results, run_study
from lpsearch.search import database as opening
from lpsearch.search.storage_url import parse_storage_url
from tests.search.evaluators import SyntheticEvaluator
from tests.warm import WarmProcess, end_all

NAMES = ["a?lr=1", "a?lr=2", "{model}", "{}", "50%", "%41", "#1", "a b", "ü", "a&b=c;d", "plain"]


def make_study(path: Path, *, budget: int = 3) -> None:
    url = URL.create("sqlite", database=str(path))
    with StudyStore(url, study_name="demo") as store:
        run_study(evaluator=SyntheticEvaluator(6), space=PlanSpace(6), budget=budget, store=store)


def snapshot(directory: Path) -> dict[str, tuple[str, int]]:
    """Return the content of every file, with the time of its last change."""
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in directory.iterdir()
        if path.is_file()
    }


def test_a_study_lies_where_its_path_says_whatever_that_holds(tmp_path: Path) -> None:
    for index, name in enumerate(NAMES):
        directory = tmp_path / name
        directory.mkdir()
        with StudyStore(URL.create("sqlite", database=str(directory / "study.db")), study_name="demo") as store:
            store.save_settings({"index": index})
            assert store.where == str(directory / "study.db")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)
    for index, name in enumerate(NAMES):
        with closing(sqlite3.connect(tmp_path / name / "study.db")) as connection:
            settings = connection.execute("SELECT settings FROM lpsearch_studies").fetchall()
        assert [json.loads(text) for (text,) in settings] == [{"index": index}]
        url = URL.create("sqlite", database=str(tmp_path / name / "study.db"))
        with StudyStore(url, study_name="demo", read_only=True) as store:
            assert store.load_settings() == {"index": index}


OPEN_AT_ONCE = """
import sys, time
from lpsearch.search import StudyStore

while time.time() < float(sys.argv[2]):
    pass
with StudyStore(sys.argv[1], study_name=sys.argv[3]) as store:
    store.save_settings({"name": sys.argv[3]})
"""


def test_first_starts_at_once_share_the_making_of_the_tables(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]
    for attempt in range(2):
        url = f"sqlite:///{tmp_path / f'{attempt}.db'}"
        begin_at = time.time() + 1
        end_all([WarmProcess(url, begin_at, name, code=OPEN_AT_ONCE) for name in names], timeout=120)
        with StudyStore(url, study_name="a") as store:
            assert sorted(store.list_studies()) == names


def test_reading_changes_and_makes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    make_study(path)
    (tmp_path / "study.db.lock").unlink()
    before = snapshot(tmp_path)
    with StudyStore(f"sqlite:///{path}", study_name="demo", read_only=True) as store:
        assert len(read_results(store)) == 3
        assert store.lock.find_holder() is None
        with pytest.raises(StudyError, match=r"readonly|read-only"):
            store.save_settings({})
    assert snapshot(tmp_path) == before


def test_reading_follows_a_search_under_way(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    make_study(path)
    with (
        StudyStore(f"sqlite:///{path}", study_name="demo", read_only=True) as reader,
        StudyStore(f"sqlite:///{path}", study_name="demo") as writer,
        writer.hold_lock(),
    ):
        assert reader.lock.find_holder() == f"{os.getpid()} on {socket.gethostname()}"
        for budget in (4, 5):
            run_study(evaluator=SyntheticEvaluator(6), space=PlanSpace(6), budget=budget, store=writer)
            assert len(read_results(reader)) == budget


READ_MOUNTED = """
mount --bind "$1" "$2" && mount -o remount,bind,ro "$2" || exit 77
! touch "$2/x" 2>/dev/null || exit 77
exec "$3" -c "$4" "$2/study.db"
"""

READ = """
import sys
from lpsearch.errors import StudyError
from lpsearch.search import StudyStore, read_results

for read_only in (True, False):
    try:
        with StudyStore(f"sqlite:///{sys.argv[1]}", study_name="demo", read_only=read_only) as store:
            print(len(read_results(store)))
    except StudyError as error:
        print(error)
"""


def read_mounted(source: Path, target: Path) -> list[str]:
    """Read a study where its directory is mounted read-only; return the lines of its reader and its writer."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not on this machine")
    target.mkdir()
    command = ["unshare", "-m", "bash", "-c", READ_MOUNTED, "bash", source, target, sys.executable, READ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=120)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no read-only mount can be made here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_study_on_a_read_only_medium_is_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    make_study(source / "study.db")
    reader, writer = read_mounted(source, tmp_path / "mounted")
    assert reader == "3"
    assert "not writable" in writer


def test_a_log_on_a_read_only_medium_is_read_or_named(tmp_path: Path) -> None:
    """A search that was killed leaves its last trials in the log alone: to leave them out would be silent."""
    source = tmp_path / "source"
    source.mkdir()
    killed = f"""
import os
from lpsearch.search import PlanSpace, StudyStore, run_study
from tests.search.evaluators import SyntheticEvaluator
store = StudyStore("sqlite:///{source / "study.db"}", study_name="demo")
run_study(evaluator=SyntheticEvaluator(6), space=PlanSpace(6), budget=3, store=store)
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", killed], check=True, timeout=120)
    assert (source / "study.db-wal").stat().st_size > 0
    assert read_mounted(source, tmp_path / "mounted")[0] == "3"
    (source / "study.db-shm").unlink()
    reader = read_mounted(source, tmp_path / "mounted again")[0]
    assert reader == "3" or ("write-ahead log" in reader and "copy the directory" in reader)


def test_tables_that_are_not_made_cannot_be_read_from_a_read_only_medium(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "study.db").touch()
    assert "tables are not made yet" in read_mounted(source, tmp_path / "mounted")[0]


HOLD_DATABASE = """
import sqlite3, sys, time

connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA locking_mode = EXCLUSIVE")
connection.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
time.sleep(120)
"""


@pytest.mark.parametrize("is_new", [False, True])
def test_a_database_that_another_program_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_new: bool
) -> None:
    path = tmp_path / "my study.db"
    if is_new:
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("CREATE TABLE studies (study_id INTEGER)")
    else:
        make_study(path)
    monkeypatch.setattr(opening, "BUSY_TIMEOUT_S", 0.3)
    with subprocess.Popen([sys.executable, "-c", HOLD_DATABASE, str(path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        try:
            with pytest.raises(StudyError) as caught, StudyStore(f"sqlite:///{path}", study_name="demo") as store:
                store.save_settings({})
        finally:
            other.kill()
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "locked" in message
    assert f"`lsof '{path}'`" in message


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql+psycopg://me:SECRET@127.0.0.1:1/db", "me:\\*\\*\\*@127.0.0.1:1/db"),
        ("postgres://me:SECRET@127.0.0.1:1/db", "me:\\*\\*\\*@127.0.0.1:1/db"),
        ("postgresql://127.0.0.1:1/db?user=me&password=SECRET", "password=\\*\\*\\*"),
        ("postgresql://127.0.0.1:1/db?nosuchoption=SECRET", "nosuchoption"),
        ("postgresql://me:SEC@RET@127.0.0.1:1/db", "%40"),
        ("postgresql://me:SEC@RET/x@127.0.0.1:1/db", "%40"),
        ("postgresql://me:x@127.0.0.1:SECRET/db", "port is not a number"),
        ("postgresql://me:SECRET@127.0.0.1:port/db", "port is not a number"),
        ("nosuch://me:SECRET@127.0.0.1/db", "not a database URL"),
        ("me:SECRET@127.0.0.1/db", "not a database URL"),
        ("host=127.0.0.1 password=SECRET", "not a database URL"),
        ("mysql+nosuch://me:SECRET@127.0.0.1:1/db", "not a database URL"),
        ("sqlite:///file:x.db?mode=ro&uri=true", "SQLite's options"),
    ],
)
def test_what_is_said_of_a_url_tells_no_secret(url: str, message: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(LpsearchError, match=message) as caught:
        StudyStore(url, study_name="demo")
    assert isinstance(caught.value, (ConfigError, StudyError))
    for text in (str(caught.value), repr(caught.value), caplog.text):
        assert "SEC" not in text
        assert "RET" not in text


def test_common_spellings_are_those_of_psycopg() -> None:
    for scheme in ("postgres", "postgresql", "postgresql+psycopg"):
        parsed = parse_storage_url(f"{scheme}://me:p%40ss@host:5432/db")
        assert parsed.drivername == "postgresql+psycopg"
        assert (parsed.username, parsed.password, parsed.host, parsed.port) == ("me", "p@ss", "host", 5432)
