"""The hub: working, gated, missing, unreachable.

Each load runs in a process of its own, since the hub client reads its settings once.
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
from collections.abc import Iterator
from pathlib import Path

import pytest

from lpsearch.models.hub import call_within
from tests.models.fake_hub import COMMIT, serve

LIMIT_S = 15.0

LOAD = """
import json, sys, time
import torch
from lpsearch.errors import LpsearchError
from lpsearch.models import load_model, resolve_source
start = time.monotonic()
answer = {}
try:
    loaded = load_model(resolve_source(sys.argv[1], revision=sys.argv[2] or None), device="cpu", dtype=torch.float32)
    answer = {"revision": loaded.identity.revision, "source": loaded.source.to_dict(),
              "parameters": sum(p.numel() for p in loaded.model.parameters())}
except LpsearchError as error:
    answer = {"error": type(error).__name__, "message": str(error)}
print(json.dumps({**answer, "seconds": time.monotonic() - start}))
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


def load(spec: str, *, url: str, home: Path, revision: str = "", **environment: str) -> dict[str, object]:
    """Load a model in a new process with the hub at ``url``."""
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": "", "HF_HUB_DISABLE_TELEMETRY": "1"}
    process = subprocess.run(
        [sys.executable, "-c", LOAD, spec, revision],
        env={**os.environ, "HF_HUB_OFFLINE": "0", **settings, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert "Retrying" not in process.stderr, process.stderr
    answer: dict[str, object] = json.loads(process.stdout.splitlines()[-1])
    return answer


@pytest.fixture(scope="module")
def closed_url() -> str:
    """Return the address of a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_model_is_loaded_and_then_used_from_the_cache(hub_url: str, closed_url: str, tmp_path: Path) -> None:
    first = load("owner/tiny", url=hub_url, home=tmp_path)
    assert first["revision"] == COMMIT, first
    assert first["source"] == {"kind": "hub", "id": "owner/tiny", "revision": COMMIT, "path": None, "gguf_file": None}
    for revision in ("", COMMIT):
        again = load("owner/tiny", url=closed_url, home=tmp_path, revision=revision)
        assert again["parameters"] == first["parameters"]
        assert again["revision"] == COMMIT
    offline = load("owner/tiny", url=hub_url, home=tmp_path, HF_HUB_OFFLINE="1")
    assert offline["revision"] == COMMIT


@pytest.mark.parametrize(
    ("spec", "revision", "error", "says"),
    [
        ("owner/gated", "", "SourceError", "hf auth login"),
        ("owner/absent", "", "ModelError", "there is no model owner/absent"),
        ("owner/tiny", "v9", "ModelError", "no revision 'v9'"),
        ("owner/pickled", "", "ModelError", "only pytorch_model.bin"),
        ("owner/empty", "", "ModelError", "no config.json"),
    ],
)
def test_what_cannot_be_loaded_is_said(
    hub_url: str, tmp_path: Path, spec: str, revision: str, error: str, says: str
) -> None:
    answer = load(spec, url=hub_url, home=tmp_path, revision=revision)
    assert answer["error"] == error
    assert says in str(answer["message"])
    assert float(str(answer["seconds"])) < LIMIT_S


def test_an_unreachable_hub_ends_in_one_message(closed_url: str, tmp_path: Path) -> None:
    answer = load("llama2-13b", url=closed_url, home=tmp_path)
    assert answer["error"] == "SourceError"
    assert "check the network" in str(answer["message"])
    assert float(str(answer["seconds"])) < LIMIT_S


def test_a_hub_that_never_answers_ends_in_one_message(hub_url: str, tmp_path: Path) -> None:
    answer = load("owner/slow", url=hub_url, home=tmp_path)
    assert answer["error"] == "SourceError"
    assert "cannot be reached" in str(answer["message"])
    assert float(str(answer["seconds"])) < LIMIT_S


def test_offline_mode_is_named(hub_url: str, tmp_path: Path) -> None:
    answer = load("owner/tiny", url=hub_url, home=tmp_path, HF_HUB_OFFLINE="1")
    assert answer["error"] == "SourceError"
    assert "HF_HUB_OFFLINE" in str(answer["message"])


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
