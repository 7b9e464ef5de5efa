"""A process that has imported everything, and forks children that kill themselves at a chosen moment.

A moment is a step: before or after an SQL statement, before a commit, or before what changes files (opening one,
renaming ...), all in the child's main thread. Which moment that is depends on no clock. The signal is SIGKILL:
the child does nothing more, and nothing is cleaned up.

Most of a child's time would be imports. So what a child that ends well has imported, the process imports too, for the
children to come; what happens during an import is no step.

Run as ``python -m tests.faults.nursery``; it reads requests, one JSON object a line, and answers each in one line.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from sqlalchemy import Engine, event


def run_study_once(*, url: str, budget: int, sampler: str = "pairset", lease_s: float = 60.0) -> None:
    """Search ten layers by a formula."""
    from lpsearch.search import PlanSpace, StudyStore, run_study
    from tests.search.evaluators import SyntheticEvaluator

    with StudyStore(url, study_name="demo", lease_s=lease_s) as store:
        evaluator = SyntheticEvaluator(10, num_windows=16)
        run_study(evaluator=evaluator, space=PlanSpace(10), budget=budget, store=store, sampler=sampler, seed=3)


def run_command(*, arguments: list[str]) -> None:
    """Run ``lpsearch ARGUMENTS``."""
    from lpsearch.commands.app import main

    main(arguments)


_TASKS: dict[str, Callable[..., None]] = {"study": run_study_once, "command": run_command}


class _Steps:
    """Counts steps, and ends the process at one of them.

    Args:
        kill_at: number of the step before which the process kills itself; None lets it end.
        function: ``module:name`` or ``module:class.name`` of the function at whose first call the counting begins; None
            counts from the start.
    """

    _FILE_EVENTS = frozenset(
        {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "sqlite3.connect"}
    )

    def __init__(self, kill_at: int | None, function: str | None) -> None:
        self.count = 0
        self._kill_at = kill_at
        self._is_counting = function is None
        if function is not None:
            module_name, _, name = function.partition(":")
            owner_name, _, name = name.rpartition(".")
            owner: Any = importlib.import_module(module_name)
            owner = getattr(owner, owner_name) if owner_name else owner
            setattr(owner, name, self._wrap(getattr(owner, name)))
        for name in ("before_cursor_execute", "after_cursor_execute", "commit"):
            event.listen(Engine, name, lambda *args: self._step())
        sys.addaudithook(lambda name, args: self._step() if name in self._FILE_EVENTS else None)

    def _wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._is_counting = True
            try:
                return function(*args, **kwargs)
            finally:
                self._is_counting = False

        return call

    def _step(self) -> None:
        if not self._is_counting or threading.current_thread() is not threading.main_thread() or _is_importing():
            return
        self.count += 1
        if self.count == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def _is_importing() -> bool:
    """Say whether the caller runs within an import."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _run_child(request: dict[str, Any], results: int) -> int:
    with Path(request["log"]).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    steps = _Steps(request["kill_at"], request["function"])
    code = 0
    try:
        _TASKS[request["task"]](**request["options"])
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 70
    with os.fdopen(results, "w") as answers:
        json.dump({"num_steps": steps.count, "modules": list(sys.modules)}, answers)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _import_too(names: Iterable[str]) -> None:
    """Import what a child has imported."""
    for name in names:
        if name not in sys.modules:
            with contextlib.suppress(Exception):  # some names are no modules of their own
                importlib.import_module(name)


def main() -> None:
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os._exit(_run_child(json.loads(line), writing))
        os.close(writing)
        with os.fdopen(reading) as results:
            answer = json.loads(results.read() or '{"num_steps": 0, "modules": []}')
        _, status = os.waitpid(child, 0)
        _import_too(answer["modules"])
        code = os.waitstatus_to_exitcode(status)
        sys.stdout.write(json.dumps({"code": code, "num_steps": answer["num_steps"]}) + "\n")
        sys.stdout.flush()
    os._exit(0)  # tidying up so many modules takes seconds


class Nursery:
    """Runs tasks in children of a process that has imported everything.

    Args:
        directory: where their output is logged.
    """

    def __init__(self, directory: Path) -> None:
        self.log = directory / "children.log"
        self.log.touch()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )

    def run(self, task: str, *, kill_at: int | None = None, function: str | None = None, **options: Any) -> int:
        """Run a task in a child, which must end well if it is not killed.

        Args:
            task: ``study`` or ``command``.
            kill_at: step before which it kills itself; None lets it end.
            function: ``module:name`` of the function in which steps are counted; None counts all.
            options: of the task.

        Returns:
            The number of steps; 0 where it was killed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"task": task, "options": options, "kill_at": kill_at, "function": function, "log": str(self.log)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        expected = 0 if kill_at is None else -signal.SIGKILL
        assert answer["code"] == expected, self.log.read_text(errors="replace")[-4000:]
        return int(answer["num_steps"])

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


if __name__ == "__main__":
    main()
