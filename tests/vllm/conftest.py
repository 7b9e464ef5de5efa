"""Where the exported directories are, and vLLM in processes that never outlive a test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

EXPORTS_VARIABLE = "LPSEARCH_VLLM_EXPORTS"
REPOSITORY = Path(__file__).parents[2]
ROUTES = ("plugin", "backend")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip these tests where vLLM or the directories are missing."""
    missing = None
    if find_spec("vllm") is None:
        missing = "vLLM is not installed in this environment; `make test-vllm` makes one"
    elif EXPORTS_VARIABLE not in os.environ:
        missing = f"{EXPORTS_VARIABLE} names no exported directories; `make test-vllm` writes them"
    if missing is not None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(scope="session")
def exports() -> Path:
    """Return where `tests.vllm.prepare` wrote."""
    return Path(os.environ[EXPORTS_VARIABLE])


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """Return a function from a route and a number of ranks to the environment of a vLLM process."""
    modules = tmp_path_factory.mktemp("remote-code")

    def build(route: str, *, num_ranks: int = 1) -> dict[str, str]:
        variables = dict(os.environ) | {
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(modules),
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
        }
        variables.pop("VLLM_PLUGINS", None)
        if route == "backend":
            variables["VLLM_PLUGINS"] = ""  # no plugin at all
        if num_ranks > 1:
            cores = sorted(os.sched_getaffinity(0))
            if len(cores) < num_ranks:
                pytest.skip(f"needs {num_ranks} cores, one a rank; {len(cores)} present")
            variables["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(core) for core in cores[:num_ranks])
        return variables

    return build


@contextmanager
def running(command: Sequence[str], *, log: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a process group of its own, of which nothing is left at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            for stop, patience_s in ((signal.SIGTERM, 30), (signal.SIGKILL, 10)):
                try:
                    os.killpg(process.pid, stop)
                except ProcessLookupError:
                    break
                try:
                    process.wait(timeout=patience_s)
                except subprocess.TimeoutExpired:
                    continue
            process.wait(timeout=10)


@pytest.fixture(scope="session")
def serve(
    exports: Path, environment: Callable[..., dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """Return a function that serves directories in a process of its own, and remembers what came of it."""
    served: dict[tuple[object, ...], dict[str, Any]] = {}

    def run(names: Sequence[str], *, route: str, num_ranks: int = 1, timeout_s: float = 400) -> dict[str, Any]:
        key = (tuple(names), route, num_ranks)
        if key not in served:
            folder = tmp_path_factory.mktemp("serve")
            request, result, log = (folder / name for name in ("request.json", "result.json", "log.txt"))
            request.write_text(
                json.dumps(
                    {
                        "root": str(exports),
                        "names": list(names),
                        "num_ranks": num_ranks,
                        "trust_remote_code": route == "backend",
                    }
                ),
                encoding="utf-8",
            )
            command = [sys.executable, "-m", "tests.vllm.serve", str(request), str(result)]
            with running(command, log=log, env=environment(route, num_ranks=num_ranks)) as process:
                try:
                    code: int | None = process.wait(timeout=timeout_s)
                except subprocess.TimeoutExpired:
                    code = None
            results = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
            tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
            what = f"exit code {code}" if code is not None else f"no end within {timeout_s} s"
            served[key] = {name: results.get(name, {"error": f"{what}\n{tail}"}) for name in names}
        return served[key]

    return run
