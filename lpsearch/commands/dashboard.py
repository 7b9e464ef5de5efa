"""``lpsearch dashboard``: the live page and optuna-dashboard of a study under one address of this machine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lpsearch.commands.console import adopt_optuna_log
from lpsearch.commands.options import DirectoryArgument, StorageOption, StudyOption
from lpsearch.errors import LpsearchError, UsageError

if TYPE_CHECKING:
    from lpsearch.search import StudyStore

__all__ = ["dashboard"]

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "lpsearch.dashboard"
"""Where the package that serves a study is found: nothing in this package imports it."""


def dashboard(
    directory: DirectoryArgument,
    port: Annotated[int, typer.Option(help="port of 127.0.0.1; 0: any free one", min=0, max=65535)] = 8080,
    storage: StorageOption = None,
    study: StudyOption = None,
) -> dict[str, Any]:
    """Serve a study, finished or not: its live figures and optuna-dashboard, until Ctrl-C."""
    from lpsearch.commands.studies import open_existing_study

    adopt_optuna_log()
    with open_existing_study(directory, storage=storage, study=study, annotates=True) as store:
        build_server = _load_server()
        _annotate(store, directory)
        started = time.perf_counter()
        with build_server(store, directory, port=port) as server:
            logger.setLevel(logging.INFO)  # with --quiet too: nothing else tells which port was free
            logger.info(
                "%s is shown at %s ; end with Ctrl-C",
                store.study_name,
                server.url,
                extra={"progress": {"step": "serving", "url": server.url, "study": store.study_name}},
            )
            with suppress(KeyboardInterrupt):  # the way to end it, so nothing was cut short
                server.serve_forever(poll_interval=0.2)
        return {"url": server.url, "study": store.study_name, "seconds": round(time.perf_counter() - started, 1)}


def _annotate(store: StudyStore, directory: Path) -> None:
    """Write what optuna-dashboard shows of a study, where it is missing; what cannot be reported has nothing yet."""
    from lpsearch.commands.report import annotate_if_missing
    from lpsearch.report import load_report

    try:
        annotate_if_missing(store, load_report(store, directory), directory)
    except LpsearchError as error:
        logger.debug("nothing written for optuna-dashboard: %s", error)


def _load_server() -> Callable[..., Any]:
    """Load the function that builds the server.

    Raises:
        UsageError: if what it needs is not installed.
    """
    missing = "its installation has no such part"
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            loaded: Callable[..., Any] = entry_point.load()
        except ImportError as error:
            missing = str(error)
        else:
            return loaded
    raise UsageError(f"the dashboard of lpsearch is not installed ({missing}); run pip install 'lpsearch[dashboard]'")
