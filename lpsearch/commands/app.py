"""The command line: which commands there are, and how one line is parsed. Each command is in the module of its name.

These modules import what is slow to import (torch, Optuna) inside their functions, so that ``lpsearch --help`` answers
at once.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

import typer

from lpsearch.commands import cache, plan
from lpsearch.commands.console import prepare_streams, run_command
from lpsearch.commands.dashboard import dashboard
from lpsearch.commands.evaluate import evaluate
from lpsearch.commands.examples import EXAMPLES
from lpsearch.commands.export import export
from lpsearch.commands.generate import generate
from lpsearch.commands.models import models
from lpsearch.commands.optimize import optimize
from lpsearch.commands.options import JsonOption, QuietOption, refuse_empty, refuse_empty_paths, set_parameters
from lpsearch.commands.profile import profile
from lpsearch.commands.recover import recover
from lpsearch.commands.report import report
from lpsearch.commands.worker import worker
from lpsearch.errors import UsageError
from lpsearch.versions import __version__

__all__ = ["app", "main"]


@dataclass(frozen=True)
class _Call:
    """A parsed command line.

    Attributes:
        run: does what it says.
        quiet: on stderr, warnings and errors only.
        json: on stderr, one JSON object a line and nothing else.
        has_out: the command has an option ``--out``.
    """

    run: Callable[[], Any]
    quiet: bool = False
    json: bool = False
    has_out: bool = False


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

    Args:
        argv: the arguments; None takes the process's own.
    """
    prepare_streams()
    # Imports make millions of objects that stay; with Python's 700, looking through them is a tenth of a short command.
    gc.set_threshold(20_000)
    call = _parse(sys.argv[1:] if argv is None else list(argv))
    run_command(call.run, quiet=call.quiet, as_json=call.json, has_out=call.has_out)


def _parse(arguments: Sequence[str]) -> _Call:
    try:
        _check_encoding(arguments)
        parsed = app(args=arguments, prog_name="lpsearch", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        failure = error

        def fail() -> NoReturn:
            raise failure

        return _Call(fail, json="--json" in arguments)  # a line that cannot be parsed may still ask for this
    return parsed if isinstance(parsed, _Call) else _Call(lambda: parsed)  # an exit code, after --help


def _check_encoding(arguments: Sequence[str]) -> None:
    """Refuse an argument that no database, JSON or page could hold.

    Raises:
        UsageError: naming the first of them.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UsageError(f"the argument {argument!a} is not UTF-8; rename the file, or type it again") from None


def _build_app(commands: Sequence[Callable[..., Any]], *, prefix: str = "", **options: Any) -> typer.Typer:
    """Build a group of commands that are named like their functions; each also takes ``--quiet`` and ``--json``.

    Args:
        commands: the functions.
        prefix: words before the name of each.
        options: of the group.
    """
    group = typer.Typer(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]}, **options)
    for command in commands:
        lines = EXAMPLES.get(f"{prefix} {command.__name__}".strip(), ())
        title = "Example:" if len(lines) == 1 else "Examples:"
        # typer joins the lines of a paragraph, so each line is one.
        group.command(
            command.__name__,
            help=_join_lines(inspect.getdoc(command) or ""),
            epilog="\n\n".join([title, *lines]) if lines else None,
        )(_defer(command))
    return group


def _join_lines(text: str) -> str:
    """Make each paragraph one line, which the help breaks to the width of the terminal."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _defer(command: Callable[..., Any]) -> Callable[..., _Call]:
    """Have a command's parser return the call, which runs once it is known how it is to speak."""

    @functools.wraps(command)
    def parse(*, quiet: bool, json: bool, **arguments: Any) -> _Call:
        def run() -> Any:
            refuse_empty(arguments)
            return command(**arguments)

        return _Call(run, quiet=quiet, json=json, has_out="out" in arguments)

    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in {"quiet": QuietOption, "json": JsonOption}.items()
    ]
    own = map(refuse_empty_paths, inspect.signature(command, eval_str=True).parameters.values())
    set_parameters(parse, [*own, *shared])
    return parse


def _add_shared_options(call: _Call, quiet: bool, json: bool, version: bool) -> _Call:
    """Heed the options that stand before the command's name too."""
    return dataclasses.replace(call, quiet=call.quiet or quiet, json=call.json or json)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"lpsearch {__version__}")
        raise typer.Exit


VersionOption = Annotated[
    bool, typer.Option("--version", help="print the version and exit", callback=_print_version, is_eager=True)
]


app = _build_app(
    [optimize, evaluate, recover, export, generate, profile, report, dashboard, worker, models],
    name="lpsearch",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(
    _build_app(
        [plan.show, plan.validate, plan.diff, plan.pick, plan.schema], prefix="plan", help="Look at plan files."
    ),
    name="plan",
)
app.add_typer(
    _build_app(
        [cache.show, cache.clear],
        prefix="cache",
        help="Look at or clear the cache: packaged models, sampled windows, latencies. LPSEARCH_CACHE moves it.",
    ),
    name="cache",
)


@app.callback(result_callback=_add_shared_options)
def take_shared_options(quiet: QuietOption = False, json: JsonOption = False, version: VersionOption = False) -> None:
    """Find which layers of an LLM can run in parallel, what that saves on your GPUs and what it costs in accuracy."""
