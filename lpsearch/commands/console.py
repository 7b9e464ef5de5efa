"""How every command speaks on stderr, and how it ends: exit code, and what stands on stdout.

On a terminal a live display stands below the log lines. Elsewhere, in a file or a pipe, there are plain lines and no
control characters. With ``--json`` every line on stderr is a JSON object, for a program to read.

Where stdout is a terminal, a person gets the result as a table there. In a file or a pipe, and with ``--json``, the
last line of stdout is the result as one JSON object, and the table goes to stderr.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import typer
from rich.console import Console, RenderableType

from lpsearch.commands.facts import describe_document
from lpsearch.commands.lines import (
    ConsoleHandler,
    JsonFormatter,
    LineFormatter,
    LineHandler,
    SafeConsole,
    dump_json_line,
    give_up_stream,
    log_stray_lines,
)
from lpsearch.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    LpsearchError,
    describe_error,
    mask_urls,
)

__all__ = ["Answer", "Output", "adopt_optuna_log", "get_output", "prepare_streams", "run_command"]

logger = logging.getLogger(__name__)

_LOG_WIDTH = 140
"""Columns of tables where stderr is no terminal."""

# Newer versions of typer carry their own copy of click, so the base of its errors is found through one of them.
_ParserError: type[Any] = typer.BadParameter.__mro__[2]


@dataclass(frozen=True)
class Output:
    """How a command speaks on stderr.

    Attributes:
        console: for displays, and for tables where stdout is no terminal; silent with ``--quiet`` and ``--json``.
        tables: where a person reads the result, which is what was asked for, so that ``--quiet`` does not silence it;
            None where stdout is for a program.
        is_live: a display may be drawn over and over.
        is_json: log lines are JSON objects, which carry progress as data.
    """

    console: Console
    tables: Console | None = None
    is_live: bool = False
    is_json: bool = False


@dataclass(frozen=True)
class Answer:
    """What a command returns.

    Attributes:
        document: the JSON object of the last line of stdout, for a program.
        summary: the same for a person.
    """

    document: Mapping[str, Any]
    summary: RenderableType


_OUTPUT: ContextVar[Output] = ContextVar("_OUTPUT")


def get_output() -> Output:
    """Return how the command that runs speaks; outside of one, plainly."""
    return _OUTPUT.get(None) or Output(Console(stderr=True, force_terminal=False, width=_LOG_WIDTH))


def adopt_optuna_log() -> None:
    """Send Optuna's warnings where this package's go; its own handler would report every trial."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("optuna").handlers[:] = logging.getLogger("lpsearch").handlers


def run_command(
    command: Callable[[], Any], *, quiet: bool = False, as_json: bool = False, has_out: bool = False
) -> NoReturn:
    """Run a command to its end: print its result, or its error, and exit with the design's code.

    Args:
        command: returns an :class:`Answer`, a JSON object, or an exit code (after ``--help``).
        quiet: on stderr, warnings and errors only.
        as_json: one JSON object a line on stderr and nothing else; the result as one on stdout.
        has_out: the command has an option ``--out``, for its errors to name.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    with _speak(quiet=quiet, as_json=as_json):
        try:
            exit_code = _run(command, has_out=has_out)
        except KeyboardInterrupt:  # again, or while the JSON line waits for a reader
            exit_code = EXIT_INTERRUPTED
    sys.exit(exit_code)


def prepare_streams() -> None:
    """Have stdout and stderr take any text; called before anything is written, the help included.

    What is written to a stream that the process was started without, as after ``2>&-``, is discarded. A character that
    the terminal's encoding lacks becomes a question mark, where Python would end in an error.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


@contextmanager
def _speak(*, quiet: bool, as_json: bool) -> Iterator[None]:
    """Send this package's log, and with ``as_json`` whatever else comes, to stderr in the form that was asked for."""
    is_terminal = sys.stderr.isatty() and not as_json
    # Bound to the present stream: while a model is loaded, sys.stderr is another one, which holds libraries back.
    console = SafeConsole(
        file=sys.stderr,
        highlight=False,
        quiet=quiet or as_json,
        force_terminal=is_terminal,  # colours in a file help nobody, whatever FORCE_COLOR says
        width=None if is_terminal else _LOG_WIDTH,
    )
    handler: logging.Handler
    if is_terminal and not quiet:
        handler = ConsoleHandler(console)
    else:
        handler = LineHandler(sys.stderr)
        handler.setFormatter(JsonFormatter() if as_json else LineFormatter("%(levelname)s %(message)s"))
    package = logging.getLogger("lpsearch")
    package.handlers[:] = [handler]
    package.setLevel(logging.WARNING if quiet else logging.INFO)
    package.propagate = False
    if quiet or as_json:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when a command first imports the library
    is_live = is_terminal and not quiet and console.is_interactive
    tables = SafeConsole(file=sys.stdout, highlight=False) if sys.stdout.isatty() and not as_json else None
    token = _OUTPUT.set(Output(console, tables=tables, is_live=is_live, is_json=as_json))
    try:
        with log_stray_lines(logging.getLogger("lpsearch.stderr")) if as_json else nullcontext():
            yield
    finally:
        _OUTPUT.reset(token)


