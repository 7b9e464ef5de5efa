"""An evaluator for worker processes: a formula, what to do instead at some joins, and a log that tests can read."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from lpsearch.errors import DataError
from lpsearch.evaluation.losses import WindowLosses
from lpsearch.plan import Plan
from lpsearch.search.workers import BuildEvaluators
from tests.search.evaluators import SyntheticEvaluator

NUM_LAYERS = 10
PATIENCE_S = 60.0


class ScriptedEvaluator:
    """Evaluates like :class:`SyntheticEvaluator`, but at some joins does something else first.

    What it may do: ``wait`` until :func:`release` was called, ``error``, ``refuse`` the input, ``die``, ``die once`` or
    ``die in PLACE``, where the worker's environment names the place.

    Args:
        directory: where it logs.
        rules: what to do, by join.
        num_windows: of the synthetic evaluator.
        delay_s: of every evaluation.
    """

    def __init__(self, directory: Path, rules: Mapping[int, str], num_windows: int = 4, delay_s: float = 0.0) -> None:
        self._evaluator = SyntheticEvaluator(NUM_LAYERS, num_windows=num_windows, delay_s=delay_s)
        self._directory = directory
        self._rules = rules
        self.num_windows = num_windows

    def evaluate_windows(self, plan: Plan, window_indices: Sequence[int]) -> WindowLosses:
        self._log(f"{plan.key} began")
        for join in plan.joins:
            self._act(self._rules.get(join, ""))
        losses = self._evaluator.evaluate_windows(plan, window_indices)
        self._log(f"{plan.key} ended")
        return losses

    def _act(self, rule: str) -> None:
        if rule == "wait":
            deadline = time.monotonic() + PATIENCE_S
            while not (self._directory / "released").exists() and time.monotonic() < deadline:
                time.sleep(0.005)
        elif rule == "error":
            raise KeyError("missing")
        elif rule == "refuse":
            raise DataError("too little text")
        elif rule == "die" or (rule == f"die in {os.environ.get('LPSEARCH_TEST_PLACE')}"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif rule == "die once":
            try:
                (self._directory / "died").touch(exist_ok=False)
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

    def _log(self, line: str) -> None:
        with (self._directory / "log").open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {line}\n")


def build(directory: Path, rules: Mapping[int, str], **options: float) -> dict[str, ScriptedEvaluator]:
    """Build what a worker evaluates with; ``other`` has more windows."""
    first = ScriptedEvaluator(directory, rules, **options)  # type: ignore[arg-type]
    return {"first": first, "other": ScriptedEvaluator(directory, {}, num_windows=first.num_windows + 1)}


def fail_to_build(message: str) -> dict[str, ScriptedEvaluator]:
    """Fail, as a model that does not load."""
    raise RuntimeError(message)


def refuse_to_build(message: str) -> dict[str, ScriptedEvaluator]:
    """Refuse, as a model that is not there."""
    raise DataError(message)


def make_builder(directory: Path, rules: Mapping[int, str] | None = None, **options: float) -> BuildEvaluators:
    """Return what builds these evaluators in a worker."""
    return partial(build, directory, rules or {}, **options)


def release(directory: Path) -> None:
    """Let evaluations that wait go on."""
    (directory / "released").touch()


def read_log(directory: Path) -> list[tuple[int, Plan, str]]:
    """Return what evaluations began and ended: processes, plans, and which of the two."""
    path = directory / "log"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [(int(pid), Plan.from_key(key), what) for pid, key, what in (line.rsplit(maxsplit=2) for line in lines)]


def await_log(directory: Path, plan: Plan, what: str = "began", count: int = 1) -> list[int]:
    """Wait until the log says something of a plan so often, and return the processes that said it."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        pids = [pid for pid, logged, said in read_log(directory) if (logged, said) == (plan, what)]
        if len(pids) >= count:
            return pids
        time.sleep(0.01)
    raise AssertionError(f"{plan.key} {what} fewer than {count} times")
