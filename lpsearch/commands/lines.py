"""Log lines on stderr: for a terminal, and as JSON for a program. No control character of a text reaches either."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from datetime import UTC, datetime
from typing import IO, Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from lpsearch.wording import escape_controls

__all__ = [
    "ConsoleHandler",
    "JsonFormatter",
    "LineFormatter",
    "LineHandler",
    "SafeConsole",
    "dump_json_line",
    "give_up_stream",
    "log_stray_lines",
]


class ConsoleHandler(logging.Handler):
    """Prints log lines above the live display, through its console."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.setFormatter(LineFormatter())
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line; colour shows its level, and from WARNING on a word as well."""
        try:
            line = Text(self.format(record))
            if record.levelno >= logging.WARNING:
                style = "bold red" if record.levelno >= logging.ERROR else "yellow"
                line = Text(f"{record.levelname} ", style) + line
            self._console.print(line, soft_wrap=True)  # the terminal breaks lines, so that paths can be copied
        except Exception:
            self.handleError(record)


class LineHandler(logging.StreamHandler[TextIO]):
    """Writes log lines to a stream, and ignores that it cannot be written any more."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is that of logging
        """Give the stream up if its reader has left; print no traceback for each line that a full disk refuses."""
        error = sys.exception()
        if isinstance(error, BrokenPipeError):
            give_up_stream(self.stream)
        elif not isinstance(error, OSError):
            super().handleError(record)


class SafeConsole(Console):
    """A console that shows control characters of texts as such, and whose reader may leave.

    When the reader has left it prints nothing, and the command continues.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Lay out a renderable; its texts pass here one by one, the cells of tables included."""
        if isinstance(renderable, Text):
            renderable = _escape_text(renderable)
        return super().render(renderable, options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make a text of a string; rich itself would drop some control characters."""
        return super().render_str(escape_controls(text), **options)

    def on_broken_pipe(self) -> None:
        """Print nothing more; rich's own console would close stdout and end the process."""
        self.quiet = True
        give_up_stream(self.file)


def give_up_stream(stream: IO[str]) -> None:
    """Discard what is still written to a standard stream, so that neither libraries nor the exit fail."""
    with suppress(OSError, ValueError):  # no file, or closed
        target = stream.fileno()
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, target)
        os.close(devnull)


def _escape_text(text: Text) -> Text:
    """Return a text as it is shown; one that holds control characters has one style throughout."""
    shown = escape_controls(text.plain)
    if shown == text.plain:
        return text
    return Text(shown, text.style, justify=text.justify, overflow=text.overflow, no_wrap=text.no_wrap, end=text.end)


def dump_json_line(document: Mapping[str, Any]) -> str:
    """Write a document as one line of ASCII without control characters, DEL included, which JSON allows."""
    return json.dumps(document, allow_nan=False).replace("\x7f", "\\u007f")


class LineFormatter(logging.Formatter):
    """Writes a record as one line, so that no text can forge another; below it the traceback, if it has one."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is that of logging
        """Return the line."""
        return escape_controls(super().formatMessage(record), in_one_line=True)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line and the traceback."""
        return escape_controls(super().format(record))


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
        return dump_json_line(document)


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
    """A text stream that logs each line when it ends; it keeps the lines of different threads apart."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        # Keyed by the object, since the system gives the number of a thread that ended to a new one.
        self._rests: dict[threading.Thread, str] = {}
        # Not held while logging: a thread that logs by itself holds its handler's lock when that writes here.
        # Re-entrant, since a finalizer may write at any moment.
        self._lock = threading.RLock()
        self._local = threading.local()

    def write(self, text: str) -> int:
        if getattr(self._local, "is_logging", False):  # a handler that fails says so on sys.stderr, which is this
            return len(text)
        thread = threading.current_thread()
        with self._lock:
            *lines, rest = (self._rests.pop(thread, "") + text).split("\n")
            if rest:
                self._rests[thread] = rest
        self._log(lines)
        return len(text)

    def writable(self) -> bool:
        return True

    def write_rest(self) -> None:
        """Log the last line of every thread that did not end."""
        with self._lock:
            lines = [*self._rests.values()]
            self._rests.clear()
        self._log(lines)

    def _log(self, lines: Sequence[str]) -> None:
        self._local.is_logging = True
        try:
            for line in lines:
                shown = line.rstrip("\r").rpartition("\r")[2]  # the last state of a bar that was drawn over and over
                if shown.strip():
                    self._logger.warning("%s", shown)
        finally:
            self._local.is_logging = False
