"""The application without a network: what it answers, what it refuses, and that it follows a study that grows."""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import optuna
import plotly
import pytest

from lpsearch import report
from lpsearch.commands.studies import open_existing_study
from lpsearch.report import StudyReport
from lpsearch.search import StudyStore
from lpsearch_dashboard import live
from tests.dashboards.conftest import NUM_TRIALS, Ask, build_ask
from tests.dashboards.serving import hold_study
from tests.report.conftest import MakeStudy
from tests.report.pages import parse


def test_the_page_shows_the_study_and_asks_only_for_what_is_served(finished_study: StudyReport, ask: Ask) -> None:
    answer = ask("/")
    assert answer.status == 200
    page = parse(answer.body.decode())
    for index, point in enumerate(finished_study.front):
        assert f"plan-{index}" in page.ids
        assert f"{point.loss.delta_nll:.4f}" in page.text
    assert f"{NUM_TRIALS} plans; the search is done" in page.text
    scripts = [reference for reference in page.references if reference.endswith(".js")]
    assert scripts == ["/lpsearch/plotly.js", "/lpsearch/page.js", "/lpsearch/live.js"]
    for script in scripts:
        assert ask(script).headers["Content-Type"].startswith("text/javascript")
    for reference in {*page.references} - {*scripts}:
        assert reference.startswith(("#", "data:")) or ask(reference).status == 200, reference
    assert "'self'" in answer.headers["Content-Security-Policy"]
    assert "http" not in answer.headers["Content-Security-Policy"]


def test_the_page_and_its_renewal_hold_the_same(finished_study: StudyReport, ask: Ask) -> None:
    page, renewal = parse(ask("/").body.decode()), ask("/lpsearch/study.json").json
    assert json.loads(page.data) == renewal["data"]
    assert renewal["body"] in ask("/").body.decode()


def test_a_study_that_grows_is_seen_to_grow(make_study: MakeStudy, tmp_path: Path, ask: Ask) -> None:
    make_study(budget=2, files=False, heldout=False)
    with hold_study(tmp_path):
        first = ask("/lpsearch/study.json")
        again = ask("/lpsearch/study.json", HTTP_IF_NONE_MATCH=first.headers["ETag"])
        assert (again.status, again.body) == (304, b"")
    make_study(budget=3, files=False, heldout=False)
    with hold_study(tmp_path):
        second = ask("/lpsearch/study.json", HTTP_IF_NONE_MATCH=first.headers["ETag"])
    for answer, budget in ((first, 2), (second, 3)):
        assert answer.status == 200
        assert answer.json["state"] == "searching"
        assert answer.json["message"].startswith(f"{budget} plans so far")
    make_study(budget=3)
    third = ask("/lpsearch/study.json", HTTP_IF_NONE_MATCH=second.headers["ETag"])
    assert third.json["state"] == "done"
    assert "Held-out values are on windows" in third.json["body"]
    assert "Held-out values come when the search ends" in second.json["body"]


def test_a_search_that_was_interrupted_is_told_from_one_under_way(
    make_study: MakeStudy, tmp_path: Path, ask: Ask
) -> None:
    make_study(budget=2, files=False, heldout=False)
    states = []
    for _ in range(2):
        with hold_study(tmp_path):
            states.append(ask("/lpsearch/study.json").json["state"])
        interrupted = ask("/lpsearch/study.json").json
        states.append(interrupted["state"])
        assert "2 plans so far; the search was interrupted; run the same command to resume it" in interrupted["message"]
    assert states == ["searching", "interrupted"] * 2
    assert b'data-state="interrupted"' in ask("/").body


def test_looking_at_a_study_does_not_keep_a_search_from_beginning(
    finished_study: StudyReport, tmp_path: Path, ask: Ask
) -> None:
    ends = threading.Event()

    def look() -> None:
        while not ends.is_set():
            ask("/lpsearch/study.json")

    watcher = threading.Thread(target=look)
    ask("/lpsearch/study.json")
    watcher.start()
    try:
        for _ in range(20):
            with hold_study(tmp_path):
                pass
    finally:
        ends.set()
        watcher.join()


