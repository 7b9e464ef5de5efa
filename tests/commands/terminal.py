"""A process on a pseudo-terminal, and what stands on its screen."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.warm import WarmProcess

_TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


class Terminal:
    """A pseudo-terminal, and the process that may run on it."""

    def __init__(self, *, width: int, height: int) -> None:
        self.width = width
        self.process: subprocess.Popen[bytes] | WarmProcess | None = None
        self._controller, self.process_end = pty.openpty()
        fcntl.ioctl(self.process_end, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self._output = b""
        self._has_more = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                piece = os.read(self._controller, 65536)
            except OSError:  # nobody has the terminal open any more
                return
            with self._has_more:
                self._output += piece
                self._has_more.notify_all()

    @property
    def output(self) -> str:
        """All that was written so far, control sequences included."""
        return self._output.decode(errors="replace")

    def wait_for(self, is_there: Callable[[str], bool]) -> None:
        with self._has_more:
            assert self._has_more.wait_for(lambda: is_there(self.output), timeout=120), self.output

    def type(self, keys: bytes) -> None:
        os.write(self._controller, keys)

    def wait(self) -> int:
        exit_code = self.process.wait(timeout=120)
        self.hang_up()
        return exit_code

    def hang_up(self) -> None:
        """Read what is left."""
        if self.process_end >= 0:
            os.close(self.process_end)
            self.process_end = -1
        self._reader.join(timeout=10)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.hang_up()
        os.close(self._controller)

    def draw(self) -> list[str]:
        """Return the lines of the screen, and those that have scrolled out of it, as they stand now."""
        lines: list[list[str]] = [[]]
        row = column = 0
        for sequence, letter, control, text in _TOKEN.findall(self.output):
            if control:
                row, column = (row + 1, column) if control == "\n" else (row, 0)
            elif letter == "A":
                row -= int(sequence or 1)
            elif letter == "K":
                assert sequence == "2"
                lines[row] = []
            else:
                assert not letter or letter in "mhl", f"the screen does not know {sequence}{letter}"
            for character in text:
                if column == self.width:
                    row, column = row + 1, 0
                lines += [[] for _ in range(row + 1 - len(lines))]
                lines[row] += [" "] * (column + 1 - len(lines[row]))
                lines[row][column] = character
                column += 1
            lines += [[] for _ in range(row + 1 - len(lines))]
        return ["".join(line).rstrip() for line in lines]


@contextmanager
def open_terminal(*, width: int = 100, height: int = 30) -> Iterator[Terminal]:
    """Open a terminal of a size; what still runs on it at the end is killed."""
    terminal = Terminal(width=width, height=height)
    try:
        yield terminal
    finally:
        terminal.close()


@contextmanager
def start_on_terminal(*arguments: object, width: int = 100, height: int = 30) -> Iterator[Terminal]:
    """Start ``lpsearch ARGUMENTS`` with a terminal of a size as its three streams."""
    with open_terminal(width=width, height=height) as terminal:
        base = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        environment = {**base, "TERM": "xterm-256color"}
        terminal.process = WarmProcess(*arguments, terminal=terminal.process_end, env=environment)
        yield terminal
