"""A pool of workers: which plan goes to which of them, and what is done when one fails.

A thread of its own handles what happens, one event after another, so nothing here is shared. Plans begin in the order
in which they were submitted. Of several workers that are free, a plan goes to the one that lately ran the plan with
which it shares the longest beginning: that one holds the hidden states there (:mod:`lpsearch.evaluation.prefix_cache`).
No worker is kept waiting for a plan that would suit it better.

A worker that fails is started again and its plan is evaluated elsewhere; one that fails three times in a row is left
out, and the warning says why.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Protocol, Self

from lpsearch.errors import LpsearchError, UsageError
from lpsearch.evaluation.losses import WindowLosses
from lpsearch.plan import Plan
from lpsearch.search.workers.evaluating import WorkerReport, settle

__all__ = ["Launcher", "Worker", "WorkerPool"]

logger = logging.getLogger(__name__)

MAX_FAILURES_IN_A_ROW = 3
"""Failures without an evaluation between them after which a worker is left out."""

MAX_ATTEMPTS = 5
"""Workers that may fail on a plan before the plan is taken to be the reason."""

POLL_S = 1.0
"""Seconds between two looks at how many workers there may be."""

RECENT_PLANS = 16
"""Plans a worker is taken to hold hidden states of."""


class Worker(Protocol):
    """One process that evaluates one plan at a time.

    Attributes:
        ready: what it reports when it can evaluate, or what it failed with.
    """

    ready: Future[WorkerReport]

    def submit(self, name: str, plan_key: str, window_indices: Sequence[int]) -> Future[WindowLosses]:
        """Begin to evaluate a plan with one of its evaluators.

        Returns:
            The losses; a ``UsageError`` where the input is refused; any other error where the worker failed or ended.
        """

    def end(self) -> None:
        """End the process, whatever it does."""


class Launcher(Protocol):
    """Starts workers somewhere."""

    def count_places(self) -> int:
        """Return how many workers there may be now; machines may come and go."""

    def start(self, index: int) -> Worker:
        """Start the worker of a place, again where it failed; it then loads."""

    def close(self) -> None:
        """Release what the launcher holds; the workers have ended."""


@dataclass(eq=False)
class _Task:
    """A plan to evaluate."""

    name: str
    plan: Plan
    window_indices: tuple[int, ...]
    future: Future[WindowLosses] = field(default_factory=Future)
    failed_on: list[_Place] = field(default_factory=list)


@dataclass(eq=False)
class _Place:
    """Where a worker is, is being started again, or was left out.

    Attributes:
        index: its number.
        worker: the one that is there; None where it was left out.
        report: what that one said; None while it loads.
        task: what it evaluates; None while it is free.
        num_failures: since its last evaluation.
        recent: what it evaluated lately.
    """

    index: int
    worker: Worker | None = None
    report: WorkerReport | None = None
    task: _Task | None = None
    num_failures: int = 0
    recent: deque[tuple[str, Plan, frozenset[int]]] = field(default_factory=lambda: deque(maxlen=RECENT_PLANS))

    @property
    def is_free(self) -> bool:
        return self.worker is not None and self.report is not None and self.task is None

    def describe(self) -> str:
        if self.report is None:
            return f"worker {self.index}"
        return f"worker {self.index} (process {self.report.pid} on {self.report.host})"


class WorkerPool:
    """Evaluates plans on workers; a :class:`~lpsearch.search.pool.Pool`, used as a context manager.

    Entering it waits for the first worker; the others join as they have loaded, and ``num_slots`` grows.

    Args:
        launcher: starts the workers; it is closed with the pool.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._events: queue.SimpleQueue[partial[None]] = queue.SimpleQueue()
        self._waiting: deque[_Task] = deque()
        self._places: list[_Place] = []
        self._num_windows: dict[str, int] = {}
        self._has_worker: Future[None] = Future()
        self._has_failed: Exception | None = None
        self._is_closing = False
        self._is_aborted = False
        self._num_slots = 1
        self._thread = threading.Thread(target=self._run, name="lpsearch-pool", daemon=True)

    @property
    def num_slots(self) -> int:
        """Number of workers that can evaluate now, at least one."""
        return self._num_slots

    @property
    def num_windows(self) -> int:
        """Number of windows of the workers' first evaluator."""
        return next(iter(self._num_windows.values()))

    @property
    def reports(self) -> list[WorkerReport]:
        """What the workers said that can evaluate now."""
        return [place.report for place in tuple(self._places) if place.report is not None]

    def submit(self, plan: Plan, window_indices: Sequence[int]) -> Future[WindowLosses]:
        """Evaluate a plan with the workers' first evaluator."""
        return self._submit(next(iter(self._num_windows)), plan, window_indices)

    def view(self, name: str) -> PoolView:
        """Return the pool as one that evaluates with another of the workers' evaluators.

        Args:
            name: which of those that the workers built.
        """
        return PoolView(partial(self._submit, name), lambda: self._num_slots, self._num_windows[name])

    def close(self) -> None:
        """Wait for what was submitted, then end the workers."""
        self._is_closing = True
        self._events.put(partial(_do_nothing))
        if self._thread.is_alive():
            self._thread.join()

    def abort(self) -> None:
        """Drop what was submitted, and end the workers at once."""
        self._is_aborted = True
        self.close()

    def __enter__(self) -> Self:
        """Start the workers, and wait until the first can evaluate.

        Raises:
            LpsearchError: if none can.
        """
        self._thread.start()
        try:
            self._has_worker.result()
        except BaseException:
            self.abort()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the pool; the workers end at once if the block failed."""
        if error is None:
            self.close()
        else:
            self.abort()

    def _submit(self, name: str, plan: Plan, window_indices: Sequence[int]) -> Future[WindowLosses]:
        task = _Task(name, plan, tuple(window_indices))
        self._events.put(partial(self._take, task))
        return task.future

    # ---- In the pool's own thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._adjust()
            while not self._has_finished():
                try:
                    event = self._events.get(timeout=POLL_S)
                except queue.Empty:
                    event = partial(self._adjust)
                event()
                self._hand_out()
        except Exception as error:  # else whoever waits would wait for ever
            logger.exception("the pool of workers failed")
            self._give_up(error)
        finally:
            for place in self._places:
                if place.worker is not None:
                    place.worker.end()
            self._drop_all()
            self._launcher.close()

    def _has_finished(self) -> bool:
        if self._is_aborted:
            return True
        is_idle = not self._waiting and all(place.task is None for place in self._places) and self._events.empty()
        return self._is_closing and is_idle

    def _take(self, task: _Task) -> None:
        if self._has_failed is None:
            self._waiting.append(task)
        else:
            settle(task.future, partial(_raise, self._has_failed))

    def _hand_out(self) -> None:
        """Give what waits to the workers that are free."""
        free = [place for place in self._places if place.is_free]
        while free and self._waiting:
            task = self._waiting.popleft()
            # A worker that failed on this plan gets it again only if no other is free.
            place = max(free, key=lambda place: (place not in task.failed_on, _count_shared(task, place), -place.index))
            free.remove(place)
            place.task = task
            assert place.worker is not None
            future = place.worker.submit(task.name, task.plan.key, task.window_indices)
            future.add_done_callback(partial(self._queue, self._end_task, place, place.worker, task))
        self._num_slots = max(1, sum(place.report is not None for place in self._places))

    def _queue(self, handle: Callable[..., None], *arguments: object) -> None:
        """Have an event handled in the pool's thread; the last argument is the future that is done."""
        self._events.put(partial(handle, *arguments))

    def _adjust(self) -> None:
        """Start workers where machines joined, and forget those left out where a machine left."""
        num_places = self._launcher.count_places()
        for place in [place for place in self._places if place.worker is None][: len(self._places) - num_places]:
            self._places.remove(place)
        for _ in range(num_places - len(self._places)):
            taken = {place.index for place in self._places}
            place = _Place(min(set(range(len(taken) + 1)) - taken))
            self._places.append(place)
            self._start(place)
        if not num_places and not self._places:
            self._give_up(LpsearchError("there is no room for a worker; ask for fewer GPUs for each, or add a machine"))

    def _start(self, place: _Place) -> None:
        place.report, place.task = None, None
        place.recent.clear()
        place.worker = self._launcher.start(place.index)
        place.worker.ready.add_done_callback(partial(self._queue, self._welcome, place, place.worker))

    def _welcome(self, place: _Place, worker: Worker, ready: Future[WorkerReport]) -> None:
        """Take in a worker that has loaded, or has failed to."""
        if place.worker is not worker:
            return
        error = ready.exception()
        if error is None:
            report = ready.result()
            if self._num_windows and dict(report.num_windows) != self._num_windows:
                error = UsageError(f"it has {dict(report.num_windows)} windows, the others {self._num_windows}")
        if error is not None:
            self._fail(place, error)
            return
        others = {known.device for known in self.reports}
        place.report = report
        self._num_windows = dict(report.num_windows)
        logger.info("%s evaluates on %s", place.describe(), report.device)
        if others and report.device not in others:
            logger.warning(
                "%s evaluates on %s, others on %s: losses of one plan may differ between them by rounding",
                place.describe(),
                report.device,
                ", ".join(sorted(others)),
            )
        if not self._has_worker.done():
            self._hand_out()
            self._has_worker.set_result(None)

    def _end_task(self, place: _Place, worker: Worker, task: _Task, evaluated: Future[WindowLosses]) -> None:
        """Settle a plan that was evaluated, or have it evaluated elsewhere."""
        if place.worker is not worker:
            return
        error = evaluated.exception()
        if error is None or isinstance(error, UsageError):
            place.task, place.num_failures = None, 0
            place.recent.append((task.name, task.plan, frozenset(task.window_indices)))
            settle(task.future, evaluated.result)
            return
        task.failed_on.append(place)
        if len(task.failed_on) < MAX_ATTEMPTS:
            self._waiting.appendleft(task)
        else:
            message = f"{len(task.failed_on)} workers failed on plan {task.plan.key}; the last: {error}"
            settle(task.future, partial(_raise, LpsearchError(message)))
        self._fail(place, error)

    def _fail(self, place: _Place, error: BaseException) -> None:
        """Start a worker again, or leave it out."""
        described, worker = place.describe(), place.worker
        assert worker is not None
        place.worker, place.report, place.task = None, None, None
        worker.end()
        place.num_failures += 1
        if place.num_failures < MAX_FAILURES_IN_A_ROW and not isinstance(error, UsageError):
            logger.warning("%s failed and is started again: %s", described, error)
            self._start(place)
            return
        times = "three times in a row" if place.num_failures >= MAX_FAILURES_IN_A_ROW else "to load"
        logger.warning("%s failed %s and is left out: %s", described, times, error)
        if all(other.worker is None for other in self._places):
            kind = type(error) if isinstance(error, UsageError) else LpsearchError
            self._give_up(kind(f"every worker failed and was left out; the last: {error}"))

    def _give_up(self, error: Exception) -> None:
        """Fail everything that waits, now and later."""
        for place in self._places:
            if place.task is not None:
                self._waiting.append(place.task)
                place.task = None
        while self._waiting:
            settle(self._waiting.popleft().future, partial(_raise, error))
        if not self._has_worker.done():
            self._has_worker.set_exception(error)
        self._has_failed = error

    def _drop_all(self) -> None:
        """Cancel what nobody will evaluate any more."""
        dropped = [*self._waiting, *(place.task for place in self._places if place.task is not None)]
        with suppress(queue.Empty):
            while True:
                event = self._events.get_nowait()
                if event.func == self._take:
                    dropped += event.args
        for task in dropped:
            if task.future.cancel():
                task.future.set_running_or_notify_cancel()


