"""Fixtures that several test packages use: a tiny model directory, a text file, a study of a model, a browser."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browsing import CHROMIUM, STUDIED_MODELS
from tests.servers import MariaDB, Postgres, Server, run_server
from tests.warm import WarmContext, run_warm

# One thread a process, here and in the ranks that tests start: on busy cores more threads starve one another, and ranks
# that talk over gloo then wait too long for each other. Read when torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# As the commands do: the libraries' objects are many and stay, and looking through them again and again takes long.
gc.set_threshold(20_000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs more CUDA devices than there are, with the reason."""
    needed = {"gpu": 1, "multi_gpu": 2}
    marked = [(item, count) for item in items for name, count in needed.items() if item.get_closest_marker(name)]
    if not marked:
        return
    import torch

    present = torch.cuda.device_count()
    for item, count in marked:
        if present < count:
            item.add_marker(pytest.mark.skip(reason=f"needs {count} CUDA devices, {present} present"))


@pytest.fixture
def warm_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the workers and the ranks of this process begin with everything imported; elsewhere they import it."""
    import torch

    for module in (multiprocessing, torch.multiprocessing):
        get_context = module.get_context
        monkeypatch.setattr(
            module,
            "get_context",
            lambda method=None, *, get=get_context: WarmContext() if method == "spawn" else get(method),
        )


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a saved six-layer Llama with a byte-level tokenizer: everything a command needs of a model."""
    from tests.export.byte_tokenizer import write_character_tokenizer
    from tests.tiny_models import build_tiny_model

    directory = tmp_path_factory.mktemp("tiny-llama")
    build_tiny_model("llama", vocab_size=512).save_pretrained(directory)
    write_character_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a text of about 20,000 characters without repetition."""
    path = tmp_path_factory.mktemp("text") / "squares.txt"
    path.write_text(" ".join(f"The square of {i} is {i * i}." for i in range(800)), encoding="utf-8")
    return path


_SEARCH_WITH_BRIEF_TIMING = """
import sys
from lpsearch.commands.app import main
from lpsearch.latency import measure_or_reuse_profile
measure_or_reuse_profile.__kwdefaults__["budget_s"] = 1.0  # as `lpsearch profile --seconds 1`
main(sys.argv[1:])
"""


@pytest.fixture(scope="session", params=STUDIED_MODELS)
def searched_study(
    request: pytest.FixtureRequest, tiny_model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """Search a model that really runs, with its latency measured here; return the study's directory and its front."""
    out = tmp_path_factory.mktemp("study") / "of a model"
    if request.param == "tiny":
        options = ["--model", tiny_model_dir, "--budget", 13]
    else:
        options = ["--model", request.param, "--budget", 14, "--freeze", "0-20"]
    done = run_warm(
        *("optimize", *options, "--data", text_file, "--out", out),
        *("--windows", 3, "--seq-len", 24, "--dtype", "float32", "--device", "cpu", "--quiet"),
        code=_SEARCH_WITH_BRIEF_TIMING,
    )
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout.splitlines()[-1])["front"]


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """Return a running PostgreSQL."""
    with run_server(Postgres) as server:
        yield server


@pytest.fixture(scope="session")
def mariadb() -> Iterator[Server]:
    """Return a running MariaDB."""
    with run_server(MariaDB) as server:
        yield server


@pytest.fixture
def postgres_url(postgres: Server) -> str:
    """Return the URL of an empty database of PostgreSQL."""
    return postgres.create_database()


@pytest.fixture(params=["postgres", "mariadb"])
def server_url(request: pytest.FixtureRequest) -> str:
    """Return the URL of an empty database of each kind of server."""
    server: Server = request.getfixturevalue(request.param)
    return server.create_database()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Return a running Chromium; without one, the test is skipped."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()
