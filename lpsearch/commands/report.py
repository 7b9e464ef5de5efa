"""``lpsearch report``: the HTML report of a study, finished or not; ``optimize`` writes it as well."""

from __future__ import annotations

import logging
import shlex
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lpsearch.commands.console import Answer, adopt_optuna_log
from lpsearch.commands.facts import Facts, Row
from lpsearch.commands.options import DirectoryArgument, StorageOption, StudyOption
from lpsearch.commands.outputs import check_output_file
from lpsearch.errors import StudyError, UsageError
from lpsearch.wording import name_count

if TYPE_CHECKING:
    from lpsearch.report import StudyReport
    from lpsearch.search import StudyStore

__all__ = ["REPORT_NAME", "annotate_if_missing", "has_dashboard", "report", "try_write_report"]

logger = logging.getLogger(__name__)

REPORT_NAME = "report.html"
"""Name of the report in a study's directory."""


def report(
    directory: DirectoryArgument,
    storage: StorageOption = None,
    study: StudyOption = None,
    out: Annotated[Path | None, typer.Option(help="file to write; default: report.html in DIR", metavar="FILE")] = None,
) -> Answer:
    """Write a study's report, finished or not, as one HTML file that needs no network."""
    from lpsearch.commands.studies import open_existing_study
    from lpsearch.latency.profile import describe_profile_error
    from lpsearch.report import load_report, write_html

    adopt_optuna_log()
    started = time.perf_counter()
    target = directory / REPORT_NAME if out is None else out
    with open_existing_study(directory, storage=storage, study=study, annotates=has_dashboard()) as store:
        check_output_file(target)
        found = load_report(store, directory)
        annotate_if_missing(store, found, directory)
    warning = describe_profile_error(found.latency_error, name=f"{directory}: the latency profile of the study")
    if warning is not None:
        logger.warning("%s", warning)
    num_bytes = write_html(found, target)
    document = {
        "report": str(target),
        "study": found.name,
        "trials": len(found.results),
        "front_plans": len(found.front),
        "num_bytes": num_bytes,
        "seconds": round(time.perf_counter() - started, 2),
    }
    rows: list[Row] = [
        ("report", target),
        ("study", f"{found.name}: {name_count(len(found.results), 'plan')} evaluated, {len(found.front)} on the front"),
        ("state", None if found.is_current else "unfinished: under way or interrupted"),
    ]
    return Answer(document, Facts(rows))


def try_write_report(store: StudyStore, out: Path) -> StudyReport | None:
    """Write the report of a search and what optuna-dashboard shows of it; a failure is only a warning.

    Args:
        store: the study's database, open and locked.
        out: directory of the study.

    Returns:
        What the report shows; None where it was not written.
    """
    from lpsearch.report import load_report, write_html
    from lpsearch.search.settings import list_study_options

    try:
        found = load_report(store, out)
        write_html(found, out / REPORT_NAME)
    except UsageError as error:
        logger.info("no report: %s", error)
        return None
    except Exception as error:
        # A report can be written again at any time, so it must not fail a search that is done.
        command = shlex.join(["lpsearch", "report", str(out), *list_study_options(store, out)])
        logger.warning("the report was not written: %s; `%s` tries again", error, command)
        logger.debug("while writing the report", exc_info=True)
        return None
    _try_annotate(store, found, out)
    return found


def has_dashboard() -> bool:
    """Tell whether optuna-dashboard is installed, for which a study is annotated."""
    return find_spec("optuna_dashboard") is not None


def annotate_if_missing(store: StudyStore, found: StudyReport, directory: Path) -> None:
    """Write what optuna-dashboard shows of a study, if a search that could not write it has ended.

    The search writes it at its end, but not where optuna-dashboard was installed only later.

    Args:
        store: the study's database, open.
        found: what the report shows.
        directory: of the study.
    """
    from lpsearch.report.annotations import is_annotated

    if store.is_read_only or not has_dashboard():
        return
    try:
        if is_annotated(store, found):
            return
        with store.hold_lock():
            _try_annotate(store, found, directory)
    except StudyError as error:  # a search holds it, and writes this at its end
        logger.debug("nothing written for optuna-dashboard: %s", error)


def _try_annotate(store: StudyStore, found: StudyReport, out: Path) -> None:
    """Write what optuna-dashboard shows of a study; a failure is only a warning."""
    try:
        from lpsearch.report.annotations import annotate_study

        annotate_study(store, found, out)
    except ImportError as error:
        logger.debug("nothing written for optuna-dashboard: %s; pip install 'lpsearch[dashboard]' brings it", error)
    except Exception as error:
        logger.warning("the front's notes for optuna-dashboard were not written: %s; run optimize again", error)
        logger.debug("while writing for optuna-dashboard", exc_info=True)
