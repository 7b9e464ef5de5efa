"""What a study keeps beside Optuna's trials: settings, windows, losses by plan and window, profiles, front, lock."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import optuna
from optuna.storages import RDBStorage
from sqlalchemy import Connection, delete, func, insert, select, update
from sqlalchemy.engine import URL

from lpsearch.config import Split, StoredSplit
from lpsearch.errors import StudyError
from lpsearch.json_file import parse_json
from lpsearch.search import optuna_tables, schema
from lpsearch.search.claims import Claims
from lpsearch.search.coordinators import LEASE_S, Coordinators
from lpsearch.search.database import open_optuna_storage
from lpsearch.search.locks import StudyLock
from lpsearch.search.losses import LossStore
from lpsearch.search.storage_url import describe_url, parse_storage_url, translate_storage_errors

__all__ = ["Split", "StoredWindows", "StudyStore"]


@dataclass(frozen=True)
class StoredWindows:
    """Tokenised evaluation windows as the study keeps them.

    Attributes:
        input_ids: int32, ``(windows, seq_len)``.
        spec: where the text came from, e.g. ``wikitext2:validation``.
    """

    input_ids: npt.NDArray[np.int32]
    spec: str


class StudyStore:
    """The database of one study: Optuna's tables and lpsearch's own.

    Several studies can share a database; each store sees the one it was opened for. Use it as a context manager.

    Attributes:
        study_name: name of the Optuna study.
        url: of the database; it holds secrets, so show ``where`` in its place.
        where: the database, as messages name it.
        is_read_only: nothing is written to the database.
        optuna_storage: Optuna's part of it.
        losses: losses by plan, variant and window.
        claims: which plans this process works on, where several search the study.
        lock: held by the process that writes the study; on a database server, by each of several.

    Args:
        url: SQLAlchemy URL, e.g. ``sqlite:///studies/smollm2-135m/study.db``.
        study_name: name of the Optuna study.
        read_only: only read the study, so that it may lie where nothing can be written.
        lease_s: seconds after which others take over what this process works on, if it no longer says that it lives;
            on a database server only.

    Raises:
        ConfigError: for a malformed URL or a missing driver.
        StudyError: for a database that is damaged, unreachable, not writable or another program's.
    """

    def __init__(self, url: str | URL, *, study_name: str, read_only: bool = False, lease_s: float = LEASE_S) -> None:
        self.study_name = study_name
        self.url = parse_storage_url(url)
        self.where = describe_url(self.url)
        self.is_read_only = read_only
        self.optuna_storage: RDBStorage = open_optuna_storage(self.url, read_only=read_only)
        self._engine = self.optuna_storage.engine
        self._study_id: int | None = None
        self._coordinators = Coordinators(self.begin_transaction, lambda: self.study_name, lease_s=lease_s)
        self.claims = Claims(self._coordinators, self.begin_transaction, self.where)
        self.lock = StudyLock(self.url, lambda: self.study_name, coordinators=self._coordinators, claims=self.claims)
        self.losses = LossStore(
            begin_transaction=self.begin_transaction,
            get_study_id=lambda: self.study_id,
            where=self.where,
            claims=self.claims,
        )

    def __enter__(self) -> StudyStore:
        """Return the open store."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the store."""
        self.close()

    def list_live_ids(self) -> set[str]:
        """Return the ids of the coordinators on a database server whose lease is valid."""
        return {member.id for member in self._coordinators.list_live()}

    def close(self) -> None:
        """Close every connection; SQLite then folds its write-ahead log into the file."""
        self.optuna_storage.remove_session()
        self._engine.dispose()

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Turn database errors of the block into :class:`StudyError` that names this study."""
        with translate_storage_errors(self.where, self.url):
            yield

    @contextmanager
    def begin_transaction(self) -> Iterator[Connection]:
        """Yield a connection whose changes are kept if the block ends well."""
        with self.translate_errors(), self._engine.begin() as connection:
            yield connection

    # ---- Settings ----------------------------------------------------------------------------------------------------

    def load_settings(self) -> dict[str, Any] | None:
        """Return what the study was begun with; None if it has not begun."""
        with self.begin_transaction() as connection:
            row = connection.execute(
                select(schema.studies_table.c.settings).where(schema.studies_table.c.name == self.study_name)
            ).one_or_none()
        return None if row is None else self._parse(row.settings, "settings")

    def has_trials(self) -> bool:
        """Say whether a search of the study has begun, so that its trials can be read; there may be none yet."""
        with self.translate_errors():
            return self.study_name in optuna.get_all_study_names(self.optuna_storage)

    def list_studies(self) -> list[str]:
        """Return the names of the studies in the database, the oldest first."""
        table = schema.studies_table
        with self.begin_transaction() as connection:
            return list(connection.execute(select(table.c.name).order_by(table.c.id)).scalars())

    def begin(self, settings: Mapping[str, Any], windows: Mapping[StoredSplit, StoredWindows]) -> None:
        """Begin the study with its settings and windows, all or nothing.

        Args:
            settings: what it is begun with; JSON values only.
            windows: what it evaluates on, and fits repairs to.
        """
        document = json.dumps(settings, sort_keys=True)
        with self.begin_transaction() as connection:
            values = {"name": self.study_name, "settings": document, "created_at": time.time()}
            key = connection.execute(insert(schema.studies_table).values(values)).inserted_primary_key
            assert key is not None
            study_id = key[0]
            for split, kept in windows.items():
                row = _build_windows_row(kept.input_ids, kept.spec)
                connection.execute(insert(schema.windows_table).values(study_id=study_id, split=split, **row))

    def save_settings(self, settings: Mapping[str, Any]) -> None:
        """Begin the study with these settings, or replace those recorded; JSON values only."""
        document = json.dumps(settings, sort_keys=True)
        with self.begin_transaction() as connection:
            table = schema.studies_table
            changed = connection.execute(
                update(table).where(table.c.name == self.study_name).values(settings=document)
            ).rowcount
            if not changed:
                connection.execute(
                    insert(table).values(name=self.study_name, settings=document, created_at=time.time())
                )

    def move_aside(self) -> str | None:
        """Rename the study within its database, so that its name is free for a fresh one; nothing is deleted.

        Returns:
            The name that the old study has now; None if there was none.

        Raises:
            StudyError: if another process runs it.
        """
        with self.hold_lock():
            self.lock.refuse_others()
            return self._rename()

    def _rename(self) -> str | None:
        aside = f"{self.study_name} before {time.strftime('%Y-%m-%dT%H:%M:%S')}"
        own = schema.studies_table
        with self.begin_transaction() as connection:
            changed = connection.execute(update(own).where(own.c.name == self.study_name).values(name=aside)).rowcount
            optuna_tables.rename_study(connection, self.study_name, aside)
        self._study_id = None
        return aside if changed else None

    def delete_study_attribute(self, key: str) -> None:
        """Delete a system attribute of the Optuna study, if it has it."""
        with self.begin_transaction() as connection:
            optuna_tables.delete_study_attribute(connection, self.study_name, key)

    def record_trial(
        self,
        trial: int,
        *,
        params: Mapping[str, Any] | None = None,
        distributions: Mapping[str, Any] | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """Note parameters and user attributes of a running Optuna trial that has none of them yet, all or nothing.

        See :mod:`lpsearch.search.optuna_tables`.
        """
        with self.begin_transaction() as connection:
            if params:
                optuna_tables.record_params(connection, self.study_name, trial, params, distributions or {})
            if attributes:
                optuna_tables.record_attributes(connection, self.study_name, trial, attributes)

    def read_stamp(self) -> str:
        """Return a text that changes whenever the study has a new trial, loss, latency profile or front.

        A few queries that count are all that the database is asked.
        """
        own, plans, evaluations = schema.studies_table, schema.plans_table, schema.evaluations_table
        profiles, fronts = schema.latency_profiles_table, schema.fronts_table
        own_id = select(own.c.id).where(own.c.name == self.study_name).scalar_subquery()
        queries = (
            select(own.c.settings).where(own.c.id == own_id),
            select(func.count()).select_from(evaluations.join(plans)).where(plans.c.study_id == own_id),
            select(func.max(profiles.c.id)).where(profiles.c.study_id == own_id),
            select(fronts.c.updated_at).where(fronts.c.study_id == own_id),
        )
        with self.begin_transaction() as connection:
            found = [sorted(map(str, connection.execute(query))) for query in queries]
            trials = optuna_tables.count_trials(connection, self.study_name)
        return hashlib.sha256(json.dumps([found, sorted(trials.items())]).encode()).hexdigest()

    @property
    def study_id(self) -> int:
        """Key of the study in lpsearch's tables.

        Raises:
            StudyError: if the study has not begun.
        """
        if self._study_id is None:
            with self.begin_transaction() as connection:
                self._study_id = connection.execute(
                    select(schema.studies_table.c.id).where(schema.studies_table.c.name == self.study_name)
                ).scalar_one_or_none()
        if self._study_id is None:
            raise StudyError(f"{self.where}: holds no study {self.study_name!r}; begin it with `lpsearch optimize`")
        return self._study_id

    # ---- Windows -----------------------------------------------------------------------------------------------------

    def save_windows(self, split: StoredSplit, *, input_ids: npt.NDArray[np.integer[Any]], spec: str) -> None:
        """Keep the windows that the study evaluates on.

        Args:
            split: which windows.
            input_ids: ``(windows, seq_len)``.
            spec: where the text came from.

        Raises:
            StudyError: if the study already has other windows, since its losses belong to those.
        """
        row = _build_windows_row(input_ids, spec)
        table = schema.windows_table
        study_id = self.study_id
        with self.begin_transaction() as connection:
            recorded = connection.execute(
                select(table.c.content_hash).where(table.c.study_id == study_id, table.c.split == split)
            ).scalar_one_or_none()
            if recorded is None:
                connection.execute(insert(table).values(study_id=study_id, split=split, **row))
        if recorded not in (None, row["content_hash"]):
            raise StudyError(
                f"{self.where}: study {self.study_name!r} already has other {split} windows; "
                "its losses belong to those, so load them, or begin a fresh study"
            )

    def load_windows(self, split: StoredSplit) -> StoredWindows | None:
        """Return the windows of the study, or None if it has none of this split.

        Raises:
            StudyError: if their content does not match its hash.
        """
        table = schema.windows_table
        study_id = self.study_id
        with self.begin_transaction() as connection:
            row = connection.execute(
                select(table).where(table.c.study_id == study_id, table.c.split == split)
            ).one_or_none()
        if row is None:
            return None
        if _hash_windows(row.input_ids, row.num_windows, row.seq_len) != row.content_hash:
            raise StudyError(f"{self.where}: the stored {split} windows are damaged; restore a copy of the study")
        input_ids = np.frombuffer(row.input_ids, dtype="<i4").reshape(row.num_windows, row.seq_len)
        return StoredWindows(input_ids.astype(np.int32), row.spec)

    # ---- Documents ---------------------------------------------------------------------------------------------------

    def save_latency_profile(self, profile: Mapping[str, Any]) -> None:
        """Keep a latency profile, the content of its file; the latest counts."""
        study_id = self.study_id
        with self.begin_transaction() as connection:
            connection.execute(
                insert(schema.latency_profiles_table).values(
                    study_id=study_id, profile=json.dumps(profile), created_at=time.time()
                )
            )

    def load_latency_profile(self) -> dict[str, Any] | None:
        """Return the latest latency profile of the study, or None."""
        table = schema.latency_profiles_table
        study_id = self.study_id
        with self.begin_transaction() as connection:
            document = connection.execute(
                select(table.c.profile).where(table.c.study_id == study_id).order_by(table.c.id.desc()).limit(1)
            ).scalar_one_or_none()
        return None if document is None else self._parse(document, "latency profile")

    def save_front(self, front: Mapping[str, Any]) -> None:
        """Keep the front, the content of ``front.json``, in place of the former one."""
        table = schema.fronts_table
        study_id = self.study_id
        with self.begin_transaction() as connection:
            connection.execute(delete(table).where(table.c.study_id == study_id))
            connection.execute(insert(table).values(study_id=study_id, front=json.dumps(front), updated_at=time.time()))

    def load_front(self) -> dict[str, Any] | None:
        """Return the front that was kept last, or None."""
        table = schema.fronts_table
        study_id = self.study_id
        with self.begin_transaction() as connection:
            document = connection.execute(
                select(table.c.front).where(table.c.study_id == study_id)
            ).scalar_one_or_none()
        return None if document is None else self._parse(document, "front")

    def _parse(self, document: str, what: str) -> dict[str, Any]:
        """Parse what the study's tables hold as JSON.

        Raises:
            StudyError: if it is damaged.
        """
        try:
            parsed = parse_json(document)
        except ValueError as error:
            raise StudyError(
                f"{self.where}: the {what} of study {self.study_name!r} cannot be read: {error}; restore a copy, or "
                "begin a new study with `lpsearch optimize --fresh`"
            ) from None
        if not isinstance(parsed, dict):
            raise StudyError(
                f"{self.where}: the {what} of study {self.study_name!r} is damaged: expected a JSON object, got "
                f"{type(parsed).__name__}; restore a copy, or begin a new study with `lpsearch optimize --fresh`"
            )
        return parsed

    def hold_lock(self) -> AbstractContextManager[None]:
        """Be the process that writes the study, or one of several; see :meth:`lpsearch.search.locks.StudyLock.hold`."""
        return self.lock.hold()


def _build_windows_row(input_ids: npt.NDArray[np.integer[Any]], spec: str) -> dict[str, Any]:
    blob = np.ascontiguousarray(input_ids, dtype="<i4").tobytes()
    num_windows, seq_len = input_ids.shape
    return {
        "spec": spec,
        "num_windows": num_windows,
        "seq_len": seq_len,
        "content_hash": _hash_windows(blob, num_windows, seq_len),
        "input_ids": blob,
    }


def _hash_windows(blob: bytes, num_windows: int, seq_len: int) -> str:
    return hashlib.sha256(f"{num_windows}x{seq_len}:".encode() + blob).hexdigest()
