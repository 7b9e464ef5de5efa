"""Log lines on stderr: for a terminal, and as JSON for a program."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from datetime import UTC, datetime

from rich.console import Console
from rich.text import Text

__all__ = ["ConsoleHandler", "JsonFormatter", "log_stray_lines"]


class ConsoleHandler(logging.Handler):
    """Prints log lines through the console of the live display, which they then stand above."""

    def __init__(self, console: Console) -> None:
        """Take the console."""
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line; its level is told by its colour, and from a warning on by a word."""
        try:
            line = Text(self.format(record))
            if record.levelno >= logging.WARNING:
                style = "bold red" if record.levelno >= logging.ERROR else "yellow"
                line = Text(f"{record.levelname} ", style) + line
            self._console.print(line, soft_wrap=True)  # the terminal breaks lines, so that paths can be copied
        except Exception:
            self.handleError(record)


class JsonFormatter(logging.Formatter):
    """Writes a record as one line: time, level, logger, message; progress and traceback where it has them."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        document = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if hasattr(record, "progress"):
            document["progress"] = record.progress
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return json.dumps(document, allow_nan=False)


@contextmanager
def log_stray_lines(logger: logging.Logger) -> Iterator[None]:
    """Turn what libraries write to ``sys.stderr`` in the block into warnings of a logger, one for each line.

    Args:
        logger: its handlers must not write to ``sys.stderr`` as it is in the block.
    """
    stream = _LineStream(logger)
    with redirect_stderr(stream):
        try:
            yield
        finally:
            stream.write_rest()


class _LineStream(io.TextIOBase):
    """A text stream that logs each line as it ends."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._rest = ""
        self._is_logging = False

    def write(self, text: str) -> int:
        if self._is_logging:  # a handler that fails says so on sys.stderr, which is this
            return len(text)
        *lines, self._rest = (self._rest + text).split("\n")
        self._is_logging = True
        try:
            for line in lines:
                shown = line.rstrip("\r").rpartition("\r")[2]  # the last state of a bar that was drawn over and over
                if shown.strip():
                    self._logger.warning("%s", shown)
        finally:
            self._is_logging = False
        return len(text)

    def writable(self) -> bool:
        return True

    def write_rest(self) -> None:
        """Log a last line that did not end."""
        self.write("\n")
