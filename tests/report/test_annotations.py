"""What optuna-dashboard shows of a study: exactly the present front, once, beside what people wrote."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from lpsearch.plan import Plan
from lpsearch.report import StudyReport
from lpsearch.search import StudyStore
from tests.report.conftest import EVERYTHING, MakeStudy

optuna_dashboard = pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is not installed")


def annotate(report: StudyReport, directory: Path) -> dict[str, Any]:
    """Annotate a study, and return what optuna-dashboard's own interface says of it."""
    from lpsearch.report.annotations import annotate_study

    with StudyStore(f"sqlite:///{directory / 'study.db'}", study_name="demo") as store:
        annotate_study(store, report, directory)
    return read_study(directory)


def read_study(directory: Path) -> dict[str, Any]:
    from wsgiref.util import setup_testing_defaults

    app = optuna_dashboard.wsgi(f"sqlite:///{directory / 'study.db'}")
    environ: dict[str, Any] = {"PATH_INFO": "/api/studies/1"}
    setup_testing_defaults(environ)
    study: dict[str, Any] = json.loads(b"".join(app(environ, lambda *_: None)))
    return study


def load_study(directory: Path) -> optuna.Study:
    return optuna.load_study(study_name="demo", storage=f"sqlite:///{directory / 'study.db'}")


def test_the_figure_is_the_present_front_and_there_is_one(make_study: MakeStudy, tmp_path: Path) -> None:
    for budget in (13, 16):
        report = make_study(budget=budget)
        shown = annotate(report, tmp_path)["plotly_graph_objects"]
        assert [one["id"] for one in shown] == ["lpsearch-front"]
        traces = {trace["name"]: trace for trace in json.loads(shown[0]["graph_object"])["data"]}
        assert traces["front"]["y"] == [point.loss.delta_nll for point in report.front]
        assert len(traces["front"]["y"]) + len(traces["every other trial"]["y"]) == len(report.results)


def test_a_plan_that_drops_has_a_note_and_one_artifact(make_study: MakeStudy, tmp_path: Path) -> None:
    for _ in range(2):
        report = make_study(budget=45, objective="latency", allow=EVERYTHING)
        study = annotate(report, tmp_path)
    names = [artifact["filename"] for artifact in study["artifacts"]]
    assert sorted(names) == sorted(Path(str(point.plan_file)).name for point in report.front)
    assert any("-drops-" in name for name in names)
    notes = {trial["number"]: trial["note"]["body"] for trial in study["trials"] if trial["note"]["body"]}
    for point in report.front:
        for branch, layers in point.plan.dropped.items():
            assert (f"without {'MLP' if branch == 'mlp' else branch} " in notes[point.trial]) == bool(layers)


def test_a_large_study_keeps_a_small_figure(
    make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lpsearch.report.annotations.MAX_FIGURE_TRIALS", 5)
    report = make_study(budget=14)
    shown = json.loads(annotate(report, tmp_path)["plotly_graph_objects"][0]["graph_object"])["data"]
    traces = {trace["name"]: trace for trace in shown}
    others = sorted(r.loss.delta_nll for r in report.results if r.plan not in {p.plan for p in report.front})
    assert traces["every other trial"]["y"] == others[:5]
    assert len(traces["front"]["y"]) == len(report.front)


def test_notes_are_of_the_present_front_and_keep_what_people_wrote(make_study: MakeStudy, tmp_path: Path) -> None:
    former = make_study(budget=12)
    annotate(former, tmp_path)
    study = load_study(tmp_path)
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")
    trial_ids = {
        trial.number: storage.get_trial_id_from_study_id_trial_number(1, trial.number) for trial in study.trials
    }
    optuna_dashboard.save_note(study, optuna_dashboard.get_note(study) + "\nlook at trial 3")
    system = storage.get_study_system_attrs(1)
    noted = sorted(number for number, key in trial_ids.items() if f"dashboard:{key}:note_ver" in system)
    assert noted == sorted(point.trial for point in former.front)

    report = make_study(budget=22)
    left = {point.trial for point in former.front} - {point.trial for point in report.front}
    assert left, "the front moved on"
    kept = min(left)

    trial = SimpleNamespace(storage=storage, study=study, _trial_id=trial_ids[kept])
    optuna_dashboard.save_note(trial, optuna_dashboard.get_note(trial) + "\nmy own words")
    for _ in range(2):
        shown = annotate(report, tmp_path)
        assert shown["note"]["body"].count("look at trial 3") == 1
        assert shown["note"]["body"].count("| joins |") == 1
        for point in report.front:
            joined = [f"{group[0]}-{group[-1]}" for group in point.plan.groups if len(group) > 1]
            groups = " ".join(joined) or "every layer alone"
            row = next(line for line in shown["note"]["body"].splitlines() if line.endswith(f"| {groups} |"))
            assert f"| {point.loss.delta_nll:.4f}" in row
        notes = {trial["number"]: trial["note"]["body"] for trial in shown["trials"]}
        points = {point.trial: point for point in report.front}
        assert {number for number, body in notes.items() if body} == {*points, kept}
        assert notes[kept] == "my own words"
        for number, point in points.items():
            assert f"lpsearch evaluate {tmp_path}/{point.plan_file} " in notes[number]
            assert f"held out: {point.heldout.delta_nll:.4f}" in notes[number]


@pytest.mark.parametrize("place", ["study.db", "elsewhere/all studies.db"])
def test_the_command_of_the_note_finds_the_study(make_study: MakeStudy, tmp_path: Path, place: str) -> None:
    """What the note says is what a shell would be given, so it is taken apart as by one, and followed."""
    from lpsearch.commands.studies import open_existing_study
    from lpsearch.report import load_report
    from lpsearch.report.annotations import annotate_study

    make_study(budget=12)
    directory = tmp_path / "a study's directory"
    directory.mkdir()
    for name in ("plans", "front.json"):
        (tmp_path / name).rename(directory / name)
    path = directory / place
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "study.db").rename(path)
    with StudyStore(f"sqlite:///{path}", study_name="other") as store:
        store.save_settings({})
    with StudyStore(f"sqlite:///{path}", study_name="demo") as store:
        annotate_study(store, load_report(store, directory), directory)
    study = optuna.load_study(study_name="demo", storage=f"sqlite:///{path}")
    note = optuna_dashboard.get_note(study)
    words = shlex.split(re.search(r"all figures: `(.+)`", note).group(1))
    assert words[:3] == ["lpsearch", "dashboard", str(directory)]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    if place == "study.db":
        assert options == {}
        return
    assert [*options] == ["--storage", "--study"]
    with open_existing_study(directory, storage=options["--storage"], study=options["--study"]) as store:
        assert load_report(store, directory).is_current


