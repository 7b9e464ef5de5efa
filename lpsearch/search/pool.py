"""Where plans are evaluated: a pool of slots, each of which evaluates one plan at a time."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, Self

from lpsearch.evaluation.losses import PlanEvaluator, WindowLosses
from lpsearch.plan import Plan

__all__ = ["Pool", "ThreadPool"]


class Pool(Protocol):
    """Evaluates plans somewhere else than in the caller's thread. Use it as a context manager."""

    @property
    def num_slots(self) -> int:
        """Number of evaluations that run at the same time."""

    @property
    def num_windows(self) -> int:
        """Number of windows that ``window_indices`` may name."""

    def submit(self, plan: Plan, window_indices: Sequence[int]) -> Future[WindowLosses]:
        """Begin to evaluate a plan on some of the windows, after what was submitted before if no slot is free.

        Args:
            plan: the plan.
            window_indices: which windows, each in ``[0, num_windows)``.

        Returns:
            One loss a window, in the order of ``window_indices``, or what the evaluation raised.
        """

    def close(self) -> None:
        """Wait for what runs, and take no more."""

    def __enter__(self) -> Self:
        """Return the pool."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the pool; what runs is interrupted first if the block failed."""


class ThreadPool:
    """One slot: a thread beside the caller's, so that the device works while the caller does the books.

    Python raises Ctrl-C in the main thread only. A block that is left by an error therefore interrupts the thread too,
    and waits until it has unwound: nothing is still at work on a model when the block is over.

    Args:
        evaluator: evaluates the plans, in that thread alone.
    """

    num_slots = 1

    def __init__(self, evaluator: PlanEvaluator) -> None:
        self._evaluator = evaluator
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lpsearch-evaluator")
        self._guard = threading.Lock()
        self._busy_thread_id: int | None = None

    @property
    def num_windows(self) -> int:
        """Number of windows of the evaluator."""
        return self._evaluator.num_windows

    def submit(self, plan: Plan, window_indices: Sequence[int]) -> Future[WindowLosses]:
        """Evaluate a plan after those submitted before it."""
        return self._executor.submit(self._evaluate, plan, window_indices)

    def close(self) -> None:
        """Wait for what runs, and take no more."""
        self._executor.shutdown()

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in the evaluation that is running, if one is, between two of its bytecodes."""
        with self._guard:
            if self._busy_thread_id is not None:
                _set_exception(self._busy_thread_id, KeyboardInterrupt)

    def __enter__(self) -> Self:
        """Return the pool."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the pool; what runs is interrupted first, and what waits is dropped, if the block failed."""
        if error is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self.interrupt()
        self.close()

    def _evaluate(self, plan: Plan, window_indices: Sequence[int]) -> WindowLosses:
        with self._guard:
            self._busy_thread_id = threading.get_ident()
        try:
            return self._evaluator.evaluate_windows(plan, window_indices)
        finally:
            with self._guard:
                self._busy_thread_id = None
                _set_exception(threading.get_ident(), None)  # one that came too late must not hit the pool's own code


def _set_exception(thread_id: int, kind: type[BaseException] | None) -> None:
    """Have a thread raise an exception as soon as it runs Python code, or take that back."""
    target = ctypes.py_object() if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), target)