class PoolView:
    """A pool whose workers evaluate with another evaluator; closing it closes nothing."""

    def __init__(
        self,
        submit: Callable[[Plan, Sequence[int]], Future[WindowLosses]],
        get_num_slots: Callable[[], int],
        num_windows: int,
    ) -> None:
        self._submit = submit
        self._get_num_slots = get_num_slots
        self.num_windows = num_windows

    @property
    def num_slots(self) -> int:
        """Number of workers that can evaluate now."""
        return self._get_num_slots()

    def submit(self, plan: Plan, window_indices: Sequence[int]) -> Future[WindowLosses]:
        """Evaluate a plan with this view's evaluator."""
        return self._submit(plan, window_indices)

    def close(self) -> None:
        """Leave the pool open."""

    def __enter__(self) -> Self:
        """Return the view."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the pool open."""


def _count_shared(task: _Task, place: _Place) -> int:
    """Return the layers of the longest beginning that a plan shares with one that a worker ran on the same windows."""
    windows = frozenset(task.window_indices)
    return max(
        (
            _count_shared_layers(task.plan, plan)
            for name, plan, seen in place.recent
            if name == task.name and not windows.isdisjoint(seen)
        ),
        default=0,
    )


def _count_shared_layers(plan: Plan, other: Plan) -> int:
    count = 0
    for group, other_group in zip(plan.running_groups, other.running_groups, strict=False):
        if group != other_group:
            break
        count += len(group)
    return count


def _do_nothing() -> None:
    """Wake the pool's thread."""


def _raise(error: Exception) -> WindowLosses:
    raise error
