"""Ctrl-C while a study's database is written: it waits until nothing is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["hold_back_interrupts", "let_interrupts_through"]

_SIGNALS: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)

_Handler = Callable[[int, FrameType | None], object]


class _HeldBack:
    """The signals of a block in which they are held back.

    Attributes:
        is_open: whether the block waits, so that a signal may end it at once.

    Args:
        handlers: what handles each signal outside the block.
    """

    def __init__(self, handlers: dict[int, _Handler]) -> None:
        self._handlers = handlers
        self._pending: list[int] = []
        self.is_open = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Take note of the first signal; hand on the second, and every one while the block waits."""
        if self.is_open or self._pending:
            self._pending.clear()
            self._handlers[number](number, frame)
        else:
            self._pending.append(number)

    def hand_on(self) -> None:
        """Hand on what was held back; raises what the signal's handler does."""
        if self._pending:
            number = self._pending.pop()
            self._handlers[number](number, None)


_held_back: _HeldBack | None = None
"""Of the main thread, the only one in which Python handles signals."""


@contextmanager
def hold_back_interrupts() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back during a block, but for the parts in :func:`let_interrupts_through`.

    Python handles a signal between any two bytecodes, also between the beginning of a transaction and the line that
    would end it. After KeyboardInterrupt the transaction then keeps its lock on the database for as long as the
    traceback lives. A second signal is handled at once. Nothing is held back in another thread than the main one, where
    no function of Python handles the signal, or within another such block.
    """
    global _held_back
    if threading.current_thread() is not threading.main_thread() or _held_back is not None:
        yield
        return
    found = {number: signal.getsignal(number) for number in _SIGNALS}
    handlers = {number: handler for number, handler in found.items() if callable(handler)}
    held_back = _held_back = _HeldBack(handlers)
    for number in handlers:
        signal.signal(number, held_back.handle)
    try:
        yield
    finally:
        _held_back = None
        for number, handler in handlers.items():
            signal.signal(number, handler)
        held_back.hand_on()


@contextmanager
def let_interrupts_through() -> Iterator[None]:
    """Let a signal end a block that waits and has nothing half done, whether it came before or comes now."""
    held_back = _held_back if threading.current_thread() is threading.main_thread() else None
    if held_back is None:
        yield
        return
    held_back.is_open = True
    try:
        held_back.hand_on()
        yield
    finally:
        held_back.is_open = False
