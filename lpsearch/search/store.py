"""A study's own records beside Optuna's: settings, windows, evaluations by plan and window, profiles, front, lock."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import RDBStorage
from sqlalchemy import Connection, Row, delete, func, insert, select, update

from lpsearch.config import Split
from lpsearch.errors import StudyError
from lpsearch.evaluation.losses import WindowLosses
from lpsearch.plan import Plan
from lpsearch.search import database as db
from lpsearch.search.locks import Claim, HeldElsewhereError, hold_claim, hold_file_lock
from lpsearch.search.results import RAW, State, Variant, finite_or_none

__all__ = ["Split", "StoredPlan", "StoredWindows", "StudyStore"]


@dataclass(frozen=True)
class StoredWindows:
    """Tokenised evaluation windows as the study keeps them.

    Attributes:
        input_ids: int32, ``(windows, seq_len)``.
        spec: where the text came from, e.g. ``wikitext2:validation``.
    """

    input_ids: npt.NDArray[np.int32]
    spec: str


@dataclass(frozen=True)
class StoredPlan:
    """What a study's tables know of a plan.

    Attributes:
        state: whether its loss is that of all proxy windows; None while it is evaluated.
        windows: for each split on which it has losses, the windows, ascending, and the loss on each.
    """

    state: State | None
    windows: Mapping[Split, tuple[list[int], WindowLosses]]


class StudyStore:
    """The database of one study: Optuna's tables and lpsearch's own.

    Several studies can share a database; each store sees the one it was opened for. Use it as a context manager.

    Args:
        url: SQLAlchemy URL, e.g. ``sqlite:///studies/smollm2-135m/study.db``.
        study_name: name of the Optuna study.

    Raises:
        ConfigError: for a malformed URL or a missing driver.
        StudyError: for a database that is damaged, unreachable, not writable or another program's.
    """

    def __init__(self, url: str, *, study_name: str) -> None:
        """Open the database and create the tables that it lacks."""
        self.study_name = study_name
        self._url = db.parse_storage_url(url)
        self.where = db.describe_url(self._url)
        self.optuna_storage: RDBStorage = db.open_optuna_storage(self._url)
        self._engine = self.optuna_storage.engine
        self._study_id: int | None = None
        self._is_locked = False
        self._claim: Claim | None = None

    def __enter__(self) -> StudyStore:
        """Return the open store."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the store."""
        self.close()

    def close(self) -> None:
        """Close every connection; SQLite then folds its write-ahead log into the file."""
        self.optuna_storage.remove_session()
        self._engine.dispose()

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Turn database errors of the block into :class:`StudyError` that names this study."""
        with db.translate_storage_errors(self.where):
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
                select(db.studies_table.c.settings).where(db.studies_table.c.name == self.study_name)
            ).one_or_none()
        return None if row is None else json.loads(row.settings)

    def list_studies(self) -> list[str]:
        """Return the names of the studies in the database, the oldest first."""
        table = db.studies_table
        with self.begin_transaction() as connection:
            return list(connection.execute(select(table.c.name).order_by(table.c.id)).scalars())

    def begin(self, settings: Mapping[str, Any], windows: Mapping[Split, StoredWindows]) -> None:
        """Begin the study with its settings and windows, all or nothing.

        Args:
            settings: what it is begun with; JSON values only.
            windows: what it evaluates on.
        """
        document = json.dumps(settings, sort_keys=True)
        with self.begin_transaction() as connection:
            values = {"name": self.study_name, "settings": document, "created_at": time.time()}
            key = connection.execute(insert(db.studies_table).values(values)).inserted_primary_key
            assert key is not None
            study_id = key[0]
            for split, kept in windows.items():
                row = _build_windows_row(kept.input_ids, kept.spec)
                connection.execute(insert(db.windows_table).values(study_id=study_id, split=split, **row))

    def save_settings(self, settings: Mapping[str, Any]) -> None:
        """Begin the study with these settings, or replace those recorded; JSON values only."""
        document = json.dumps(settings, sort_keys=True)
        with self.begin_transaction() as connection:
            table = db.studies_table
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
        aside = f"{self.study_name} before {time.strftime('%Y-%m-%dT%H:%M:%S')}"
        own, optuna_table = db.studies_table, db.optuna_studies_table
        with self.hold_lock(), self.begin_transaction() as connection:
            changed = connection.execute(update(own).where(own.c.name == self.study_name).values(name=aside)).rowcount
            connection.execute(
                update(optuna_table).where(optuna_table.c.study_name == self.study_name).values(study_name=aside)
            )
        self._study_id = None
        return aside if changed else None

    def delete_study_attribute(self, key: str) -> None:
        """Delete a system attribute of the Optuna study, if it has it."""
        own, studies = db.optuna_study_attributes_table, db.optuna_studies_table
        study_id = select(studies.c.study_id).where(studies.c.study_name == self.study_name).scalar_subquery()
        with self.begin_transaction() as connection:
            connection.execute(delete(own).where(own.c.study_id == study_id, own.c.key == key))

    def record_params(
        self, trial: int, params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution]
    ) -> None:
        """Note all parameters of a running Optuna trial that has none yet.

        Args:
            trial: its number.
            params: values by name.
            distributions: what each value is from.
        """
        if not params:
            return
        trials, studies = db.optuna_trials_table, db.optuna_studies_table
        find_trial_id = (
            select(trials.c.trial_id)
            .join(studies, studies.c.study_id == trials.c.study_id)
            .where(studies.c.study_name == self.study_name, trials.c.number == trial)
        )
        with self.begin_transaction() as connection:
            trial_id = connection.execute(find_trial_id).scalar_one()
            rows = [
                {
                    "trial_id": trial_id,
                    "param_name": name,
                    "param_value": distributions[name].to_internal_repr(value),
                    "distribution_json": distribution_to_json(distributions[name]),
                }
                for name, value in params.items()
            ]
            connection.execute(insert(db.optuna_params_table), rows)

    @property
    def study_id(self) -> int:
        """Key of the study in lpsearch's tables.

        Raises:
            StudyError: if the study has not begun.
        """
        if self._study_id is None:
            with self.begin_transaction() as connection:
                self._study_id = connection.execute(
                    select(db.studies_table.c.id).where(db.studies_table.c.name == self.study_name)
                ).scalar_one_or_none()
        if self._study_id is None:
            raise StudyError(f"{self.where}: holds no study {self.study_name!r}; begin it with `lpsearch optimize`")
        return self._study_id

    # ---- Windows -----------------------------------------------------------------------------------------------------

    def save_windows(self, split: Split, *, input_ids: npt.NDArray[np.integer[Any]], spec: str) -> None:
        """Keep the windows that the study evaluates on.

        Args:
            split: which windows.
            input_ids: ``(windows, seq_len)``.
            spec: where the text came from.

        Raises:
            StudyError: if the study already has other windows, since its losses belong to those.
        """
        row = _build_windows_row(input_ids, spec)
        table = db.windows_table
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

    def load_windows(self, split: Split) -> StoredWindows | None:
        """Return the windows of the study, or None if it has none of this split.

        Raises:
            StudyError: if their content does not match its hash.
        """
        table = db.windows_table
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

    # ---- Evaluations -------------------------------------------------------------------------------------------------

    def record_losses(
        self,
        plan: Plan,
        window_indices: Sequence[int],
        losses: WindowLosses,
        *,
        split: Split,
        variant: Variant = RAW,
    ) -> None:
        """Keep the losses of a plan on some windows, none of which it has losses on yet.

        Args:
            plan: the plan that was evaluated.
            window_indices: which windows, in the order of ``losses``.
            losses: one value a window; values that are not finite are kept as such.
            split: which windows the indices count.
            variant: what was done to the weights before; losses of two variants never mix.
        """
        kl_values = losses.kl_nats_per_token or (None,) * len(window_indices)
        study_id = self.study_id
        with self.begin_transaction() as connection:
            self._renew_claim(connection)
            plan_id = self._find_plan_id(connection, study_id, plan, variant)
            if plan_id is None:
                connection.execute(
                    insert(db.plans_table).values(
                        study_id=study_id,
                        plan_hash=_hash_plan(plan, variant),
                        variant=variant,
                        groups=plan.to_groups_json(),
                    )
                )
                plan_id = self._find_plan_id(connection, study_id, plan, variant)
            connection.execute(
                insert(db.evaluations_table),
                [
                    {
                        "plan_id": plan_id,
                        "split": split,
                        "window_idx": int(window_idx),
                        "nll_nats_per_token": finite_or_none(nll),
                        "kl_nats_per_token": finite_or_none(kl),
                        "num_tokens": losses.tokens_per_window,
                    }
                    for window_idx, nll, kl in zip(window_indices, losses.nll_nats_per_token, kl_values, strict=True)
                ],
            )

    def record_state(self, plan: Plan, state: State, *, variant: Variant = RAW) -> None:
        """Note how far a plan was evaluated, of which losses are kept."""
        study_id = self.study_id
        with self.begin_transaction() as connection:
            plan_id = self._find_plan_id(connection, study_id, plan, variant)
            connection.execute(update(db.plans_table).where(db.plans_table.c.id == plan_id).values(state=state))

    def find_evaluated_windows(self, plan: Plan, *, split: Split, variant: Variant = RAW) -> set[int]:
        """Return the windows on which a plan has losses."""
        return set(self.load_known_losses(plan, split=split, variant=variant)[0])

    def load_losses(self, plan: Plan, *, num_windows: int, split: Split, variant: Variant = RAW) -> WindowLosses | None:
        """Return the losses of a plan on windows 0 to ``num_windows - 1``; None unless it has all of them.

        A loss that was not finite comes back as nan.
        """
        window_indices, losses = self.load_known_losses(plan, split=split, num_windows=num_windows, variant=variant)
        return losses if len(window_indices) == num_windows else None

    def load_known_losses(
        self, plan: Plan, *, split: Split, num_windows: int | None = None, variant: Variant = RAW
    ) -> tuple[list[int], WindowLosses]:
        """Return the windows that a plan has losses on, ascending, and these losses; nan where one was not finite.

        Args:
            plan: the plan.
            split: which windows.
            num_windows: look at windows 0 to ``num_windows - 1`` only; None at all of them.
            variant: what was done to the weights before.
        """
        table = db.evaluations_table
        study_id = self.study_id
        with self.begin_transaction() as connection:
            plan_id = self._find_plan_id(connection, study_id, plan, variant)
            chosen = select(table).where(table.c.plan_id == plan_id, table.c.split == split)
            if num_windows is not None:
                chosen = chosen.where(table.c.window_idx < num_windows)
            rows = connection.execute(chosen.order_by(table.c.window_idx)).all()
        return _read_losses(rows)

    def load_plans(self, *, variant: Variant = RAW) -> dict[str, StoredPlan]:
        """Return what is known of every plan of a variant, by the plan's compact JSON, in the order they came."""
        plans, evaluations = db.plans_table, db.evaluations_table
        study_id = self.study_id
        with self.begin_transaction() as connection:
            rows = connection.execute(
                select(plans.c.groups, plans.c.state, evaluations)
                .join(evaluations, evaluations.c.plan_id == plans.c.id)
                .where(plans.c.study_id == study_id, plans.c.variant == variant)
                .order_by(plans.c.id, evaluations.c.split, evaluations.c.window_idx)
            ).all()
        loaded: dict[str, StoredPlan] = {}
        for (groups, state), of_plan in groupby(rows, key=lambda row: (row.groups, row.state)):
            windows = {split: _read_losses(list(some)) for split, some in groupby(of_plan, key=lambda row: row.split)}
            loaded[groups] = StoredPlan(state, windows)
        return loaded

    def list_evaluated_plans(self, *, num_windows: int, split: Split, variant: Variant = RAW) -> list[Plan]:
        """Return the plans that have losses on windows 0 to ``num_windows - 1``, in the order they came."""
        plans, evaluations = db.plans_table, db.evaluations_table
        study_id = self.study_id
        with self.begin_transaction() as connection:
            rows = connection.execute(
                select(plans.c.groups)
                .join(evaluations, evaluations.c.plan_id == plans.c.id)
                .where(
                    plans.c.study_id == study_id,
                    plans.c.variant == variant,
                    evaluations.c.split == split,
                    evaluations.c.window_idx < num_windows,
                )
                .group_by(plans.c.id, plans.c.groups)
                .having(func.count() == num_windows)
                .order_by(plans.c.id)
            )
            return [Plan.from_groups(json.loads(groups)) for groups in rows.scalars()]

    @staticmethod
    def _find_plan_id(connection: Connection, study_id: int, plan: Plan, variant: Variant) -> int | None:
        table = db.plans_table
        return connection.execute(
            select(table.c.id).where(table.c.study_id == study_id, table.c.plan_hash == _hash_plan(plan, variant))
        ).scalar_one_or_none()

    # ---- Documents ---------------------------------------------------------------------------------------------------

    def save_latency_profile(self, profile: Mapping[str, Any]) -> None:
        """Keep a latency profile, the content of its file; the latest counts."""
        study_id = self.study_id
        with self.begin_transaction() as connection:
            connection.execute(
                insert(db.latency_profiles_table).values(
                    study_id=study_id, profile=json.dumps(profile), created_at=time.time()
                )
            )

    def load_latency_profile(self) -> dict[str, Any] | None:
        """Return the latest latency profile of the study, or None."""
        table = db.latency_profiles_table
        study_id = self.study_id
        with self.begin_transaction() as connection:
            document = connection.execute(
                select(table.c.profile).where(table.c.study_id == study_id).order_by(table.c.id.desc()).limit(1)
            ).scalar_one_or_none()
        return None if document is None else json.loads(document)

    def save_front(self, front: Mapping[str, Any]) -> None:
        """Keep the front, the content of ``front.json``, in place of the former one."""
        table = db.fronts_table
        study_id = self.study_id
        with self.begin_transaction() as connection:
            connection.execute(delete(table).where(table.c.study_id == study_id))
            connection.execute(insert(table).values(study_id=study_id, front=json.dumps(front), updated_at=time.time()))

    def load_front(self) -> dict[str, Any] | None:
        """Return the front that was kept last, or None."""
        table = db.fronts_table
        study_id = self.study_id
        with self.begin_transaction() as connection:
            document = connection.execute(
                select(table.c.front).where(table.c.study_id == study_id)
            ).scalar_one_or_none()
        return None if document is None else json.loads(document)

    # ---- One coordinator ---------------------------------------------------------------------------------------------

    @contextmanager
    def hold_lock(self) -> Iterator[None]:
        """Be the only process that writes the study; may be nested.

        A SQLite file is locked as a whole through ``<file>.lock``, which the system releases when its holder dies.
        Other databases hold a claim, which is renewed with every evaluation and taken over once its process is gone.

        Raises:
            StudyError: if another process holds it, naming that process.
        """
        if self._is_locked:
            yield
            return
        path = db.find_sqlite_path(self._url)
        with ExitStack() as held:
            try:
                if path is not None:
                    held.enter_context(hold_file_lock(path.with_name(path.name + ".lock")))
                else:
                    subject = f"coordinator of {self.study_name}"
                    self._claim = held.enter_context(hold_claim(subject, self.begin_transaction))
            except HeldElsewhereError as error:
                raise StudyError(
                    f"{self.where}: study {self.study_name!r} is being run by process {error.holder}; "
                    "wait for it or end it, or name another directory with --out"
                ) from None
            self._is_locked = True
            try:
                yield
            finally:
                self._is_locked = False
                self._claim = None

    def _renew_claim(self, connection: Connection) -> None:
        if self._claim is not None and not self._claim.renew(connection):
            raise StudyError(f"{self.where}: another process took over study {self.study_name!r}; this one stops")


def _hash_plan(plan: Plan, variant: Variant) -> str:
    """Return the key of a plan and variant; that of a raw plan is the one of studies that knew no variants."""
    text = plan.to_groups_json() if variant == RAW else f"{variant}:{plan.to_groups_json()}"
    return hashlib.sha256(text.encode()).hexdigest()


def _read_losses(rows: Sequence[Row[Any]]) -> tuple[list[int], WindowLosses]:
    """Return the windows and losses of rows of evaluations, of one plan and split."""
    has_kl = any(row.kl_nats_per_token is not None for row in rows)
    losses = WindowLosses(
        nll_nats_per_token=tuple(_number_or_nan(row.nll_nats_per_token) for row in rows),
        kl_nats_per_token=tuple(_number_or_nan(row.kl_nats_per_token) for row in rows) if has_kl else None,
        tokens_per_window=rows[0].num_tokens if rows else 0,
    )
    return [row.window_idx for row in rows], losses


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


def _number_or_nan(value: float | None) -> float:
    return math.nan if value is None else value
