"""Evaluation in processes of their own: on the GPUs of this machine, or as Ray actors on many."""

from __future__ import annotations

from lpsearch.search.workers.evaluating import BuildEvaluators, WorkerReport
from lpsearch.search.workers.local import LocalLauncher
from lpsearch.search.workers.pool import Launcher, Worker, WorkerPool
from lpsearch.search.workers.ray_actors import RayLauncher

__all__ = [
    "BuildEvaluators",
    "Launcher",
    "LocalLauncher",
    "RayLauncher",
    "Worker",
    "WorkerPool",
    "WorkerReport",
]
