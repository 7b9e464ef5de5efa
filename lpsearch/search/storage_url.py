"""The URL of a study's database: parsed, named without its secrets, and what the database raises in plain words."""

from __future__ import annotations

import re
import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    PendingRollbackError,
    SQLAlchemyError,
)

from lpsearch.errors import ConfigError, StudyError, mask_urls

__all__ = [
    "describe_url",
    "find_sqlite_path",
    "is_connection_lost",
    "parse_storage_url",
    "refuse_memory",
    "translate_storage_errors",
]

_EXAMPLES = "write e.g. sqlite:///path/study.db, postgresql://user:password@host/database or mysql://user:password@host/database"

_LOST_CONNECTIONS = {"57P01", "57P02", "57P03", 1053, 1927, 2002, 2003, 2006, 2013}
"""Codes of PostgreSQL and of MySQL and its client for a server that ends, begins, or cannot be reached."""

_INVALIDATED = "8s2b"
"""SQLAlchemy's code for a transaction that goes on after its connection was lost in the middle of it."""


def parse_storage_url(url: str | URL) -> URL:
    """Parse a storage URL; ``postgres:`` and ``postgresql:`` are psycopg's, ``mysql:`` and ``mariadb:`` PyMySQL's.

    Raises:
        ConfigError: for text that is no SQLAlchemy URL or names an unknown database; it shows no secret of the URL.
    """
    parsed = url if isinstance(url, URL) else _parse_text(url)
    if parsed.drivername in ("postgres", "postgresql", "postgres+psycopg"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    elif parsed.drivername in ("mysql", "mariadb", "mariadb+pymysql"):  # Optuna knows MariaDB as MySQL only
        parsed = parsed.set(drivername="mysql+pymysql")
    try:
        parsed.get_dialect().import_dbapi()
    except (ArgumentError, NoSuchModuleError):
        raise ConfigError(
            f"storage {_mask_text(str(url))!r} is not a database URL: SQLAlchemy knows no "
            f"{parsed.drivername!r}; {_EXAMPLES}"
        ) from None
    except ImportError as error:
        extra = "postgres" if parsed.get_backend_name() == "postgresql" else "mysql"
        raise ConfigError(
            f"storage {describe_url(parsed)}: its driver is not installed ({error}); "
            f"install lpsearch[{extra}] or name another driver in the URL"
        ) from None
    if parsed.get_backend_name() == "sqlite" and (parsed.query or (parsed.database or "").startswith("file:")):
        raise ConfigError(
            f"storage {describe_url(parsed)}: lpsearch chooses SQLite's options; write sqlite:///path/study.db, and "
            "a ? of the path as %3F"
        )
    return parsed


def refuse_memory(url: URL) -> None:
    """Refuse a database that is kept in memory only, where the study is to be there after the command.

    Raises:
        ConfigError: if it is one.
    """
    if url.get_backend_name() == "sqlite" and find_sqlite_path(url) is None:
        raise ConfigError(
            "--storage: a SQLite URL without a file is kept in memory only and ends with the command, so nothing could "
            "be resumed or reported; leave --storage out, or write sqlite:///path/study.db"
        )


def _parse_text(text: str) -> URL:
    shown = _mask_text(text)
    try:
        parsed = make_url(text)
    except ArgumentError:
        raise ConfigError(f"storage {shown!r} is not a database URL; {_EXAMPLES}") from None
    except ValueError:
        raise ConfigError(f"storage {shown!r}: its port is not a number; {_EXAMPLES}") from None
    if shown.endswith("://***"):
        raise ConfigError(
            f"storage {shown!r} can be read in two ways; in a user name, a password or a database's name write %40 for "
            "@, %3A for :, %2F for / and %3F for ?"
        )
    return parsed


def _mask_text(text: str) -> str:
    """Return text that may be a URL without its secrets; of what is none, nothing that looks like one."""
    joined = re.sub(r"\s", "", text)
    return mask_urls(joined) if "://" in joined or not set("@=:") & set(joined) else "***"


def describe_url(url: URL) -> str:
    """Return how messages name a database: the path of a SQLite file, else the URL without its secrets."""
    path = find_sqlite_path(url)
    return str(path) if path is not None else mask_urls(url.render_as_string(hide_password=True))


def find_sqlite_path(url: URL) -> Path | None:
    """Return the file of a SQLite URL; None for another database or one in memory."""
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:"):
        return None
    return Path(str(url.database))


@contextmanager
def translate_storage_errors(where: str, url: URL | None = None) -> Iterator[None]:
    """Turn what a database or file system raises into a :class:`StudyError` that names the study.

    Args:
        where: the database, as messages name it.
        url: its URL, whose secrets a driver may repeat.
    """
    try:
        yield
    except (SQLAlchemyError, StorageInternalError, sqlite3.Error, OSError) as error:
        message = f"{where}: {_explain(error, where)}"
        for secret in _list_secrets(url):
            message = message.replace(secret, "***")
        raise StudyError(message) from error


def is_connection_lost(error: StudyError) -> bool:
    """Say whether an error means that a database server ended the connection or cannot be reached; it may come back."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DBAPIError) and not isinstance(cause.orig, sqlite3.Error):
            original: Any = cause.orig
            code = getattr(original, "sqlstate", None) or next(iter(original.args), None)
            # libpq's client, and PyMySQL on a closed socket, have no code of their own for what ends a connection.
            has_no_code = isinstance(cause, OperationalError | InterfaceError) and not isinstance(code, int)
            has_no_code = has_no_code and getattr(original, "sqlstate", None) is None
            return cause.connection_invalidated or code in _LOST_CONNECTIONS or has_no_code
        if isinstance(cause, PendingRollbackError) and cause.code == _INVALIDATED:
            return True
        cause = cause.__cause__
    return False


def _list_secrets(url: URL | None) -> list[str]:
    """Return the password of a URL and the values of its query that messages do not show."""
    if url is None:
        return []
    values = [] if url.password is None else [str(url.password)]
    for name, given in url.query.items():
        if mask_urls(f"db://host?{name}=x").endswith("***"):
            values += [given] if isinstance(given, str) else given
    return sorted(filter(None, values), key=len, reverse=True)


def _explain(error: BaseException, where: str) -> str:
    """Say what went wrong and how to mend it, from the innermost cause."""
    cause: BaseException = error
    while (inner := getattr(cause, "orig", None) or cause.__cause__) is not None:
        cause = inner
    text = " ".join(str(cause).split()) or type(cause).__name__
    if isinstance(cause, PendingRollbackError):  # its own text speaks to who writes the program
        text = "the server ended the connection in the middle of a transaction"
    lowered = text.lower()
    if re.search(r"\bfull\b", lowered) or "no space left" in lowered or "quota" in lowered:
        mend = "free some space and run the same command again; every finished trial is kept"
    elif "locked" in lowered:
        shown = "" if "://" in where else f", and `lsof {shlex.quote(where)}` shows which"
        mend = (
            f"another program holds the database{shown} (a database browser, a backup, another search); end it, then "
            "run the same command again"
        )
    elif "readonly" in lowered or "read-only" in lowered or "permission" in lowered or "unable to open" in lowered:
        mend = "make the file and its directory writable, or name another"
    elif "malformed" in lowered or "not a database" in lowered:
        mend = "it is damaged; move it away (`lpsearch optimize --fresh` does) or restore a copy"
    else:
        mend = "check that the database is reachable and writable, then run the same command again"
    return f"{text}; {mend}"
