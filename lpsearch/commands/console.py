"""What every command shares: where logs go, how a run ends, and the JSON object on the last line of stdout."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler

from lpsearch.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, LpsearchError

__all__ = ["configure_logging", "run_command", "stderr_console"]

logger = logging.getLogger(__name__)

_LOG_WIDTH = 140
"""Columns of tables where stderr is no terminal."""

# Newer versions of typer carry their own copy of click, so the base of its errors is found through one of them.
_ParserError: type[Any] = typer.BadParameter.__mro__[2]


@cache
def stderr_console() -> Console:
    """Return the console on stderr, one for logs and displays so that they do not write over each other."""
    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else _LOG_WIDTH)


def configure_logging(*, quiet: bool = False) -> None:
    """Send this package's log to stderr, and keep the libraries under it to their warnings.

    Args:
        quiet: show warnings only.
    """
    level = logging.WARNING if quiet else logging.INFO
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(console=stderr_console(), show_path=False, show_time=False, markup=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    package = logging.getLogger("lpsearch")
    package.handlers[:] = [handler]
    package.setLevel(level)
    package.propagate = False


def run_command(command: Callable[[], Any]) -> NoReturn:
    """Run a command to its end: print its JSON object, or its error, and exit with the design's code.

    Args:
        command: returns the JSON object of the last line, or an exit code (after ``--help``).
    """
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(_run(command))


def _run(command: Callable[[], Any]) -> int:
    try:
        result = command()
        if result == EXIT_INTERRUPTED:  # newer versions of typer turn Ctrl-C into this
            raise KeyboardInterrupt
    except LpsearchError as error:
        return _fail(type(error).__name__, str(error), error.exit_code)
    except _ParserError as error:
        return _fail("UsageError", error.format_message() or "name a command; --help lists them", EXIT_USAGE)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(
            "Interrupted",
            "interrupted; given the same command a search goes on where it stopped, all else begins anew",
            EXIT_INTERRUPTED,
        )
    except OSError as error:
        mend = {
            errno.ENOSPC: "free some space",
            errno.EDQUOT: "free some space",
            errno.EACCES: "choose a place that can be written with --out",
            errno.EROFS: "choose a place that can be written with --out",
            errno.EPERM: "choose a place that can be written with --out",
        }.get(error.errno or 0)
        if mend is None:
            logger.exception("unexpected failure")
        return _fail("OSError", str(error) if mend is None else f"{error}; {mend}", EXIT_FAILED)
    except Exception as error:
        if _is_out_of_memory(error):
            message = (
                f"out of memory: {error}; lower --windows or --seq-len, or choose a smaller --dtype or a larger device"
            )
            return _fail("OutOfMemory", message, EXIT_FAILED)
        logger.exception("unexpected failure; please report it with the lines above")
        return _fail(type(error).__name__, str(error), EXIT_FAILED)
    if isinstance(result, Mapping):
        _print_json(result)
        return EXIT_DONE
    return int(result or EXIT_DONE)


def _fail(kind: str, message: str, exit_code: int) -> int:
    logger.error("%s", message)
    _print_json({"error": {"type": kind, "message": message}})
    return exit_code


def _print_json(document: Mapping[str, Any]) -> None:
    try:
        sys.stdout.write(json.dumps(document, allow_nan=False) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader left; point stdout elsewhere so that the interpreter's own flush at exit stays silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's word for it on a CPU


def _interrupt(signum: int, frame: object) -> NoReturn:
    """Treat a polite end by the system as Ctrl-C, so that locks and files are left in order."""
    raise KeyboardInterrupt
