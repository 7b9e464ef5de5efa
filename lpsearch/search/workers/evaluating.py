"""What runs inside a worker, and what it says to its coordinator: plain numbers and words, and nothing large.

A worker builds its evaluators itself, once, and keeps them. What crosses to it is the key of a plan and the numbers of
windows; what comes back is one loss a window, or the type and the message of an error.
"""

from __future__ import annotations

import os
import pickle
import socket
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from lpsearch import errors
from lpsearch.errors import LpsearchError, UsageError, describe_error
from lpsearch.evaluation.losses import PlanEvaluator, WindowLosses
from lpsearch.plan import Plan

__all__ = [
    "Answer",
    "BuildEvaluators",
    "EvaluatingProcess",
    "WorkerFailedError",
    "WorkerReport",
    "pack_builder",
    "read_losses",
    "read_report",
    "settle",
]

BuildEvaluators = Callable[[], Mapping[str, PlanEvaluator]]
"""Builds what a worker evaluates with, by name; picklable, and importable where the worker runs."""

Answer = tuple[str, Any]
"""How a call ended, ``done``, ``refused`` or ``failed``, and what is said about it."""


class WorkerFailedError(Exception):
    """A worker that ended, or that could not do what any worker should; the plan may do well on another."""


@dataclass(frozen=True)
class WorkerReport:
    """What a worker says when it can evaluate.

    Attributes:
        num_windows: number of windows of each of its evaluators, by name; the first one is the search's own.
        host: name of its machine.
        pid: of its process there.
        device: what it evaluates on, as results record it.
    """

    num_windows: Mapping[str, int]
    host: str
    pid: int
    device: str


class EvaluatingProcess:
    """The evaluators of one worker, inside its process.

    Args:
        packed: what :func:`pack_builder` returned.
    """

    def __init__(self, packed: bytes) -> None:
        self._packed = packed
        self._evaluators: Mapping[str, PlanEvaluator] = {}

    def load(self) -> Answer:
        """Build the evaluators, which loads the model; answer with the fields of a report."""
        return _answer(self._load)

    def evaluate(self, name: str, plan_key: str, window_indices: list[int]) -> Answer:
        """Evaluate a plan on some windows; answer with the fields of its losses."""
        return _answer(lambda: self._evaluate(name, plan_key, window_indices))

    def _load(self) -> tuple[dict[str, int], str, int, str]:
        self._evaluators = pickle.loads(self._packed)()
        num_windows = {name: evaluator.num_windows for name, evaluator in self._evaluators.items()}
        first = next(iter(self._evaluators.values()))
        return num_windows, socket.gethostname(), os.getpid(), str(getattr(first, "device_name", "cpu"))

    def _evaluate(self, name: str, plan_key: str, window_indices: list[int]) -> tuple[Any, ...]:
        losses = self._evaluators[name].evaluate_windows(Plan.from_key(plan_key), window_indices)
        return losses.nll_nats_per_token, losses.kl_nats_per_token, losses.tokens_per_window


def pack_builder(build: BuildEvaluators) -> bytes:
    """Return what an :class:`EvaluatingProcess` unpacks once its environment is set."""
    return pickle.dumps(build)


def read_report(answer: Answer) -> WorkerReport:
    """Return the report of a worker.

    Raises:
        LpsearchError: as the worker raised it, if it refused.
        WorkerFailedError: if it failed.
    """
    return WorkerReport(*_read(answer))


def read_losses(answer: Answer) -> WindowLosses:
    """Return the losses that a worker answered with; raises as :func:`read_report` does."""
    return WindowLosses(*_read(answer))


def settle(future: Future[Any], read: Callable[[], Any]) -> None:
    """Give a future what ``read`` returns or raises, unless somebody has cancelled it."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(read())
    except Exception as error:
        future.set_exception(error)


def _answer(call: Callable[[], Any]) -> Answer:
    """Call, and say how it ended.

    What is wrong with the user's input would be so on every worker: it is refused, and no failure of this one.
    """
    try:
        return "done", call()
    except UsageError as error:
        return "refused", (type(error).__name__, str(error))
    except LpsearchError as error:
        return "failed", str(error)
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = f" in {frames[-1].name} of {os.path.basename(frames[-1].filename)}" if frames else ""  # noqa: PTH119
        return "failed", f"{type(error).__name__}{where}: {describe_error(error)}"


def _read(answer: Answer) -> Sequence[Any]:
    kind, said = answer
    if kind == "done":
        return said  # type: ignore[no-any-return]
    if kind == "refused":
        name, message = said
        known = getattr(errors, name, UsageError) if name in errors.__all__ else UsageError
        raise known(message)
    raise WorkerFailedError(said)
