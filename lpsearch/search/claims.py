"""Which coordinator works on which plan, where several search a study at once.

A claim is a row with a unique key. It is taken over once the lease of its owner has ended
(:mod:`lpsearch.search.coordinators`). What a claim is held for is written in a transaction that proves the claim, so a
process that was taken for lost, and comes back, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.exc import DBAPIError, IntegrityError

from lpsearch.errors import StudyError
from lpsearch.search.coordinators import Coordinators, database_now
from lpsearch.search.schema import claims_table

__all__ = ["POLL_S", "ClaimLostError", "Claims"]

POLL_S = 0.2
"""How long to wait before looking again whether another coordinator has finished what it works on."""

MAX_ATTEMPTS = 5

_CONFLICTS = {"40001", "40P01", 1205, 1213}
"""Codes of PostgreSQL and MySQL for a transaction that made room for another one: it may be repeated."""


class ClaimLostError(StudyError):
    """Another coordinator took over what this process was at work on, because its lease had ended."""


class _TakenError(Exception):
    """Another process took the claim at the same moment."""


class _ConflictError(Exception):
    """The database had the transaction make room for another one."""


class Claims:
    """The claims of this process. Where a study has one coordinator at a time, everything is its own.

    Args:
        coordinators: who searches the study.
        begin_transaction: begins a transaction on the database.
        where: name of the database, for messages.
    """

    def __init__(
        self,
        coordinators: Coordinators,
        begin_transaction: Callable[[], AbstractContextManager[Connection]],
        where: str,
    ) -> None:
        self._coordinators = coordinators
        self._begin_transaction = begin_transaction
        self._where = where

    @property
    def owner(self) -> str | None:
        """Id of this process among the coordinators; None where a study has one at a time."""
        return self._coordinators.own_id

    def take(self, subject: str) -> bool:
        """Claim a subject, which nobody else then works on; False if another coordinator has it.

        Args:
            subject: what to work on, see :meth:`lpsearch.search.losses.LossStore.name_subject`.

        Raises:
            StudyError: if the database fails.
        """
        if self.owner is None:
            return True
        for attempt in range(MAX_ATTEMPTS):
            try:
                with self._begin_transaction() as connection:
                    return self._try_to_take(connection, subject, may_repeat=attempt + 1 < MAX_ATTEMPTS)
            except _TakenError:
                return False
            except _ConflictError:
                continue
        return False

    def give_back(self, subject: str) -> None:
        """Give a claim back, if this process has it."""
        if self.owner is not None:
            with self._begin_transaction() as connection:
                connection.execute(delete(claims_table).where(self._is_own(subject)))

    @contextmanager
    def finish(self, subject: str) -> Iterator[None]:
        """Give a claim back at the end of a block, during which nobody can take it; an error keeps it.

        Raises:
            ClaimLostError: if another coordinator took it over before.
            StudyError: if the database fails.
        """
        if self.owner is None:
            yield
            return
        with self._begin_transaction() as connection:
            # Until the transaction ends, who inserts the same key waits.
            if not connection.execute(delete(claims_table).where(self._is_own(subject))).rowcount:
                raise self._build_loss(subject)
            yield

    def check(self, connection: Connection, subject: str) -> None:
        """See to it that nobody takes a claim over before the transaction of a connection ends.

        Raises:
            ClaimLostError: if another coordinator took it over before.
        """
        if self.owner is None:
            return
        renewal = update(claims_table).where(self._is_own(subject)).values(claimed_at=database_now())
        if not connection.execute(renewal).rowcount:
            raise self._build_loss(subject)

    def _try_to_take(self, connection: Connection, subject: str, *, may_repeat: bool) -> bool:
        table = claims_table
        try:
            owner = connection.execute(select(table.c.owner).where(table.c.subject == subject)).scalar_one_or_none()
            if owner is not None:
                if owner == self.owner:
                    return True
                if not self._coordinators.remove_if_lost(connection, owner):
                    return False
            row = {"subject": subject, "owner": self.owner, "claimed_at": database_now()}
            connection.execute(insert(table).values(row))
        except IntegrityError:
            raise _TakenError from None
        except DBAPIError as error:
            if may_repeat and _is_conflict(error):
                raise _ConflictError from None
            raise
        return True

    def _is_own(self, subject: str) -> Any:
        return (claims_table.c.subject == subject) & (claims_table.c.owner == self.owner)

    def _build_loss(self, subject: str) -> ClaimLostError:
        return ClaimLostError(f"{self._where}: another process took over the {subject}; this one leaves it alone")


def _is_conflict(error: DBAPIError) -> bool:
    """Say whether the database had a transaction make room for another one."""
    original: Any = error.orig
    return getattr(original, "sqlstate", None) in _CONFLICTS or bool({*original.args[:1]} & _CONFLICTS)
