"""Paths in plan and front files: none is followed from where a command happens to run, none says where weights are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lpsearch.commands.loading import load_model_of_plan, resolve_source_of_plan
from lpsearch.commands.plan_texts import check_texts_of_plan
from lpsearch.commands.results import _list_plan_files
from lpsearch.errors import ModelError, PlanError, StudyError
from lpsearch.front_file import load_front_file
from lpsearch.kinds import TextKind
from lpsearch.plan import find_recovered_weights, load_plan, parse_plan, save_plan
from lpsearch.recovery import read_recovery
from tests.commands.test_export import write_plan
from tests.hostile import FRONT, PLAN

RECOVERY = {
    "method": "refit",
    "data": ["../secret.txt", "/etc/passwd"],
    "num_tokens": 10,
    "seconds": 1.0,
    "settings": {"weights": "../secret.safetensors", "file": "/etc/passwd"},
    "fingerprint": "aa-bb",
    "dtype": "float32",
    "device": "cpu",
}


def write_document(path: Path, change: Callable[[dict[str, Any]], None], base: dict[str, Any] = PLAN) -> Path:
    document = json.loads(json.dumps(base))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def write_recovered(directory: Path) -> Path:
    """Write a plan whose weights were repaired, and which names files wherever it may."""
    return write_document(directory / "plan.json", lambda document: document["provenance"].update(recovery=RECOVERY))


@pytest.fixture
def place(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in a directory that has models and texts within it and beside it."""
    for name in ("model", "here/model", "here/owner/model"):
        shutil.copytree(tiny_model_dir, tmp_path / name)
    for name in ("secret.txt", "here/secret.txt"):
        (tmp_path / name).write_text("a secret\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "here"


# ---- The model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../model", "./model", "model", "owner/model", "owner/../model", "~/model"])
def test_a_model_named_by_a_relative_path_is_refused(place: Path, name: str) -> None:
    path = write_document(place / "plan.json", lambda document: document["model"].update(id=name, revision=None))
    with pytest.raises(PlanError, match="a plan names a local model by its whole path"):
        resolve_source_of_plan(load_plan(path), None)


def test_a_relative_path_to_no_model_is_refused(place: Path) -> None:
    path = write_document(place / "plan.json", lambda document: document["model"].update(id="../here", revision=None))
    with pytest.raises(ModelError, match=r"config\.json"):
        resolve_source_of_plan(load_plan(path), None)


@pytest.mark.parametrize("link", ["link", "model/../link"])
def test_a_link_to_another_model_is_no_stand_in(
    place: Path, tiny_model_dir: Path, link: str, build_other_model: Path
) -> None:
    """A whole path is followed as if it had been typed, links and all; the fingerprint says what is there."""
    import torch

    (place / "link").symlink_to(build_other_model)
    write_plan(tiny_model_dir, place / "valid.json")
    valid = json.loads((place / "valid.json").read_text(encoding="utf-8"))
    path = write_document(
        place / "plan.json", lambda document: document["model"].update(id=str(place / link)), base=valid
    )
    with pytest.raises(PlanError, match="fingerprint"):
        load_model_of_plan(
            load_plan(path), model=None, device=torch.device("cpu"), dtype=torch.float32, trust_remote_code=False
        )


@pytest.fixture
def build_other_model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """Write a model of the same shape with other weights."""
    import torch
    from transformers import LlamaForCausalLM

    directory = tmp_path / "other"
    shutil.copytree(tiny_model_dir, directory)
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(directory)
    return directory


# ---- The texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret.txt", "secret.txt", "./secret.txt", "~/secret.txt", "../here/secret.txt"])
def test_a_text_named_by_a_relative_path_is_refused(place: Path, name: str) -> None:
    with pytest.raises(PlanError, match="a plan names a file by its whole path: name the text with --data"):
        check_texts_of_plan([TextKind("self"), TextKind("wikitext2"), TextKind(name)])


def test_texts_named_in_full_are_read_as_if_they_had_been_typed(place: Path) -> None:
    check_texts_of_plan([TextKind("self"), TextKind("owner/dataset"), TextKind(str(place / "secret.txt"))])


# ---- The weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["weights", "path", "file"])
@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd"])
def test_no_field_says_where_the_weights_are(field: str, name: str) -> None:
    document = json.loads(json.dumps(PLAN))
    document["provenance"]["recovery"] = {**RECOVERY, field: name}
    with pytest.raises(PlanError, match=field):
        parse_plan(document)
    document["provenance"]["recovery"] = RECOVERY
    with pytest.raises(PlanError, match=field):
        parse_plan({**document, field: name})


def test_repaired_weights_are_those_beside_the_plan_whatever_it_says(place: Path) -> None:
    (place.parent / "secret.safetensors").write_bytes(b"not these")
    path = write_recovered(place)
    with pytest.raises(PlanError, match=r"no recovered\.safetensors beside it"):
        find_recovered_weights(load_plan(path), path)
    (place / "recovered.safetensors").write_bytes(b"these")
    assert find_recovered_weights(load_plan(path), path) == place / "recovered.safetensors"


def test_a_link_in_the_place_of_the_weights_shows_nothing_of_another_file(place: Path, tiny_model_dir: Path) -> None:
    from transformers import LlamaForCausalLM

    write_plan(tiny_model_dir, place / "valid.json")
    valid = json.loads((place / "valid.json").read_text(encoding="utf-8"))
    path = write_document(
        place / "plan.json", lambda document: document["provenance"].update(recovery=RECOVERY), base=valid
    )
    (place / "recovered.safetensors").symlink_to(place.parent / "secret.txt")
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    with pytest.raises(ModelError, match="is damaged") as caught:
        read_recovery(model, load_plan(path), path)
    assert "a secret" not in str(caught.value)


def test_a_link_in_the_place_of_a_plan_is_replaced_and_not_written_through(place: Path) -> None:
    plan = load_plan(write_document(place / "valid.json", lambda document: None))
    (place / "plan.json").symlink_to(place.parent / "secret.txt")
    save_plan(plan, place / "plan.json")
    assert not (place / "plan.json").is_symlink()
    assert (place.parent / "secret.txt").read_text(encoding="utf-8") == "a secret\n"


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
