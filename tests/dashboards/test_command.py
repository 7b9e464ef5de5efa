"""``lpsearch dashboard``: what it prints, how it ends, what it refuses, and a study that is searched meanwhile."""

from __future__ import annotations

import json
import re
import signal
import socket
import sqlite3
import sys
import time
from contextlib import closing
from http.server import HTTPServer
from pathlib import Path

import pytest

from lpsearch.commands.studies import open_existing_study
from lpsearch.errors import UsageError
from lpsearch.report import StudyReport
from lpsearch.report.annotations import is_annotated
from lpsearch.search import StudyStore
from lpsearch_dashboard import build_server
from tests.commands.conftest import Run, Start
from tests.dashboards.conftest import NUM_TRIALS
from tests.dashboards.serving import fetch, serve, wait_for_address
from tests.report.conftest import MakeStudy


def test_it_serves_until_ctrl_c(start_lpsearch: Start, finished_study: StudyReport, tmp_path: Path) -> None:
    process = start_lpsearch("dashboard", tmp_path, "--port", 0)
    url = wait_for_address(process)
    assert fetch(url + "lpsearch/study.json")["state"] == "done"
    assert len(fetch(url + "api/studies/1")["trials"]) == NUM_TRIALS
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    document = json.loads(stdout.splitlines()[-1])
    assert list(document) == ["url", "study", "seconds"]
    assert (document["url"], document["study"]) == (url, "demo")
    assert "GET" not in stderr, "requests stay out of the terminal"


@pytest.mark.parametrize("option", ["--quiet", "--json"])
def test_its_address_is_told_in_every_manner_of_speaking(
    start_lpsearch: Start, finished_study: StudyReport, tmp_path: Path, option: str
) -> None:
    process = start_lpsearch("dashboard", tmp_path, "--port", 0, option)
    line = process.stderr.readline()
    if option == "--json":
        said = json.loads(line)
        assert said["level"] == "INFO"
        url = said["progress"].pop("url")
        assert said["progress"] == {"step": "serving", "study": "demo"}
    else:
        url = re.search(r"http://127\.0\.0\.1:\d+/", line).group()
    assert fetch(url + "lpsearch/study.json")["state"] == "done"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (0, "")
    assert json.loads(stdout)["url"] == url


def test_it_writes_what_a_search_without_optuna_dashboard_left_out(
    start_lpsearch: Start, make_study: MakeStudy, tmp_path: Path
) -> None:
    report = make_study(budget=12)
    process = start_lpsearch("dashboard", tmp_path, "--port", 0)
    shown = fetch(wait_for_address(process) + "api/studies/1")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    assert "| joins |" in shown["note"]["body"]
    assert len(shown["artifacts"]) == len(report.front)
    with StudyStore(f"sqlite:///{tmp_path / 'study.db'}", study_name="demo") as store:
        assert is_annotated(store, report)


