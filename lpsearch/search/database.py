"""Opening a study's database safely, and its errors in plain words."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from lpsearch.errors import ConfigError, StudyError, StudyVersionError
from lpsearch.search import optuna_tables, schema

__all__ = [
    "describe_url",
    "find_sqlite_path",
    "open_optuna_storage",
    "parse_storage_url",
    "translate_storage_errors",
]

BUSY_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 10


def parse_storage_url(url: str) -> URL:
    """Parse a storage URL.

    Raises:
        ConfigError: for text that is no SQLAlchemy URL or names an unknown database.
    """
    try:
        parsed = make_url(url)
        parsed.get_dialect().import_dbapi()
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(
            f"storage {url!r} is not a database URL ({error}); write e.g. sqlite:///path/study.db or "
            "postgresql+psycopg://user:password@host/database"
        ) from None
    except ImportError as error:
        extra = "postgres" if parsed.get_backend_name() == "postgresql" else "mysql"
        raise ConfigError(
            f"storage {describe_url(parsed)}: its driver is not installed ({error}); "
            f"install lpsearch[{extra}] or name another driver in the URL"
        ) from None
    return parsed


def describe_url(url: URL) -> str:
    """Return how messages name a database: the path of a SQLite file, else the URL without its password."""
    path = find_sqlite_path(url)
    return str(path) if path is not None else url.render_as_string(hide_password=True)


def find_sqlite_path(url: URL) -> Path | None:
    """Return the file of a SQLite URL; None for another database or one in memory."""
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:"):
        return None
    return Path(str(url.database))


@contextmanager
def translate_storage_errors(where: str) -> Iterator[None]:
    """Turn what a database or file system raises into a :class:`StudyError` that names the study.

    Args:
        where: the database, as messages name it.
    """
    try:
        yield
    except (SQLAlchemyError, StorageInternalError, sqlite3.Error, OSError) as error:
        raise StudyError(f"{where}: {_explain(error)}") from error


def open_optuna_storage(url: URL) -> RDBStorage:
    """Open the database, check it, and create the tables that it lacks.

    Args:
        url: parsed by :func:`parse_storage_url`.

    Raises:
        StudyError: if it is damaged, unreachable or another program's; such a database is not written to.
    """
    where = describe_url(url)
    path = find_sqlite_path(url)
    if path is not None:
        _check_sqlite_file(path)
    engine_kwargs: dict[str, Any] = {}
    if url.get_backend_name() == "sqlite":
        engine_kwargs = {"connect_args": {"timeout": BUSY_TIMEOUT_S}}
    elif url.get_backend_name() in ("postgresql", "mysql", "mariadb"):
        # A server may drop a connection that idles while a model is evaluated.
        engine_kwargs = {"connect_args": {"connect_timeout": CONNECT_TIMEOUT_S}, "pool_pre_ping": True}
    with translate_storage_errors(where):
        if path is not None:
            with closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")  # kept in the file from here on
        rendered = url.render_as_string(hide_password=False)
        try:
            storage = RDBStorage(rendered, engine_kwargs=engine_kwargs)
        except RuntimeError as error:  # Optuna's word for tables of another version
            raise StudyVersionError(f"{where}: {error}") from error
        if path is not None:
            # In WAL mode NORMAL loses nothing when a process dies, and saves one disk flush a transaction.
            event.listen(storage.engine, "connect", _set_synchronous_normal)
            storage.engine.dispose()
        schema.create_tables(storage.engine)
    return storage


def _set_synchronous_normal(connection: Any, record: Any) -> None:
    connection.execute("PRAGMA synchronous = NORMAL")


def _check_sqlite_file(path: Path) -> None:
    """Refuse a path that holds anything but a sound study, or where none can be made; writes nothing."""
    if not path.parent.is_dir():
        raise StudyError(f"{path}: its directory does not exist; create it, or name another with --out or --storage")
    if path.is_dir():
        raise StudyError(f"{path}: a directory stands where the study's database belongs; name another with --out")
    if not os.access(path.parent, os.W_OK):
        raise StudyError(f"{path}: its directory is not writable; make it so, or name another with --out")
    if not path.exists() or path.stat().st_size == 0:
        return
    mend = "it was left as it is; move it away (--fresh does), restore a copy, or name another directory with --out"
    # Without a write-ahead log nobody writes the file, and opened as immutable it gets no companion files.
    mode = "mode=ro" if path.with_name(path.name + "-wal").exists() else "immutable=1"
    try:
        with closing(
            sqlite3.connect(f"file:{quote(str(path))}?{mode}", uri=True, timeout=BUSY_TIMEOUT_S)
        ) as connection:
            verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.OperationalError as error:
        raise StudyError(f"{path}: cannot be opened: {error}") from None
    except sqlite3.DatabaseError as error:
        raise StudyError(f"{path}: not a readable study: {error}; {mend}") from None
    if verdict != "ok":
        raise StudyError(f"{path}: the database is damaged: {' '.join(verdict.split())}; {mend}")
    if tables and not tables & (optuna_tables.TABLE_NAMES | schema.TABLE_NAMES):
        raise StudyError(f"{path}: a database of another program (tables {', '.join(sorted(tables)[:3])}); {mend}")


def _explain(error: BaseException) -> str:
    """Say what went wrong and how to mend it, from the innermost cause."""
    cause: BaseException = error
    while (inner := getattr(cause, "orig", None) or cause.__cause__) is not None:
        cause = inner
    text = " ".join(str(cause).split()) or type(cause).__name__
    lowered = text.lower()
    if "full" in lowered or "no space left" in lowered or "quota" in lowered:
        mend = "free some space and run the same command again; every finished trial is kept"
    elif "locked" in lowered:
        mend = "another program holds the database; end it and run the same command again"
    elif "readonly" in lowered or "read-only" in lowered or "permission" in lowered or "unable to open" in lowered:
        mend = "make the file and its directory writable, or name another with --out"
    elif "malformed" in lowered or "not a database" in lowered:
        mend = "it is damaged; move it away (--fresh does) or restore a copy"
    else:
        mend = "check that the database is reachable and writable, then run the same command again"
    return f"{text}; {mend}"
