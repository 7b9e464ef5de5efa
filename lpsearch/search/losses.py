"""The losses of a study by plan, variant of the weights, and window, and how far each plan was evaluated."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from sqlalchemy import Connection, Row, insert, select, update

from lpsearch.config import Split
from lpsearch.errors import StudyError
from lpsearch.evaluation.losses import RAW, Variant, WindowLosses
from lpsearch.plan import Plan
from lpsearch.search import schema
from lpsearch.search.claims import Claims

__all__ = ["LossStore", "State", "StoredPlan", "choose_variant", "finite_or_none", "read_variant"]

State = Literal["complete", "stopped", "broken"]
"""Of a plan: evaluated on all proxy windows; stopped by racing before; or with a loss that is not finite."""


@dataclass(frozen=True)
class StoredPlan:
    """What a study's tables know of a plan.

    Attributes:
        state: whether its loss is that of all proxy windows; None while it is evaluated.
        windows: for each split on which it has losses, the windows, ascending, and the loss on each.
    """

    state: State | None
    windows: Mapping[Split, tuple[list[int], WindowLosses]]


class LossStore:
    """The tables of plans and evaluations of one study.

    Args:
        begin_transaction: begins a transaction on the study's database.
        get_study_id: returns the study's key in the tables, once it has begun.
        where: name of the database, for messages.
        claims: of this process; losses are kept only of what it has claimed.
    """

    def __init__(
        self,
        *,
        begin_transaction: Callable[[], AbstractContextManager[Connection]],
        get_study_id: Callable[[], int],
        where: str,
        claims: Claims,
    ) -> None:
        self._begin_transaction = begin_transaction
        self._get_study_id = get_study_id
        self._where = where
        self._claims = claims

    def record(
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

        Raises:
            ClaimLostError: if another coordinator took the plan over.
            StudyError: if the database fails.
        """
        kl_values = losses.kl_nats_per_token or (None,) * len(window_indices)
        study_id = self._get_study_id()
        with self._begin_transaction() as connection:
            self._claims.check(connection, self.name_subject(plan, split=split, variant=variant))
            plan_id = self._find_plan_id(connection, study_id, plan, variant)
            if plan_id is None:
                connection.execute(
                    insert(schema.plans_table).values(
                        study_id=study_id,
                        plan_hash=_hash_plan(plan, variant),
                        variant=variant,
                        groups=plan.key,
                    )
                )
                plan_id = self._find_plan_id(connection, study_id, plan, variant)
            connection.execute(
                insert(schema.evaluations_table),
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

    def name_subject(self, plan: Plan, *, split: Split, variant: Variant = RAW) -> str:
        """Return what a coordinator claims before it evaluates a plan; see :mod:`lpsearch.search.claims`."""
        return f"{split} losses of plan {_hash_plan(plan, variant)} of study {self._get_study_id()}"

    def record_state(self, plan: Plan, state: State, *, variant: Variant = RAW) -> None:
        """Note how far a plan was evaluated, of which losses are kept."""
        study_id = self._get_study_id()
        with self._begin_transaction() as connection:
            plan_id = self._find_plan_id(connection, study_id, plan, variant)
            connection.execute(update(schema.plans_table).where(schema.plans_table.c.id == plan_id).values(state=state))

    def find_evaluated_windows(self, plan: Plan, *, split: Split, variant: Variant = RAW) -> set[int]:
        """Return the windows on which a plan has losses."""
        return set(self.load_known(plan, split=split, variant=variant)[0])

    def load(self, plan: Plan, *, num_windows: int, split: Split, variant: Variant = RAW) -> WindowLosses | None:
        """Return the losses of a plan on windows 0 to ``num_windows - 1``; None unless it has all of them.

        A loss that was not finite comes back as nan.
        """
        window_indices, losses = self.load_known(plan, split=split, num_windows=num_windows, variant=variant)
        return losses if len(window_indices) == num_windows else None

    def load_known(
        self, plan: Plan, *, split: Split, num_windows: int | None = None, variant: Variant = RAW
    ) -> tuple[list[int], WindowLosses]:
        """Return the windows that a plan has losses on, ascending, and these losses; nan where one was not finite.

        Args:
            plan: the plan.
            split: which windows.
            num_windows: look at windows 0 to ``num_windows - 1`` only; None at all of them.
            variant: what was done to the weights before.

        Raises:
            StudyError: for a loss that this project would not have kept.
        """
        table = schema.evaluations_table
        study_id = self._get_study_id()
        with self._begin_transaction() as connection:
            plan_id = self._find_plan_id(connection, study_id, plan, variant)
            chosen = select(table).where(table.c.plan_id == plan_id, table.c.split == split)
            if num_windows is not None:
                chosen = chosen.where(table.c.window_idx < num_windows)
            rows = connection.execute(chosen.order_by(table.c.window_idx)).all()
        return self._read_losses(plan, rows)

    def load_plans(self, *, variant: Variant = RAW, only: Collection[Plan] | None = None) -> dict[str, StoredPlan]:
        """Return what is known of every plan of a variant, by the plan's compact JSON, in the order they came.

        Args:
            variant: what was done to the weights before.
            only: plans to look for; None at all.

        Raises:
            StudyError: for a loss that this project would not have kept.
        """
        plans, evaluations = schema.plans_table, schema.evaluations_table
        study_id = self._get_study_id()
        chosen = (plans.c.study_id == study_id) & (plans.c.variant == variant)
        if only is not None:
            chosen &= plans.c.plan_hash.in_([_hash_plan(plan, variant) for plan in only])
        with self._begin_transaction() as connection:
            rows = connection.execute(
                select(plans.c.groups, plans.c.state, evaluations)
                .join(evaluations, evaluations.c.plan_id == plans.c.id)
                .where(chosen)
                .order_by(plans.c.id, evaluations.c.split, evaluations.c.window_idx)
            ).all()
        loaded: dict[str, StoredPlan] = {}
        for (groups, state), of_plan in groupby(rows, key=lambda row: (row.groups, row.state)):
            plan = Plan.from_key(groups)
            splits = groupby(of_plan, key=lambda row: row.split)
            loaded[groups] = StoredPlan(state, {split: self._read_losses(plan, list(some)) for split, some in splits})
        return loaded

    def list_evaluated(self, *, num_windows: int, split: Split, variant: Variant = RAW) -> list[Plan]:
        """Return the plans that have losses on windows 0 to ``num_windows - 1``, in the order they came."""
        plans = self.load_plans(variant=variant)
        return [
            Plan.from_key(key)
            for key, stored in plans.items()
            if split in stored.windows and stored.windows[split][0][:num_windows] == list(range(num_windows))
        ]

    def _read_losses(self, plan: Plan, rows: Sequence[Row[Any]]) -> tuple[list[int], WindowLosses]:
        """Return the windows and losses of rows of evaluations, of one plan and split."""
        for row in rows:
            for value in (row.nll_nats_per_token, row.kl_nats_per_token):
                if value is not None and not (isinstance(value, float) and math.isfinite(value)):
                    raise StudyError(
                        f"{self._where}: {_name_plan(plan)} has a loss of {value!r} on {row.split} window "
                        f"{row.window_idx}, which no search keeps: the database was changed or is damaged; restore a "
                        "copy, or begin a new study with `lpsearch optimize --fresh`, which moves it aside"
                    )
        has_kl = any(row.kl_nats_per_token is not None for row in rows)
        losses = WindowLosses(
            nll_nats_per_token=tuple(_number_or_nan(row.nll_nats_per_token) for row in rows),
            kl_nats_per_token=tuple(_number_or_nan(row.kl_nats_per_token) for row in rows) if has_kl else None,
            tokens_per_window=rows[0].num_tokens if rows else 0,
        )
        return [row.window_idx for row in rows], losses

    @staticmethod
    def _find_plan_id(connection: Connection, study_id: int, plan: Plan, variant: Variant) -> int | None:
        table = schema.plans_table
        return connection.execute(
            select(table.c.id).where(table.c.study_id == study_id, table.c.plan_hash == _hash_plan(plan, variant))
        ).scalar_one_or_none()


def read_variant(settings: Mapping[str, Any]) -> Variant:
    """Return the variant that the losses of a study's plans are kept under, from its settings."""
    recover: Variant = settings.get("recover", "off")
    return RAW if recover == "off" else recover


def choose_variant(plan: Plan, variant: Variant) -> Variant:
    """Return the variant of a plan's losses in a study of ``variant``; the unmodified model's are always raw."""
    return RAW if plan == Plan.baseline(plan.num_layers) else variant


def _hash_plan(plan: Plan, variant: Variant) -> str:
    """Return the key of a plan and variant; that of a raw plan is the one of studies that knew no variants."""
    return plan.digest if variant == RAW else hashlib.sha256(f"{variant}:{plan.key}".encode()).hexdigest()


def _name_plan(plan: Plan) -> str:
    if plan == Plan.baseline(plan.num_layers):
        return "the unmodified model"
    return f"the plan that joins {', '.join(map(str, plan.joins))}" if plan.joins else f"the plan {plan.key}"


def _number_or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def finite_or_none(value: float | None) -> float | None:
    """Return a number as a database or JSON can hold it: None where it is not finite."""
    return float(value) if value is not None and math.isfinite(value) else None