def test_a_study_that_cannot_be_written_is_shown_and_takes_no_notes(
    finished_study: StudyReport, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with open_existing_study(tmp_path, storage=None, study=None) as store:
        assert store.is_read_only
        ask = build_ask(store, tmp_path)
        assert ask("/lpsearch/study.json").json["state"] == "done"
        for path in ("/", "/dashboard/studies/1", "/dashboard/studies/1/trials", "/api/studies", "/api/meta"):
            assert ask(path).status == 200, path
        study = ask("/api/studies/1").json
        assert len(study["trials"]) == NUM_TRIALS
        note = json.dumps({"version": study["note"]["version"] + 1, "body": "mine"}).encode()
        answer = ask("/api/studies/1/note", "PUT", note)
        assert (answer.status, "cannot be written" in answer.json["reason"]) == (403, True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_page_takes_a_bounded_share_of_the_machine(
    finished_study: StudyReport, tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MAX_BUSY_SHARE", 1e-9)
    first = ask("/lpsearch/study.json").json
    (tmp_path / "front.json").unlink()
    assert ask("/lpsearch/study.json").json == first


def test_a_study_that_cannot_be_shown_takes_no_more_of_it(
    finished_study: StudyReport, tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []

    def load_report(store: StudyStore, directory: Path) -> StudyReport:
        reads.append(directory)
        return report.load_report(store, directory)

    monkeypatch.setattr(live, "load_report", load_report)
    monkeypatch.setattr(live, "MAX_BUSY_SHARE", 1e-9)
    front = (tmp_path / "front.json").read_text(encoding="utf-8")
    (tmp_path / "front.json").write_text(json.dumps({**json.loads(front), "schema_version": 0}), encoding="utf-8")
    answers = [ask("/lpsearch/study.json") for _ in range(3)]
    assert reads == [tmp_path]
    assert {answer.status for answer in answers} == {503}
    assert all("schema_version is 0" in answer.json["reason"] for answer in answers)


def test_a_study_without_a_finished_trial_waits(tmp_path: Path, ask: Ask, make_study: MakeStudy) -> None:
    with StudyStore(f"sqlite:///{tmp_path / 'study.db'}", study_name="demo") as store:
        store.save_settings({"num_layers": 10, "max_group": 2, "metric": "nll", "objective": "depth"})
    with hold_study(tmp_path):
        page = parse(ask("/").body.decode())
        assert "no plan of the study 'demo' is finished yet" in page.text
        assert "/dashboard" in page.references
        assert ask("/lpsearch/study.json").json["state"] == "waiting"
    interrupted = ask("/lpsearch/study.json").json
    assert interrupted["state"] == "interrupted"
    assert "ended before its first plan" in interrupted["message"]
    make_study(budget=2)
    assert ask("/lpsearch/study.json").json["state"] == "done"
    assert "chart-front" in parse(ask("/").body.decode()).ids


def test_optuna_dashboard_is_under_the_same_address(finished_study: StudyReport, tmp_path: Path, ask: Ask) -> None:
    page = ask("/dashboard/studies/1")
    assert page.status == 200
    assert b'<a href="/"' in page.body
    assert int(page.headers["Content-Length"]) == len(page.body)
    assert ask("/static/bundle.js").status == 200
    study = ask("/api/studies/1").json
    assert study["objective_names"] == ["depth_reduction", "perplexity"]
    assert [one["id"] for one in study["plotly_graph_objects"]] == ["lpsearch-front"]
    for artifact in study["artifacts"]:
        stored = ask(f"/artifacts/1/{artifact['artifact_id']}").body
        assert stored == (tmp_path / "plans" / artifact["filename"]).read_bytes()
    assert "/dashboard/studies/1" in parse(ask("/").body.decode()).references


def test_what_would_change_the_study_is_refused(finished_study: StudyReport, tmp_path: Path, ask: Ask) -> None:
    before = ask("/api/studies/1").json
    for method, path, body in (
        ("DELETE", "/api/studies/1", b"{}"),
        ("POST", "/api/studies/1/rename", b'{"study_name": "other"}'),
        ("POST", "/api/trials/1/tell", b'{"state": "fail"}'),
        ("POST", "/api/studies", b'{"study_name": "other", "directions": ["minimize"]}'),
        ("POST", "/api/artifacts/1", b'{"file": "data:text/plain;base64,aGk=", "filename": "x"}'),
        ("POST", "/incompatible-rdb-schema", b""),
    ):
        answer = ask(path, method, body)
        assert answer.status == 403, path
        assert "only notes can be written" in answer.json["reason"]
    assert ask("/api/studies/1").json == before
    assert optuna.get_all_study_names(f"sqlite:///{tmp_path / 'study.db'}") == ["demo"]


def test_notes_can_be_written(finished_study: StudyReport, ask: Ask) -> None:
    study = ask("/api/studies/1").json
    trial = study["trials"][3]
    for path, note in (
        ("/api/studies/1/note", study["note"]),
        (f"/api/studies/1/{trial['trial_id']}/note", trial["note"]),
    ):
        assert ask(path, "PUT", json.dumps({"version": note["version"] + 1, "body": "mine"}).encode()).status == 204
    study = ask("/api/studies/1").json
    assert study["note"]["body"] == study["trials"][3]["note"]["body"] == "mine"


def test_pages_from_elsewhere_reach_nothing(finished_study: StudyReport, ask: Ask) -> None:
    for path in ("/", "/lpsearch/study.json", "/api/studies", "/dashboard"):
        assert ask(path, HTTP_HOST="elsewhere.example:8080").status == 403
        assert ask(path, HTTP_HOST="localhost:9000").status == 200
    version = ask("/api/studies/1").json["note"]["version"] + 1
    note = ("/api/studies/1/note", "PUT", json.dumps({"version": version, "body": "theirs"}).encode())
    assert ask(*note, HTTP_ORIGIN="https://elsewhere.example").status == 403
    assert ask(*note, HTTP_ORIGIN="http://127.0.0.1:8080").status == 204


def test_names_that_are_no_addresses_reach_nothing(finished_study: StudyReport, ask: Ask) -> None:
    for name in ("[", "[::1", "[localhost]", "[v1.x]:80"):
        assert ask("/", HTTP_HOST=name).status == 403, name
        assert ask("/", HTTP_ORIGIN=f"http://{name}").status == 403, name


def test_a_browser_that_has_plotly_is_not_sent_it_again(finished_study: StudyReport, ask: Ask) -> None:
    whole = ask("/lpsearch/plotly.js")
    assert (whole.status, len(whole.body) > 1_000_000) == (200, True)
    assert plotly.__version__ in whole.headers["ETag"]
    assert whole.headers["Cache-Control"] == "no-cache"
    again = ask("/lpsearch/plotly.js", HTTP_IF_NONE_MATCH=whole.headers["ETag"])
    assert (again.status, again.body, again.headers["ETag"]) == (304, b"", whole.headers["ETag"])
    other = ask("/lpsearch/plotly.js", HTTP_IF_NONE_MATCH='"plotly-of-another-version"')
    assert (other.status, other.body) == (200, whole.body)


@pytest.mark.parametrize("broken", ["moved", "version", "database"])
def test_the_page_of_a_study_that_cannot_be_read_says_why_and_asks_again(
    finished_study: StudyReport, tmp_path: Path, ask: Ask, broken: str
) -> None:
    assert ask("/").status == 200
    aside = tmp_path / "aside"
    front = json.loads((tmp_path / "front.json").read_text(encoding="utf-8"))
    if broken == "moved":
        shutil.move(tmp_path / "study.db", aside)
    elif broken == "version":
        (tmp_path / "front.json").write_text(json.dumps({**front, "schema_version": 0}), encoding="utf-8")
    else:
        with closing(sqlite3.connect(tmp_path / "study.db")) as connection, connection:
            connection.execute("ALTER TABLE lpsearch_evaluations RENAME TO elsewhere")
    answer = ask("/")
    assert answer.status == 503
    assert answer.headers["Content-Type"].startswith("text/html")
    assert "'self'" in answer.headers["Content-Security-Policy"]
    page = parse(answer.body.decode())
    assert ask("/lpsearch/study.json").json["reason"] in page.text
    assert "demo" in page.text
    assert [reference for reference in page.references if reference.endswith(".js")] == ["/lpsearch/live.js"]
    assert b'data-state="lost" data-etag=""' in answer.body, "the next answer is whole"
    if broken == "moved":
        shutil.move(aside, tmp_path / "study.db")
    elif broken == "version":
        (tmp_path / "front.json").write_text(json.dumps(front), encoding="utf-8")
    else:
        with closing(sqlite3.connect(tmp_path / "study.db")) as connection, connection:
            connection.execute("ALTER TABLE elsewhere RENAME TO lpsearch_evaluations")
    assert ask("/").status == 200


def test_a_study_that_breaks_is_named_and_the_server_goes_on(
    finished_study: StudyReport, tmp_path: Path, ask: Ask
) -> None:
    assert ask("/").status == 200
    with closing(sqlite3.connect(tmp_path / "study.db")) as connection, connection:
        connection.execute("ALTER TABLE lpsearch_evaluations RENAME TO elsewhere")
    answer = ask("/lpsearch/study.json")
    assert answer.status == 503
    assert "lpsearch_evaluations" in answer.json["reason"]
    with closing(sqlite3.connect(tmp_path / "study.db")) as connection, connection:
        connection.execute("ALTER TABLE elsewhere RENAME TO lpsearch_evaluations")
    assert ask("/lpsearch/study.json").status == 200


def test_losses_that_no_search_keeps_are_named_and_not_shown(
    finished_study: StudyReport, tmp_path: Path, ask: Ask
) -> None:
    with closing(sqlite3.connect(tmp_path / "study.db")) as connection, connection:
        connection.execute("UPDATE lpsearch_evaluations SET nll_nats_per_token = 9e999 WHERE window_idx = 2")
    answer = ask("/lpsearch/study.json")
    assert answer.status == 503
    assert "has a loss of inf on" in answer.json["reason"]


def test_a_fresh_study_in_the_place_of_the_old_one_is_shown(
    finished_study: StudyReport, make_study: MakeStudy, tmp_path: Path, ask: Ask
) -> None:
    assert ask("/lpsearch/study.json").json["message"].startswith(f"{NUM_TRIALS} plans")
    aside = tmp_path / "aside"
    aside.mkdir()
    for path in [*tmp_path.glob("study.db*"), tmp_path / "front.json"]:
        path.rename(aside / path.name)
    answer = ask("/lpsearch/study.json")
    assert answer.status == 503
    assert "study.db" in answer.json["reason"]
    assert not (tmp_path / "study.db").exists(), "looking for a study must not make one"
    make_study(budget=3)
    assert ask("/lpsearch/study.json").json["message"].startswith("3 plans")
    assert len(ask("/api/studies/1").json["trials"]) == 3


def test_optuna_dashboard_follows_a_database_that_was_moved_aside(
    finished_study: StudyReport, make_study: MakeStudy, tmp_path: Path, ask: Ask
) -> None:
    """With optuna-dashboard's pages alone open: nothing asks for the live page."""
    former = ask("/api/studies/1").json
    assert len(former["trials"]) == NUM_TRIALS
    aside = tmp_path / "aside"
    aside.mkdir()
    for path in [*tmp_path.glob("study.db*"), tmp_path / "front.json"]:
        path.rename(aside / path.name)
    for path, method in (("/api/studies/1", "GET"), ("/api/studies/1/note", "PUT")):
        answer = ask(path, method, b'{"version": 99, "body": "mine"}')
        assert (answer.status, "study.db" in answer.json["reason"]) == (503, True)
    assert ask("/dashboard/studies/1").status == 200
    assert ask("/static/bundle.js").status == 200
    assert not (tmp_path / "study.db").exists(), "looking for a study must not make one"
    make_study(budget=3)
    study = ask("/api/studies/1").json
    assert len(study["trials"]) == 3
    note = json.dumps({"version": study["note"]["version"] + 1, "body": "mine"}).encode()
    assert ask("/api/studies/1/note", "PUT", note).status == 204
    assert ask("/api/studies/1").json["note"]["body"] == "mine"
    with closing(sqlite3.connect(aside / "study.db")) as connection:
        kept = connection.execute(
            "SELECT value_json FROM study_system_attributes WHERE key LIKE 'dashboard:note_str:%'"
        ).fetchall()
    assert "mine" not in "".join(json.loads(value) for (value,) in kept)
