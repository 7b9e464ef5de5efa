"""Where evaluations run while the coordinator does its books: behind :class:`concurrent.futures.Executor`."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from types import TracebackType
from typing import ParamSpec, TypeVar

__all__ = ["WorkerThread"]

P = ParamSpec("P")
T = TypeVar("T")


class WorkerThread(Executor):
    """Runs what is submitted in one thread, in order.

    Python raises Ctrl-C in the main thread only. A block that is left by an error therefore interrupts the thread too,
    and waits until it has unwound: nothing is still at work on a model when the block is over.
    """

    def __init__(self) -> None:
        """Make the executor; its thread starts with the first submission."""
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lpsearch-evaluator")
        self._guard = threading.Lock()
        self._busy_thread_id: int | None = None

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function after those submitted before it."""
        return self._pool.submit(self._run, function, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work; see :class:`concurrent.futures.Executor`."""
        self._pool.shutdown(wait=wait, cancel_futures=cancel_futures)

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in the function that is running, if one is, between two of its bytecodes."""
        with self._guard:
            if self._busy_thread_id is not None:
                _set_exception(self._busy_thread_id, KeyboardInterrupt)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the thread, which is interrupted first if the block failed."""
        if error is not None:
            self.shutdown(wait=False, cancel_futures=True)
            self.interrupt()
        self.shutdown()

    def _run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._guard:
            self._busy_thread_id = threading.get_ident()
        try:
            return function(*args, **kwargs)
        finally:
            with self._guard:
                self._busy_thread_id = None
                _set_exception(threading.get_ident(), None)  # one that came too late must not hit the pool's own code


def _set_exception(thread_id: int, kind: type[BaseException] | None) -> None:
    """Have a thread raise an exception as soon as it runs Python code, or take that back."""
    target = ctypes.py_object() if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), target)
