"""No path in a file says which directory is taken for a model, or which files a command deletes or copies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lpsearch.commands.loading import resolve_source_of_plan
from lpsearch.commands.results import _list_plan_files
from lpsearch.errors import PlanError, StudyError
from lpsearch.front_file import load_front_file
from lpsearch.plan import parse_plan
from tests.hostile import FRONT, PLAN


@pytest.mark.parametrize("spec", ["model", "./model", "inner/model", "../{cwd}/model", "~/model"])
def test_a_directory_that_happens_to_be_here_is_not_taken_for_the_plans_model(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "inner").mkdir()
    for place in ("model", "inner/model"):
        (tmp_path / place).symlink_to(tiny_model_dir)
    named = {**PLAN["model"], "id": spec.format(cwd=tmp_path.name), "revision": None}
    plan = parse_plan({**PLAN, "model": named})
    with pytest.raises(PlanError, match="name the model with --model"):
        resolve_source_of_plan(plan, None)
    assert resolve_source_of_plan(plan, str(tiny_model_dir)).path == tiny_model_dir
    whole = parse_plan({**PLAN, "model": {**named, "id": str(tiny_model_dir)}})
    assert resolve_source_of_plan(whole, None).path == tiny_model_dir


@pytest.mark.parametrize(
    "name", ["../kept.json", "plans/../../kept.json", "{dir}/kept.json", "plans/..", "", "plans/.x.json"]
)
def test_a_front_names_no_file_elsewhere(tmp_path: Path, name: str) -> None:
    study = tmp_path / "study"
    study.mkdir()
    (tmp_path / "kept.json").write_text("{}", encoding="utf-8")
    points = [{**point, "plan": name.format(dir=tmp_path)} for point in FRONT["front"]]
    (study / "front.json").write_text(json.dumps({**FRONT, "front": points}), encoding="utf-8")
    with pytest.raises(StudyError, match=r"expected plans/NAME\.json"):
        load_front_file(study)
    assert _list_plan_files(study) == set(), "what is deleted when the front is written again"
