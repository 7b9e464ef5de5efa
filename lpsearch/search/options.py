"""How a command line names a study: by its directory, and by its database where that is elsewhere."""

from __future__ import annotations

from pathlib import Path

from lpsearch.search.database import find_sqlite_path
from lpsearch.search.store import StudyStore

__all__ = ["has_own_database", "list_study_options"]


def has_own_database(store: StudyStore, directory: Path) -> bool:
    """Say whether a study's database is ``study.db`` in its directory.

    Args:
        store: the database.
        directory: directory of the study.
    """
    path = find_sqlite_path(store.optuna_storage.engine.url)
    return path is not None and path.resolve() == (directory / "study.db").resolve()


def list_study_options(store: StudyStore, directory: Path) -> list[str]:
    """Return what a command needs besides the directory of a study to find it, one word each, not quoted.

    Args:
        store: its database.
        directory: its directory.

    Returns:
        Nothing where ``study.db`` in the directory is the database; else ``--storage`` with the URL, whose password is
        hidden, and ``--study``, since others may be in it too.
    """
    if has_own_database(store, directory):
        return []
    url = store.optuna_storage.engine.url
    return ["--storage", url.render_as_string(hide_password=True), "--study", store.study_name]
