"""The application without a network: what it answers, what it refuses, and that it follows a study that grows."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import optuna
import pytest

from lpsearch.report import StudyReport
from lpsearch.search import StudyStore
from lpsearch_dashboard import live
from tests.dashboards.conftest import NUM_TRIALS, Ask
from tests.report.conftest import MakeStudy
from tests.report.test_html import parse


def test_the_page_shows_the_study_and_asks_only_for_what_is_served(finished_study: StudyReport, ask: Ask) -> None:
    answer = ask("/")
    assert answer.status == 200
    page = parse(answer.body.decode())
    for index, point in enumerate(finished_study.front):
        assert f"plan-{index}" in page.ids
        assert f"{point.record.delta_nll:.4f}" in page.text
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


def test_a_study_that_grows_is_seen_to_grow(make_study: MakeStudy, ask: Ask) -> None:
    make_study(budget=2, files=False, heldout=False)
    first = ask("/lpsearch/study.json")
    again = ask("/lpsearch/study.json", HTTP_IF_NONE_MATCH=first.headers["ETag"])
    assert (again.status, again.body) == (304, b"")
    make_study(budget=3, files=False, heldout=False)
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


def test_the_page_takes_a_bounded_share_of_the_machine(
    finished_study: StudyReport, tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MAX_BUSY_SHARE", 1e-9)
    first = ask("/lpsearch/study.json").json
    (tmp_path / "front.json").unlink()
    assert ask("/lpsearch/study.json").json == first


def test_a_study_without_a_finished_trial_waits(tmp_path: Path, ask: Ask, make_study: MakeStudy) -> None:
    with StudyStore(f"sqlite:///{tmp_path / 'study.db'}", study_name="demo") as store:
        store.save_settings({"num_layers": 10, "max_group": 2, "metric": "nll", "objective": "depth"})
    page = parse(ask("/").body.decode())
    assert "no plan of the study 'demo' is finished yet" in page.text
    assert "/dashboard" in page.references
    assert ask("/lpsearch/study.json").json["state"] == "waiting"
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
