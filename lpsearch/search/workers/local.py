"""Workers on this machine: new processes, each with the GPUs that it is given."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from lpsearch.evaluation.losses import WindowLosses
from lpsearch.search.workers.evaluating import (
    BuildEvaluators,
    EvaluatingProcess,
    WorkerFailedError,
    WorkerReport,
    pack_builder,
    read_losses,
    read_report,
    settle,
)

__all__ = ["LocalLauncher"]

_END_TIMEOUT_S = 10.0


class LocalLauncher:
    """Starts workers as new Python processes.

    Args:
        build: builds what each evaluates with.
        num_workers: how many there are.
        environments: of each, what to set in its environment before it imports anything, e.g. the GPUs that it sees;
            none changes nothing.
    """

    def __init__(
        self, build: BuildEvaluators, *, num_workers: int, environments: Sequence[Mapping[str, str]] = ()
    ) -> None:
        self._packed = pack_builder(build)
        self._num_workers = num_workers
        self._environments = environments

    def count_places(self) -> int:
        """Return how many workers there are to be."""
        return self._num_workers

    def start(self, index: int) -> _LocalWorker:
        """Start a worker, which then loads."""
        environment = self._environments[index % len(self._environments)] if self._environments else {}
        return _LocalWorker(self._packed, environment, name=f"lpsearch-worker-{index}")

    def close(self) -> None:
        """Hold nothing but the workers, which their pool ends."""


class _LocalWorker:
    """One process, and the thread that reads what it says."""

    def __init__(self, packed: bytes, environment: Mapping[str, str], *, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, packed, dict(environment)), name=name, daemon=True)
        self._process.start()
        theirs.close()
        self.ready: Future[WorkerReport] = Future()
        self._waiting: Future[WindowLosses] | None = None
        self._guard = threading.Lock()
        self._has_ended = False
        self._reader = threading.Thread(target=self._read, name=f"{name}-reader", daemon=True)
        self._reader.start()

    def submit(self, name: str, plan_key: str, window_indices: Sequence[int]) -> Future[WindowLosses]:
        """Evaluate a plan; nothing else may be running on this worker."""
        future: Future[WindowLosses] = Future()
        with self._guard:
            if self._has_ended:
                future.set_exception(WorkerFailedError(self._describe_end()))
                return future
            self._waiting = future
        try:
            self._connection.send((name, plan_key, list(window_indices)))
        except OSError:
            self._process.kill()  # the reader says what happened
        return future

    def end(self) -> None:
        """Kill the process, in which nothing is to be saved, and wait for it."""
        self._process.kill()
        self._process.join(_END_TIMEOUT_S)
        if threading.current_thread() is not self._reader:
            self._reader.join(_END_TIMEOUT_S)

    def _read(self) -> None:
        """Settle the futures by what the process says, until it ends."""
        try:
            answer = self._connection.recv()
            settle(self.ready, partial(read_report, answer))
            while True:
                answer = self._connection.recv()
                with self._guard:
                    future, self._waiting = self._waiting, None
                if future is not None:
                    settle(future, partial(read_losses, answer))
        except (EOFError, OSError):
            self._process.join(_END_TIMEOUT_S)
        with self._guard:
            self._has_ended = True
            future, self._waiting = self._waiting, None
        error = WorkerFailedError(self._describe_end())
        for unanswered in (self.ready, future):
            if unanswered is not None and not unanswered.done():
                settle(unanswered, partial(_raise, error))
        self._connection.close()

    def _describe_end(self) -> str:
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"process {self._process.pid} was ended by {signal.Signals(-code).name}"
        return f"process {self._process.pid} ended with exit code {code}"


def _raise(error: Exception) -> Any:
    raise error


def _serve(connection: Connection, packed: bytes, environment: Mapping[str, str]) -> None:
    """Evaluate what the coordinator asks for, until it or this process ends."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the coordinator, which decides
    threading.Thread(target=_end_with_parent, name="lpsearch-parent-watch", daemon=True).start()
    evaluating = EvaluatingProcess(packed)
    try:
        connection.send(evaluating.load())
        while True:
            connection.send(evaluating.evaluate(*connection.recv()))
    except (EOFError, OSError):
        return


def _end_with_parent() -> None:
    """End this process as soon as its coordinator has ended, however that was."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
