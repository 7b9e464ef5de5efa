"""Opening a study's database safely, its own tables, and its errors in plain words.

The tables stand beside Optuna's in the same database and hold what Optuna cannot: a finished trial is immutable there,
and its attributes are short strings.
"""

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
from sqlalchemy import (
    Column,
    Double,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    column,
    event,
    func,
    inspect,
    select,
    table,
    text,
    update,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from lpsearch.errors import ConfigError, StudyError, StudyVersionError

__all__ = [
    "claims_table",
    "describe_url",
    "evaluations_table",
    "find_sqlite_path",
    "fronts_table",
    "latency_profiles_table",
    "open_optuna_storage",
    "optuna_params_table",
    "optuna_studies_table",
    "optuna_study_attributes_table",
    "optuna_trials_table",
    "parse_storage_url",
    "plans_table",
    "studies_table",
    "translate_storage_errors",
    "windows_table",
]

TABLE_PREFIX = "lpsearch_"
BUSY_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 10

# MySQL's TEXT and BLOB end at 64 KB.
_JSON = Text().with_variant(mysql.MEDIUMTEXT(), "mysql", "mariadb")
_BLOB = LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")

_metadata = MetaData()

# Of Optuna's own tables these are read and written past its interface, which cannot do what is said of each.

optuna_studies_table = table("studies", column("study_id"), column("study_name"))
"""Optuna's studies: it cannot rename one."""

optuna_params_table = table(
    "trial_params", column("trial_id"), column("param_name"), column("param_value"), column("distribution_json")
)
"""Optuna's parameters: it writes each in a transaction of its own."""

optuna_study_attributes_table = table("study_system_attributes", column("study_id"), column("key"))
"""Optuna's system attributes of studies: it cannot delete one."""

optuna_trials_table = table("trials", column("trial_id"), column("number"), column("study_id"), column("state"))
"""Optuna's trials: it reads each of them to count them."""


def _table(name: str, *columns: Any) -> Table:
    return Table(TABLE_PREFIX + name, _metadata, *columns)


def _study_key(**options: Any) -> Column[int]:
    return Column("study_id", Integer, ForeignKey(f"{TABLE_PREFIX}studies.id"), nullable=False, **options)


studies_table = _table(
    "studies",
    Column("id", Integer, primary_key=True),
    Column("name", String(512), nullable=False, unique=True),
    Column("settings", _JSON, nullable=False),
    Column("created_at", Double, nullable=False),
)
"""One row a study: its settings as JSON. Times in these tables are seconds since the epoch."""

windows_table = _table(
    "windows",
    _study_key(primary_key=True),
    Column("split", String(16), primary_key=True),
    Column("spec", _JSON, nullable=False),
    Column("num_windows", Integer, nullable=False),
    Column("seq_len", Integer, nullable=False),
    Column("content_hash", String(64), nullable=False),
    Column("input_ids", _BLOB, nullable=False),
)
"""Tokenised windows, little-endian int32, row after row."""

plans_table = _table(
    "plans",
    Column("id", Integer, primary_key=True),
    _study_key(),
    Column("plan_hash", String(64), nullable=False),
    Column("variant", String(32), nullable=False, server_default="raw"),
    Column("state", String(16)),
    Column("groups", Text, nullable=False),
    UniqueConstraint("study_id", "plan_hash"),
)
"""Plans that were evaluated, a row for each variant of the weights.

The hash is SHA-256 of groups and variant, since MySQL indexes no long text. The state is ``complete``, ``stopped`` or
``broken``, and NULL while the plan is evaluated.
"""

evaluations_table = _table(
    "evaluations",
    Column("plan_id", Integer, ForeignKey(f"{TABLE_PREFIX}plans.id"), primary_key=True),
    Column("split", String(16), primary_key=True),
    Column("window_idx", Integer, primary_key=True),
    Column("nll_nats_per_token", Double),
    Column("kl_nats_per_token", Double),
    Column("num_tokens", Integer, nullable=False),
)
"""One row a plan and window. NULL is a loss that is not a finite number: MySQL and SQLite store no NaN."""

latency_profiles_table = _table(
    "latency_profiles",
    Column("id", Integer, primary_key=True),
    _study_key(),
    Column("profile", _JSON, nullable=False),
    Column("created_at", Double, nullable=False),
)
"""Latency profiles that the study used, the newest last."""

claims_table = _table(
    "claims",
    Column("subject", String(640), primary_key=True),
    Column("owner", String(255), nullable=False),
    Column("claimed_at", Double, nullable=False),
)
"""Who works on what, at most one owner a subject."""

fronts_table = _table(
    "fronts",
    _study_key(primary_key=True),
    Column("front", _JSON, nullable=False),
    Column("updated_at", Double, nullable=False),
)
"""The latest front of a study, the content of its ``front.json``."""


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
        _metadata.create_all(storage.engine)
        _migrate(storage.engine)
    return storage


def _migrate(engine: Engine) -> None:
    """Bring the tables of a former version to this one's: until then plans had neither a variant nor a state."""
    if "variant" in {found["name"] for found in inspect(engine).get_columns(plans_table.name)}:
        return
    plans, evaluations = plans_table, evaluations_table
    nll, kl = evaluations.c.nll_nats_per_token, evaluations.c.kl_nats_per_token
    with engine.begin() as connection:
        connection.execute(text(f"ALTER TABLE {plans.name} ADD COLUMN variant VARCHAR(32) NOT NULL DEFAULT 'raw'"))
        connection.execute(text(f"ALTER TABLE {plans.name} ADD COLUMN state VARCHAR(16)"))
        rows = connection.execute(
            select(plans.c.id, plans.c.study_id, func.count(), func.count(nll), func.count(kl))
            .join(evaluations, evaluations.c.plan_id == plans.c.id)
            .where(evaluations.c.split == "proxy")
            .group_by(plans.c.id, plans.c.study_id)
        ).all()
        num_windows: dict[int, int] = {}  # the unmodified model has losses on all of them
        for _, study_id, count, _, _ in rows:
            num_windows[study_id] = max(count, num_windows.get(study_id, 0))
        for plan_id, study_id, count, num_nll, num_kl in rows:
            state = "complete" if count == num_windows[study_id] else "stopped"
            if num_nll < count or 0 < num_kl < count:
                state = "broken"
            connection.execute(update(plans).where(plans.c.id == plan_id).values(state=state))


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
    known = {optuna_studies_table.name, optuna_trials_table.name, *_metadata.tables}
    if tables and not tables & known:
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
