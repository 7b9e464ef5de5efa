"""Every kind of pool, made alike, for tests that all of them must pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lpsearch.search import ThreadPool
from lpsearch.search.workers import BuildEvaluators, LocalLauncher, RayLauncher, WorkerPool

POOLS: dict[str, Callable[[BuildEvaluators], AbstractContextManager[Any]]] = {
    "thread": lambda build: ThreadPool(build()["first"]),
    "local": lambda build: make_worker_pool("local", build, num_workers=1),
    "ray": lambda build: make_worker_pool("ray", build, num_workers=1),
}


def make_worker_pool(kind: str, build: BuildEvaluators, *, num_workers: int) -> WorkerPool:
    """Make a pool of workers of a kind; with Ray, this process has joined a cluster."""
    if kind == "local":
        places = [{"LPSEARCH_TEST_PLACE": str(index)} for index in range(num_workers)]
        return WorkerPool(LocalLauncher(build, num_workers=num_workers, environments=places))
    return WorkerPool(RayLauncher(build, num_workers=num_workers))