def _run(command: Callable[[], Any], *, has_out: bool) -> int:
    try:
        result = command()
        if result == EXIT_INTERRUPTED:  # newer versions of typer turn Ctrl-C into this
            raise KeyboardInterrupt
    except LpsearchError as error:
        return _fail(type(error).__name__, str(error), error.exit_code)
    except _ParserError as error:
        message = " ".join(error.format_message().split())  # some are laid out in lines
        return _fail("UsageError", message or "name a command; --help lists them", EXIT_USAGE)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(
            "Interrupted",
            "interrupted; run the same command again: a search resumes, any other command starts over",
            EXIT_INTERRUPTED,
        )
    except OSError as error:
        elsewhere = "choose a place that can be written" + " with --out" * has_out
        mend = {
            errno.ENOSPC: "free some space",
            errno.EDQUOT: "free some space",
            errno.EACCES: elsewhere,
            errno.EROFS: elsewhere,
            errno.EPERM: elsewhere,
        }.get(error.errno or 0)
        if mend is None:
            logger.exception("unexpected failure")
        return _fail("OSError", str(error) if mend is None else f"{error}; {mend}", EXIT_FAILED)
    except Exception as error:
        if _is_out_of_memory(error):
            message = (
                f"out of memory: {describe_error(error)}; take shorter windows, a smaller dtype or a device with more "
                "memory"
            )
            return _fail("OutOfMemory", message, EXIT_FAILED)
        logger.exception("unexpected failure; please report it with the lines above")
        return _fail(type(error).__name__, str(error), EXIT_FAILED)
    if isinstance(result, Answer):
        return _show_answer(result)
    if isinstance(result, Mapping):
        return _show_document(result)
    return int(result or EXIT_DONE)


def _show_answer(answer: Answer) -> int:
    """Print an answer: as a table for a person; for a program as a JSON line, with the table on stderr before it."""
    output = get_output()
    is_shown = _print_summary(answer.summary, output.tables or output.console)
    return EXIT_DONE if output.tables is not None and is_shown else _print_json(answer.document)


def _show_document(document: Mapping[str, Any]) -> int:
    """Print the result of a command that has no table of its own."""
    if get_output().tables is None:
        return _print_json(document)
    return _show_answer(Answer(document, describe_document(document)))


def _print_summary(summary: RenderableType, console: Console) -> bool:
    """Print the summary; return whether that went well.

    The work is done by now, so whatever fails here, an interrupt included, keeps its result.
    """
    try:
        console.print(summary, soft_wrap=True)
    except KeyboardInterrupt:
        logger.warning("interrupted while the summary was printed; the result is complete")
    except Exception as error:
        logger.warning("the summary could not be printed: %s: %s", type(error).__name__, error)
        logger.debug("while printing the summary", exc_info=True)
    else:
        return True
    return False


def _fail(kind: str, message: str, exit_code: int) -> int:
    """Say what is wrong: a line on stderr, and on stdout, where that is for a program, a JSON object."""
    message = mask_urls(message)  # the parser repeats arguments
    logger.error("%s", message)
    if get_output().tables is None:
        _print_json({"error": {"type": kind, "message": message, "exit_code": exit_code}})
    return exit_code


def _print_json(document: Mapping[str, Any]) -> int:
    """Print the last line of stdout; return the exit code, which tells where it cannot be written."""
    try:
        sys.stdout.write(dump_json_line(document) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has left
        give_up_stream(sys.stdout)
    except OSError as error:
        give_up_stream(sys.stdout)
        logger.error("the result could not be written to stdout: %s", error)
        return EXIT_FAILED
    return EXIT_DONE


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's message on a CPU


def _interrupt(signum: int, frame: object) -> NoReturn:
    """Treat SIGTERM as Ctrl-C, so that locks are released and files are whole."""
    raise KeyboardInterrupt
