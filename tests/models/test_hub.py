"""The hub: working, gated, missing, unreachable.

Loads with settings of their own run in a process of their own, since the hub client reads its settings once.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lpsearch.models.hub import call_within
from tests.models.fake_hub import COMMIT, serve

LIMIT_S = 15.0

LOAD = """
import json, sys, time
import torch
from lpsearch.errors import LpsearchError
from lpsearch.models import load_model, resolve_source

def load(spec, revision):
    start, told = time.monotonic(), []
    try:
        source = resolve_source(spec, revision=revision or None)
        loaded = load_model(source, device="cpu", dtype=torch.float32, on_download=lambda *bytes: told.append(bytes))
        answer = {"told": told, "revision": loaded.identity.revision, "source": loaded.source.to_dict(),
                  "parameters": sum(p.numel() for p in loaded.model.parameters())}
    except LpsearchError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    return {**answer, "seconds": time.monotonic() - start}

print(json.dumps([load(*wanted) for wanted in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def hub_url(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[str]:
    """Serve a working, a gated and a pickled model."""
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny_model_dir, root / "tiny")
    (root / "gated").mkdir()
    (root / "pickled").mkdir()
    (root / "pickled" / "config.json").write_text("{}")
    (root / "pickled" / "pytorch_model.bin").write_bytes(b"")
    (root / "empty").mkdir()
    with serving(root) as url:
        yield url


@contextmanager
def serving(root: Path) -> Iterator[str]:
    """Serve a hub while the block runs; yield its address."""
    release = threading.Event()
    server = serve(root, release)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    release.set()
    server.shutdown()
    thread.join()
    server.server_close()


def load(spec: str, *, url: str, home: Path, revision: str = "", **environment: str) -> dict[str, Any]:
    """Load a model in a new process with the hub at ``url``."""
    return load_all([(spec, revision)], url=url, home=home, **environment)[0]


def load_all(wanted: Sequence[tuple[str, str]], *, url: str, home: Path, **environment: str) -> list[dict[str, Any]]:
    """Load models, each given with its revision, one after another in a new process with the hub at ``url``."""
    return read_answers(start_loading(wanted, url=url, home=home, **environment))


def start_loading(
    wanted: Sequence[tuple[str, str]], *, url: str, home: Path, **environment: str
) -> subprocess.Popen[str]:
    """Start the process that loads models."""
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": "", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", LOAD, json.dumps(wanted)],
        env={**os.environ, "HF_HUB_OFFLINE": "0", **settings, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_answers(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Wait for a process that loads models, and return what it says of each."""
    with process:
        try:
            stdout, stderr = process.communicate(timeout=240)
        finally:
            process.kill()
    assert process.returncode == 0, stderr
    assert "Retrying" not in stderr, stderr
    answers: list[dict[str, Any]] = json.loads(stdout.splitlines()[-1])
    return answers


@pytest.fixture(scope="module")
def closed_url() -> str:
    """Return the address of a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_model_is_loaded_and_then_used_from_the_cache(
    hub_url: str, closed_url: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    first = load("owner/tiny", url=hub_url, home=tmp_path)
    assert first["revision"] == COMMIT, first
    assert first["source"] == {"kind": "hub", "id": "owner/tiny", "revision": COMMIT, "path": None, "gguf_file": None}
    size = sum(file.stat().st_size for file in tiny_model_dir.iterdir())
    assert first["told"][-1] == [size, size], first["told"]
    assert [done for done, _ in first["told"]] == sorted(done for done, _ in first["told"])
    for again in load_all([("owner/tiny", ""), ("owner/tiny", COMMIT)], url=closed_url, home=tmp_path):
        assert again["parameters"] == first["parameters"]
        assert again["revision"] == COMMIT
        assert again["told"] == []
    offline, missing = load_all(
        [("owner/tiny", ""), ("owner/empty", "")], url=hub_url, home=tmp_path, HF_HUB_OFFLINE="1"
    )
    assert offline["revision"] == COMMIT
    assert missing["error"] == "SourceError"
    assert "HF_HUB_OFFLINE" in str(missing["message"])


def test_an_alias_without_a_known_commit_keeps_the_one_of_its_first_use(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The repository of such an alias is served from a hub of its own, under its own name."""
    root = tmp_path / "served"
    shutil.copytree(tiny_model_dir, root / "Qwen2.5-1.5B")
    cache = tmp_path / "cache"
    with serving(root) as url:
        first = load("qwen2.5-1.5b", url=url, home=tmp_path / "home", LPSEARCH_CACHE=str(cache))
    assert first["revision"] == COMMIT, first
    assert json.loads((cache / "commits.json").read_text())["Qwen/Qwen2.5-1.5B"]["commit"] == COMMIT
    with serving(tmp_path / "served") as url:
        again = load("qwen2.5-1.5b", url=url, home=tmp_path / "another", LPSEARCH_CACHE=str(cache))
    assert again["source"] == first["source"]
    table = subprocess.run(
        [sys.executable, "-m", "lpsearch", "models"],
        env={**os.environ, "LPSEARCH_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    entry = next(e for e in json.loads(table.stdout)["models"] if e["name"] == "qwen2.5-1.5b")
    assert (entry["revision"], entry["revision_from"]) == (COMMIT, "first use")
    assert f"{COMMIT[:10]}*" in table.stderr


REFUSED = {
    ("owner/gated", ""): ("SourceError", "hf auth login"),
    ("owner/absent", ""): ("ModelError", "there is no model owner/absent"),
    ("owner/tiny", "v9"): ("ModelError", "no revision 'v9'"),
    ("owner/pickled", ""): ("ModelError", "only pytorch_model.bin"),
    ("owner/empty", ""): ("ModelError", "no config.json"),
}


@pytest.fixture(scope="module")
def refusals(hub_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """Return what each of them is answered, all in one process since importing is what takes long."""
    answers = load_all([*REFUSED], url=hub_url, home=tmp_path_factory.mktemp("home"))
    return dict(zip(REFUSED, answers, strict=True))


@pytest.mark.parametrize("wanted", REFUSED, ids=" ".join)
def test_what_cannot_be_loaded_is_said(
    refusals: dict[tuple[str, str], dict[str, Any]], wanted: tuple[str, str]
) -> None:
    answer, (error, says) = refusals[wanted], REFUSED[wanted]
    assert answer["error"] == error
    assert says in answer["message"]
    assert answer["seconds"] < LIMIT_S


def test_a_hub_without_an_answer_ends_in_one_message(hub_url: str, closed_url: str, tmp_path: Path) -> None:
    """One that cannot be reached, and one that never answers; both at once, since they are waited for."""
    unreachable = start_loading([("llama2-13b", "")], url=closed_url, home=tmp_path / "unreachable")
    silent = start_loading([("owner/slow", "")], url=hub_url, home=tmp_path / "silent")
    for process, says in ((unreachable, "check the network"), (silent, "cannot be reached")):
        (answer,) = read_answers(process)
        assert answer["error"] == "SourceError"
        assert says in str(answer["message"])
        assert float(str(answer["seconds"])) < LIMIT_S


def test_call_within_passes_results_and_errors_and_gives_up() -> None:
    assert call_within(5.0, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        call_within(5.0, lambda: 1 // 0)
    done = threading.Event()
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"0\.05 seconds"):
        call_within(0.05, lambda: done.wait(30))
    done.set()
    assert time.monotonic() - start < 20
