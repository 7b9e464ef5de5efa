"""``lpsearch report``: the HTML report of a study, finished or not; ``optimize`` writes it as well."""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import URL

from lpsearch.commands.console import adopt_optuna_log
from lpsearch.errors import UsageError
from lpsearch.search import StudyStore
from lpsearch.search.settings import list_study_options

if TYPE_CHECKING:
    from lpsearch.report import StudyReport

__all__ = ["REPORT_NAME", "open_existing_study", "report", "try_write_report"]

logger = logging.getLogger(__name__)

REPORT_NAME = "report.html"
"""Name of the report in a study's directory."""


def report(directory: Path, *, storage: str | None, study: str | None, out: Path | None) -> dict[str, Any]:
    """Write the report of a study.

    Args:
        directory: what ``optimize`` wrote.
        storage: database URL; None takes ``study.db`` in the directory.
        study: name of the study; None takes the one that the directory's ``front.json`` names, or the only one.
        out: file to write; None takes ``report.html`` in the directory.

    Returns:
        ``report``, ``study``, ``trials``, ``front_plans``, ``num_bytes`` and ``seconds``.

    Raises:
        UsageError: for a directory or database without a study, or with several and none chosen, or a study without a
            finished plan.
        StudyVersionError: for a study of another version.
        StudyError: if the database fails.
        OSError: if the file cannot be written.
    """
    from lpsearch.report import load_report, write_html

    adopt_optuna_log()
    started = time.perf_counter()
    target = directory / REPORT_NAME if out is None else out
    with open_existing_study(directory, storage=storage, study=study) as store:
        if target.is_dir() or not target.parent.is_dir():
            raise UsageError(f"{target}: not a file in a directory that exists; name another with --out")
        found = load_report(store, directory)
    num_bytes = write_html(found, target)
    return {
        "report": str(target),
        "study": found.name,
        "trials": len(found.records),
        "front_plans": len(found.front),
        "num_bytes": num_bytes,
        "seconds": round(time.perf_counter() - started, 2),
    }


@contextmanager
def open_existing_study(directory: Path, *, storage: str | None, study: str | None) -> Iterator[StudyStore]:
    """Open the study of a directory to look at it; makes none, and takes no lock.

    Args:
        directory: what ``optimize`` wrote.
        storage: database URL; None takes ``study.db`` in the directory.
        study: name of the study; None takes the one that the directory's ``front.json`` names, or the only one.

    Yields:
        The open store.

    Raises:
        UsageError: for a directory or database without a study, or with several and none chosen.
        StudyVersionError: for a database of another version.
        StudyError: if the database fails.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such directory; give one that `lpsearch optimize` wrote")
    path = directory / "study.db"
    if storage is None:
        if not path.is_file():  # opening it would make one
            raise UsageError(
                f"{directory}: holds no study.db; give a directory that `lpsearch optimize` wrote, or --storage URL"
            )
        storage = URL.create("sqlite", database=str(path.absolute())).render_as_string()
    with StudyStore(storage, study_name=study or "") as store:
        held = store.list_studies()
        if not held or (study is not None and study not in held):
            named = f"no study {study!r}" if study is not None and held else "no study yet"
            known = f"it holds {', '.join(map(repr, held))}" if held else "begin one with `lpsearch optimize`"
            raise UsageError(f"{store.where}: holds {named}; {known}")
        store.study_name = study if study is not None else _choose_study(store, held, directory)
        yield store


def _choose_study(store: StudyStore, held: Sequence[str], directory: Path) -> str:
    """Choose a study where none was named: the one whose front the directory has, or the only one.

    Raises:
        UsageError: if there are several.
    """
    named = _read_front_study(directory)
    if named is not None and named in held:
        return named
    if len(held) == 1:
        return held[0]
    found = f"names {named!r}, which is none of them" if named is not None else "does not say which is meant"
    raise UsageError(
        f"{store.where}: holds {len(held)} studies, and {directory / 'front.json'} {found}; "
        f"choose one with --study: {', '.join(map(repr, held))}"
    )


def _read_front_study(directory: Path) -> str | None:
    """Return the study that ``front.json`` names; None where it names none."""
    try:
        document = json.loads((directory / "front.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # said when the report is read
        return None
    named = document.get("study") if isinstance(document, dict) else None
    return named if isinstance(named, str) else None


def try_write_report(store: StudyStore, out: Path) -> StudyReport | None:
    """Write the report of a search that ends, and what optuna-dashboard shows of it; what fails is a warning.

    Args:
        store: the study's database, open and locked.
        out: directory of the study.

    Returns:
        What the report shows; None where it was not written.
    """
    try:
        from lpsearch.report import load_report, write_html

        found = load_report(store, out)
        write_html(found, out / REPORT_NAME)
    except UsageError as error:
        logger.info("no report: %s", error)
        return None
    except Exception as error:
        # A report can be written again at any time; a search that is done must not fail by it.
        command = shlex.join(["lpsearch", "report", str(out), *list_study_options(store, out)])
        logger.warning("the report was not written: %s; `%s` tries again", error, command)
        logger.debug("while writing the report", exc_info=True)
        return None
    _try_annotate(store, found, out)
    return found


def _try_annotate(store: StudyStore, found: StudyReport, out: Path) -> None:
    """Write what optuna-dashboard shows of a study; what fails is a warning."""
    try:
        from lpsearch.report.annotations import annotate_study

        annotate_study(store, found, out)
    except ImportError as error:
        logger.debug("nothing written for optuna-dashboard: %s; pip install 'lpsearch[dashboard]' brings it", error)
    except Exception as error:
        logger.warning("the front's notes for optuna-dashboard were not written: %s; run optimize again", error)
        logger.debug("while writing for optuna-dashboard", exc_info=True)
