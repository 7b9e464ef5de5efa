"""Processes that begin with everything imported: forks of a server that imports it once.

Imports take several seconds of a short command, and nearly all of its time. A start from nothing, ``python -m
lpsearch``, is tested in ``tests/test_package.py``, ``tests/commands/test_console.py`` and others. A fork runs the same
function, and is a process as that one is: it has an id, streams and an exit code of its own, and it takes signals.

Not for what libraries read from the environment when they are imported (``HF_HOME``, ``OMP_NUM_THREADS``).
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

__all__ = ["WarmContext", "WarmProcess", "end_all", "run_warm"]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preloaded"])


class WarmContext:
    """In place of the context ``spawn`` of multiprocessing: processes that begin with everything imported.

    As with ``spawn``, they begin in this process's directory with its environment as it is by then, and with what is
    passed to them pickled.
    """

    def Process(self, target: Callable[..., object], args: Sequence[object] = (), **options: Any) -> BaseProcess:
        return _CONTEXT.Process(target=_call, args=(dict(os.environ), str(Path.cwd()), target, tuple(args)), **options)

    def __getattr__(self, name: str) -> Any:
        """Return what this context leaves as it is: pipes, queues, locks."""
        return getattr(_CONTEXT, name)


class WarmProcess:
    """A process that runs ``lpsearch ARGUMENTS`` or a script; tests use it as they use :class:`subprocess.Popen`.

    Args:
        arguments: of the command, or of the script.
        code: the script; None runs ``lpsearch``.
        terminal: file descriptor of a terminal that becomes the three streams, and the process's own; None gives stdout
            and stderr to read.
        env: environment; None takes that of this process.
    """

    def __init__(
        self,
        *arguments: object,
        code: str | None = None,
        terminal: int | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        ends: list[Connection] = []
        if terminal is None:
            (reads_out, writes_out), (reads_err, writes_err) = (_CONTEXT.Pipe(duplex=False) for _ in range(2))
            self.stdout, self.stderr = (os.fdopen(os.dup(end.fileno())) for end in (reads_out, reads_err))
            ends = [writes_out, writes_err]
            for end in (reads_out, reads_err):
                end.close()
        else:
            ends = [Connection(os.dup(terminal))]
        words = [str(word) for word in arguments]
        environment = dict(os.environ if env is None else env)
        self._process = _CONTEXT.Process(target=_run, args=(words, code, ends, environment, str(Path.cwd())))
        self._process.start()
        for end in ends:
            end.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("lpsearch", timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        read: dict[str, str] = {}
        readers = [
            threading.Thread(target=lambda name=name: read.update({name: getattr(self, name).read()}), daemon=True)
            for name in ("stdout", "stderr")
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(timeout)
        self.wait(timeout)
        return read["stdout"], read["stderr"]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """End the process and close the streams."""
        self.kill()
        self._process.join()
        for name in ("stdout", "stderr"):
            if hasattr(self, name):
                getattr(self, name).close()


def run_warm(*arguments: object, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``lpsearch ARGUMENTS``, or a script, to its end."""
    process = WarmProcess(*arguments, code=code)
    try:
        stdout, stderr = process.communicate()
        return subprocess.CompletedProcess(list(map(str, arguments)), process.wait(), stdout, stderr)
    finally:
        process.close()


def end_all(processes: Sequence[WarmProcess], *, timeout: float) -> list[tuple[str, str]]:
    """Wait until processes have ended without an error; return what they wrote to stdout and stderr."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.close()
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def _call(environment: dict[str, str], cwd: str, target: Callable[..., object], args: tuple[object, ...]) -> None:
    """Do what a process of :class:`WarmContext` is for; this is the fork."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    target(*args)


def _run(words: list[str], code: str | None, ends: list[Connection], environment: dict[str, str], cwd: str) -> None:
    """Become what the process is to be; this is the fork."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, end in zip((1, 2) if len(ends) == 2 else (0, 1, 2), ends * 3, strict=False):
        os.dup2(end.fileno(), number)
    for end in ends:
        end.close()
    if len(ends) == 1:
        _take_terminal()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=stream is sys.stderr or stream.isatty())
    sys.argv = ["lpsearch" if code is None else "-c", *words]
    if code is None:
        from lpsearch.commands.app import main

        main(words)
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def _take_terminal() -> None:
    """Make the terminal on stdin the process's own, so that a typed ^C interrupts it."""
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115, the fork's own reads nothing