def test_plan_files_are_artifacts_once_each(make_study: MakeStudy, tmp_path: Path) -> None:
    ids: dict[str, str] = {}
    for budget in (12, 12, 18, 8):
        report = make_study(budget=budget)
        if budget == 8:  # as if the plans of most joins had been beaten
            report = dataclasses.replace(report, front=report.front[:3])
        artifacts = annotate(report, tmp_path)["artifacts"]
        names = [artifact["filename"] for artifact in artifacts]
        assert sorted(names) == sorted(Path(point.plan_file).name for point in report.front)
        found = {artifact["filename"]: artifact["artifact_id"] for artifact in artifacts}
        assert {path.name for path in (tmp_path / "artifacts").iterdir()} == {*found.values()}
        for name, artifact_id in found.items():
            assert (tmp_path / "artifacts" / artifact_id).read_bytes() == (tmp_path / "plans" / name).read_bytes()
            assert ids.get(name, artifact_id) == artifact_id
        ids |= found
        assert optuna.artifacts.get_all_artifact_meta(study_or_trial=load_study(tmp_path))


def test_other_artifacts_stay(make_study: MakeStudy, tmp_path: Path) -> None:
    report = make_study(budget=12)
    annotate(report, tmp_path)
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    store = optuna.artifacts.FileSystemArtifactStore(tmp_path / "artifacts")
    study = load_study(tmp_path)
    optuna.artifacts.upload_artifact(artifact_store=store, file_path=str(tmp_path / "mine.txt"), study_or_trial=study)
    # optuna-dashboard deletes an artifact by leaving a null in its place
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")
    kept = storage.get_study_system_attrs(1).items()
    gone = next(key for key, value in kept if key.startswith("artifacts:") and "joins-" in value)
    storage.set_study_system_attr(1, gone, "null")
    shown = annotate(report, tmp_path)
    assert len(shown["artifacts"]) == len(report.front) + 1
    assert "mine.txt" in {artifact["filename"] for artifact in shown["artifacts"]}


def test_an_unfinished_study_has_notes_without_commands(make_study: MakeStudy, tmp_path: Path) -> None:
    report = make_study(budget=12, files=False, heldout=False, latency=False, metric="kl")
    shown = annotate(report, tmp_path)
    assert "under way or was interrupted" in shown["note"]["body"]
    assert shown["artifacts"] == []
    assert "lpsearch evaluate" not in json.dumps(shown["trials"])


def test_the_groups_of_the_deepest_models_are_shown_whole() -> None:
    """optuna-dashboard cuts what is not a string at 1024 characters, and MySQL ends at 64 KB."""
    for plan in (Plan.baseline(126), Plan.from_joins(126, range(0, 126, 2))):
        assert len(plan.key) < 1024
