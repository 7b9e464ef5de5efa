"""Opening a study's database: checked first, its tables made by one process at a time, read-only where that will do."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from optuna.storages import RDBStorage
from sqlalchemy import Engine, NullPool, create_engine, text
from sqlalchemy.engine import URL

from lpsearch.errors import ConfigError, StudyError, StudyVersionError
from lpsearch.search import optuna_tables, schema
from lpsearch.search.locks import HeldElsewhereError, get_lock_path, hold_file_lock
from lpsearch.search.storage_url import describe_url, find_sqlite_path, translate_storage_errors

__all__ = ["is_writable", "open_optuna_storage"]

BUSY_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 10

_SERVER_LOCKS = {
    "postgresql": ("SELECT pg_advisory_lock(1819307877)", "SELECT pg_advisory_unlock(1819307877)"),
    "mysql": ("SELECT GET_LOCK('lpsearch setup', 60)", "SELECT RELEASE_LOCK('lpsearch setup')"),
    "mariadb": ("SELECT GET_LOCK('lpsearch setup', 60)", "SELECT RELEASE_LOCK('lpsearch setup')"),
}
"""Statements that take and give back a lock of a database server; the number is any that others are unlikely to use."""


def open_optuna_storage(url: URL, *, read_only: bool = False) -> RDBStorage:
    """Open the database, check it, and create the tables that it lacks.

    Processes that open a new database at once make its tables one after another.

    Args:
        url: parsed by :func:`lpsearch.search.storage_url.parse_storage_url`.
        read_only: write nothing, so that a study on a read-only medium can be read. Where its tables are not made yet,
            or are of a former version, they are made first.

    Raises:
        ConfigError: for options that the database's driver does not take.
        StudyError: if it is damaged, unreachable or another program's; such a database is not written to.
    """
    where, path = describe_url(url), find_sqlite_path(url)
    if path is not None:
        _check_sqlite_file(path, read_only=read_only)
    try:
        with translate_storage_errors(where, url):
            if url.get_backend_name() == "sqlite" and path is None:  # in memory: there are tables once it is open
                storage = _build_storage(url, creates=True)
                schema.create_tables(storage.engine)
                return storage
            if not _is_set_up(url, read_only=read_only):
                if read_only and path is not None and not is_writable(path):
                    raise StudyError(
                        f"{path}: its tables are not made yet or are of a former version, and cannot be written here; "
                        "copy its directory to a place that can be written, and name the copy"
                    )
                _set_up(url)
            return _build_storage(url, read_only=read_only)
    except TypeError as error:  # a driver's word for an option that it does not have; it may repeat a secret
        raise ConfigError(
            f"storage {where}: its driver refuses what follows the ? of the URL ({type(error).__name__})"
        ) from None


def is_writable(path: Path) -> bool:
    """Say whether a SQLite file can be written, with the files that SQLite puts beside it."""
    return os.access(path.parent, os.W_OK) and os.access(path, os.W_OK)


# ---- Connections -----------------------------------------------------------------------------------------------------


def _build_storage(url: URL, *, creates: bool = False, read_only: bool = False) -> RDBStorage:
    """Build Optuna's storage.

    Args:
        url: of the database.
        creates: make the file and Optuna's tables.
        read_only: write nothing.
    """
    # Optuna fills in a template, in which braces mean something.
    template = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    kwargs = _build_engine_kwargs(url, creates=creates, read_only=read_only)
    try:
        return RDBStorage(template, engine_kwargs=kwargs, skip_table_creation=not creates)
    except RuntimeError as error:  # Optuna's word for tables of another version
        raise StudyVersionError(f"{describe_url(url)}: {error}") from error


def _build_engine_kwargs(url: URL, *, creates: bool = False, read_only: bool = False) -> dict[str, Any]:
    """Return how SQLAlchemy connects to a database."""
    path, backend = find_sqlite_path(url), url.get_backend_name()
    if path is not None:
        absolute = path.absolute()
        # Every time anew where it is only read: whether others write the file may have changed since.
        pool = {"poolclass": NullPool} if read_only else {}
        return {"creator": lambda: _connect_sqlite(absolute, creates=creates, read_only=read_only), **pool}
    if backend == "sqlite":
        return {"connect_args": {"timeout": BUSY_TIMEOUT_S}}
    kwargs: dict[str, Any] = {}
    if backend in ("postgresql", "mysql", "mariadb"):
        # A server may drop a connection that idles while a model is evaluated.
        kwargs = {"connect_args": {"connect_timeout": CONNECT_TIMEOUT_S}, "pool_pre_ping": True}
    if backend in ("mysql", "mariadb"):
        # As PostgreSQL does: what others have written is seen, and no range of keys is locked.
        kwargs["isolation_level"] = "READ COMMITTED"
    if backend == "postgresql" and read_only:
        kwargs["execution_options"] = {"postgresql_readonly": True}
    return kwargs


def _connect_sqlite(path: Path, *, creates: bool = False, read_only: bool = False) -> sqlite3.Connection:
    """Connect to a SQLite file, whose path may hold what means something in a URL."""
    mode = "mode=rwc" if creates else "mode=rw"  # what was moved away is not made again
    if read_only:
        # Without a write-ahead log nobody writes the file, and opened as immutable it gets no companion files.
        mode = "mode=ro" if path.with_name(path.name + "-wal").exists() else "immutable=1"
    connection = sqlite3.connect(
        f"file:{quote(os.fsencode(path))}?{mode}", uri=True, timeout=BUSY_TIMEOUT_S, check_same_thread=False
    )
    # In WAL mode NORMAL loses nothing when a process dies, and saves one disk flush a transaction.
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


# ---- Tables ----------------------------------------------------------------------------------------------------------


def _is_set_up(url: URL, *, read_only: bool = False) -> bool:
    """Say whether a database has all tables in the form of this version, and may be read while it is written."""
    path = find_sqlite_path(url)
    if path is not None and (not path.exists() or path.stat().st_size == 0):
        return False
    with _open_engine(url, read_only=read_only or path is not None) as engine:
        if not schema.is_current(engine):
            return False
        if path is None or read_only:
            return True
        with engine.connect() as connection:
            return bool(connection.execute(text("PRAGMA journal_mode")).scalar_one() == "wal")


@contextmanager
def _open_engine(url: URL, *, read_only: bool = False) -> Iterator[Engine]:
    engine = create_engine(url, **_build_engine_kwargs(url, read_only=read_only))
    try:
        yield engine
    finally:
        engine.dispose()


def _set_up(url: URL) -> None:
    """Make the tables that a database lacks, unless another process does.

    Raises:
        StudyError: if another process holds the study, and its tables stay those of a former version.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while not _is_set_up(url):
        try:
            with _hold_setup_lock(url):
                if not _is_set_up(url):
                    _create_tables(url)
                return
        except HeldElsewhereError as error:
            if time.monotonic() > deadline:
                raise StudyError(
                    f"{describe_url(url)}: process {error.holder} holds the study, whose tables have another form than "
                    "those of this version; wait for it or end it"
                ) from None
            time.sleep(0.05)


