"""The study's own tables, beside Optuna's in the same database, and how those of former versions are converted.

They hold what Optuna cannot: a finished trial is immutable there, and its attributes are short strings.
"""

from __future__ import annotations

from typing import Any

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
    func,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import Engine

__all__ = [
    "TABLE_NAMES",
    "claims_table",
    "coordinators_table",
    "create_tables",
    "evaluations_table",
    "fronts_table",
    "is_current",
    "latency_profiles_table",
    "plans_table",
    "studies_table",
    "windows_table",
]

TABLE_PREFIX = "lpsearch_"

# MySQL's TEXT and BLOB end at 64 KB.
_JSON = Text().with_variant(mysql.MEDIUMTEXT(), "mysql", "mariadb")
_BLOB = LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")

_metadata = MetaData()


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

coordinators_table = _table(
    "coordinators",
    Column("id", String(32), primary_key=True),
    Column("study_name", String(512), nullable=False, index=True),
    Column("host", String(255), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("process", String(255), nullable=False),
    Column("budget", Integer),
    Column("lease_s", Double, nullable=False),
    Column("renewed_at", Double, nullable=False),
)
"""Who searches a study on a database server: one row a process, renewed while it lives, by the database's clock.

``process`` tells processes of one machine apart; the budget is NULL until its search has begun.
"""

claims_table = _table(
    "claims",
    Column("subject", String(640), primary_key=True),
    Column("owner", String(255), nullable=False),
    Column("claimed_at", Double, nullable=False),
)
"""Who works on what, at most one owner a subject; the claim lasts as long as the lease of its owner.

The owner is the ``id`` of a coordinator. The time is the database's.
"""

fronts_table = _table(
    "fronts",
    _study_key(primary_key=True),
    Column("front", _JSON, nullable=False),
    Column("updated_at", Double, nullable=False),
)
"""The latest front of a study, the content of its ``front.json``."""

TABLE_NAMES = frozenset(_metadata.tables)

_SERVER_TABLE_NAMES = frozenset({coordinators_table.name})
"""Tables that a SQLite file may lack, which has one coordinator, and is read on a read-only medium too."""


def create_tables(engine: Engine) -> None:
    """Create the tables that a database lacks, and bring those of a former version to this one's form."""
    _metadata.create_all(engine)
    if not is_current(engine):
        _add_variants_and_states(engine)


def is_current(engine: Engine) -> bool:
    """Say whether a database has all tables in the form of this version."""
    inspector = inspect(engine)
    needed = TABLE_NAMES - _SERVER_TABLE_NAMES if engine.dialect.name == "sqlite" else TABLE_NAMES
    if not set(inspector.get_table_names()) >= needed:
        return False
    return "variant" in {found["name"] for found in inspector.get_columns(plans_table.name)}


def _add_variants_and_states(engine: Engine) -> None:
    """Give the plans of a former version a variant, which was raw, and the state that their losses tell."""
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