def test_it_follows_a_search_of_another_process(
    run_lpsearch: Run,
    start_lpsearch: Start,
    tiny_model_dir: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "study"
    arguments = [
        *("optimize", "--model", tiny_model_dir, "--data", text_file, "--windows", 3, "--seq-len", 24),
        *("--latency", "off", "--dtype", "float32", "--device", "cpu", "--out", out),
    ]
    assert run_lpsearch(*arguments, "--budget", 2).exit_code == 0
    with serve(out) as url:
        seen = [("done", 2)]
        search = start_lpsearch(*arguments, "--budget", 13)
        while seen[-1] != ("done", 13):
            assert search.poll() in (None, 0), search.stderr.read()
            shown = fetch(url + "lpsearch/study.json")
            seen.append((shown["state"], int(shown["message"].split()[0])))
            time.sleep(0.05)
        assert len(fetch(url + "api/studies/1")["trials"]) == 13
    assert seen[1] == ("done", 2), "the page was looked at before the search went on"
    counts = [count for _, count in seen]
    assert counts == sorted(counts)
    assert all(state == "searching" for state, count in seen if 2 < count < 13)
    _, stderr = search.communicate(timeout=60)
    assert search.returncode == 0, stderr


def test_directories_without_a_study_are_refused(run_lpsearch: Run, tmp_path: Path) -> None:
    outcome = run_lpsearch("dashboard", tmp_path / "nowhere", "--port", 0)
    assert outcome.exit_code == 2
    assert "no such directory" in outcome.document["error"]["message"]
    outcome = run_lpsearch("dashboard", tmp_path, "--port", 0)
    assert outcome.exit_code == 2
    assert "holds no study.db" in outcome.document["error"]["message"]
    assert not (tmp_path / "study.db").exists(), "looking for a study must not make one"
    StudyStore(f"sqlite:///{tmp_path / 'study.db'}", study_name="x").close()
    outcome = run_lpsearch("dashboard", tmp_path, "--port", 0)
    assert outcome.exit_code == 2
    assert "holds no study yet" in outcome.document["error"]["message"]


def test_a_port_in_use_is_named(run_lpsearch: Run, finished_study: StudyReport, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = run_lpsearch("dashboard", tmp_path, "--port", port)
    assert (outcome.exit_code, outcome.document["error"]["type"]) == (2, "UsageError")
    assert f"port {port} of 127.0.0.1 is in use" in outcome.document["error"]["message"]
    assert "--port 0" in outcome.document["error"]["message"]
    assert run_lpsearch("dashboard", tmp_path, "--port", 99999).exit_code == 2


def test_a_port_that_another_dashboard_has_is_in_use(
    finished_study: StudyReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HTTPServer, "allow_reuse_port", True)  # as newer versions of Python have it
    with serve(tmp_path) as url, open_existing_study(tmp_path, storage=None, study=None) as store:
        port = int(url.rstrip("/").rpartition(":")[2])
        with pytest.raises(UsageError, match=f"port {port} of 127.0.0.1 is in use"):
            build_server(store, tmp_path, port=port)


def test_studies_of_another_version_are_refused(run_lpsearch: Run, finished_study: StudyReport, tmp_path: Path) -> None:
    assert "holds no study 'other'" in run_lpsearch("dashboard", tmp_path, "--study", "other").stderr
    front = json.loads((tmp_path / "front.json").read_text(encoding="utf-8"))
    (tmp_path / "front.json").write_text(json.dumps({**front, "schema_version": 0}), encoding="utf-8")
    outcome = run_lpsearch("dashboard", tmp_path, "--port", 0)
    assert (outcome.exit_code, outcome.document["error"]["type"]) == (2, "StudyVersionError")
    with closing(sqlite3.connect(tmp_path / "study.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v1.3.0.a'")
    outcome = run_lpsearch("dashboard", tmp_path, "--port", 0)
    assert (outcome.exit_code, outcome.document["error"]["type"]) == (2, "StudyVersionError")
    (tmp_path / "study.db").write_bytes(b"SQLite format 3\0" + b"x" * 5000)
    outcome = run_lpsearch("dashboard", tmp_path, "--port", 0)
    assert (outcome.exit_code, outcome.document["error"]["type"]) == (1, "StudyError")


def test_without_the_extra_it_says_what_to_install(
    run_lpsearch: Run, finished_study: StudyReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith(("lpsearch_dashboard", "optuna_dashboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)  # what Python itself does for a module it cannot find
    outcome = run_lpsearch("dashboard", tmp_path, "--port", 0)
    assert outcome.exit_code == 2
    assert "pip install 'lpsearch[dashboard]'" in outcome.document["error"]["message"]


def test_a_search_without_the_extra_leaves_the_rest(
    run_lpsearch: Run, tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    outcome = run_lpsearch(
        *("optimize", "--model", tiny_model_dir, "--data", text_file, "--windows", 2, "--seq-len", 16),
        *("--latency", "off", "--dtype", "float32", "--device", "cpu", "--out", tmp_path / "study", "--budget", 3),
    )
    assert outcome.exit_code == 0, outcome.stderr
    assert (tmp_path / "study" / "report.html").is_file()
    assert not (tmp_path / "study" / "artifacts").exists()
    assert "optuna-dashboard" not in outcome.stderr