@contextmanager
def _hold_setup_lock(url: URL) -> Iterator[None]:
    """Be the only process that makes tables; a process that dies gives the lock back.

    Raises:
        HeldElsewhereError: if another process holds the lock of a SQLite file.
    """
    path = find_sqlite_path(url)
    if path is not None:
        with hold_file_lock(get_lock_path(path)):
            yield
        return
    take, give_back = _SERVER_LOCKS.get(url.get_backend_name(), (None, None))
    with _open_engine(url) as engine, engine.connect() as connection:
        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        if take is not None:
            connection.execute(text(take))
        yield
        if give_back is not None:
            connection.execute(text(give_back))


def _create_tables(url: URL) -> None:
    path = find_sqlite_path(url)
    if path is not None:
        with closing(_connect_sqlite(path.absolute(), creates=True)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")  # kept in the file from here on
    storage = _build_storage(url, creates=True)
    try:
        schema.create_tables(storage.engine)
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _check_sqlite_file(path: Path, *, read_only: bool) -> None:
    """Refuse a path that holds anything but a sound study, or where none can be made; writes nothing."""
    if not path.parent.is_dir():
        raise StudyError(f"{path}: its directory does not exist; create it, or name another")
    if path.is_dir():
        raise StudyError(f"{path}: a directory stands where the study's database belongs; name another place")
    if not read_only and not os.access(path.parent, os.W_OK):
        raise StudyError(f"{path}: its directory is not writable; make it so, or name another")
    if not path.exists() or path.stat().st_size == 0:
        return
    mend = "it was left as it is; move it away (`lpsearch optimize --fresh` does), restore a copy or name another place"
    try:
        with closing(_connect_sqlite(path.absolute(), read_only=True)) as connection:
            verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.OperationalError as error:
        if "unable to open" in str(error) and not is_writable(path):
            raise StudyError(
                f"{path}: ends in a write-ahead log, which SQLite cannot read where it can write nothing ({error}); "
                "copy the directory to a place that can be written, and name the copy"
            ) from None
        with translate_storage_errors(str(path)):
            raise
    except sqlite3.DatabaseError as error:
        raise StudyError(f"{path}: not a readable study: {error}; {mend}") from None
    if verdict != "ok":
        raise StudyError(f"{path}: the database is damaged: {' '.join(verdict.split())}; {mend}")
    if tables and not tables & (optuna_tables.TABLE_NAMES | schema.TABLE_NAMES):
        raise StudyError(f"{path}: a database of another program (tables {', '.join(sorted(tables)[:3])}); {mend}")
