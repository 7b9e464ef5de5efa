"""The coordinators of a study on a database server: each has a lease, which it renews while it lives.

Several processes may search a study at once, on any machines. A lease is judged by the clock of the database alone, so
the clocks of the machines need not agree and may jump. A process that is known to be gone on this machine has no lease.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Double, Row, delete, insert, select, update
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from lpsearch.errors import StudyError
from lpsearch.search.schema import claims_table, coordinators_table

__all__ = ["LEASE_S", "Coordinators", "Member", "database_now"]

logger = logging.getLogger(__name__)

LEASE_S = 60.0
"""How long a coordinator that no longer renews its lease is taken to be alive."""

RENEWALS_PER_LEASE = 4


class database_now(FunctionElement[float]):  # noqa: N801 - it stands in statements as a function of SQL does
    """Seconds since the epoch by the clock of the database."""

    type = Double()
    inherit_cache = True


@compiles(database_now, "postgresql")
def _compile_for_postgresql(element: Any, compiler: Any, **options: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"


@compiles(database_now, "mysql")
@compiles(database_now, "mariadb")
def _compile_for_mysql(element: Any, compiler: Any, **options: Any) -> str:
    # Without an argument it heeds no time zone, so that no hour of the year is there twice.
    return "(UNIX_TIMESTAMP() + 0e0)"


@dataclass(frozen=True)
class Member:
    """A coordinator whose lease is valid.

    Attributes:
        id: unique among all processes.
        host: name of its machine.
        pid: its process id there.
        budget: trials that it searches up to; None while it prepares.
    """

    id: str
    host: str
    pid: int
    budget: int | None

    def __str__(self) -> str:
        """Name the process."""
        return f"{self.pid} on {self.host}"


class Coordinators:
    """The processes that search one study, this one among them while it has joined.

    Args:
        begin_transaction: begins a transaction on the database.
        get_study_name: tells the study, which may be chosen after the database was opened.
        lease_s: how long a lease lasts that is not renewed.
    """

    def __init__(
        self,
        begin_transaction: Callable[[], AbstractContextManager[Connection]],
        get_study_name: Callable[[], str],
        *,
        lease_s: float = LEASE_S,
    ) -> None:
        self._begin_transaction = begin_transaction
        self._get_study_name = get_study_name
        self._lease_s = lease_s
        self._budget: int | None = None
        self._study_name = ""
        self.own_id: str | None = None

    @contextmanager
    def join(self) -> Iterator[None]:
        """Be one of the coordinators during a block; what this process claims is given back at its end.

        Raises:
            StudyError: if the database fails.
        """
        assert self.own_id is None
        self._study_name, self._budget = self._get_study_name(), None
        self.own_id = uuid.uuid4().hex
        with self._begin_transaction() as connection:
            self._write_row(connection)
        has_ended = threading.Event()
        renewer = threading.Thread(target=self._keep_renewing, args=(has_ended,), name="lpsearch-lease", daemon=True)
        renewer.start()
        try:
            yield
        finally:
            has_ended.set()
            renewer.join()
            try:
                with self._begin_transaction() as connection:
                    _remove(connection, self.own_id)
            except StudyError as error:  # the lease ends by itself
                logger.debug("the lease was not given back: %s", error)
            self.own_id = None

    def announce(self, budget: int) -> None:
        """Tell the others that this process searches, and up to how many trials."""
        self._budget = budget
        if self.own_id is not None:
            with self._begin_transaction() as connection:
                self._write_row(connection)

    def list_live(self) -> list[Member]:
        """Return the coordinators whose lease is valid, this process included.

        Raises:
            StudyError: if the database fails.
        """
        with self._begin_transaction() as connection:
            return [_build_member(row) for row in _read_rows(connection, self._get_study_name()) if _is_live(row)]

    def list_others(self) -> list[Member]:
        """Return the coordinators whose lease is valid, without this process."""
        return [member for member in self.list_live() if member.id != self.own_id]

    def remove_if_lost(self, connection: Connection, member_id: str) -> bool:
        """Remove a coordinator whose lease has ended, with its claims; False if it lives.

        Args:
            connection: to the database, in a transaction.
            member_id: the coordinator.
        """
        table = coordinators_table
        row = connection.execute(
            select(table, (database_now() - table.c.renewed_at).label("age_s"))
            .where(table.c.id == member_id)
            .with_for_update()
        ).one_or_none()
        if row is not None and _is_live(row):
            return False
        _remove(connection, member_id)
        return True

    def _write_row(self, connection: Connection) -> None:
        """Renew this process's lease; its row is made anew where others took it for lost."""
        assert self.own_id is not None
        table = coordinators_table
        changing = {"budget": self._budget, "renewed_at": database_now()}
        if not connection.execute(update(table).where(table.c.id == self.own_id).values(changing)).rowcount:
            row = {
                "id": self.own_id,
                "study_name": self._study_name,
                "host": socket.gethostname()[:255],
                "pid": os.getpid(),
                "process": _describe_process(os.getpid()) or "",
                "lease_s": self._lease_s,
            }
            connection.execute(insert(table).values({**row, **changing}))

    def _keep_renewing(self, has_ended: threading.Event) -> None:
        while not has_ended.wait(self._lease_s / RENEWALS_PER_LEASE):
            try:
                with self._begin_transaction() as connection:
                    self._write_row(connection)
            except StudyError as error:  # the search itself says so when it needs the database
                logger.debug("the lease was not renewed: %s", error)


def _read_rows(connection: Connection, study_name: str) -> list[Row[Any]]:
    table = coordinators_table
    age_s = (database_now() - table.c.renewed_at).label("age_s")
    return list(connection.execute(select(table, age_s).where(table.c.study_name == study_name).order_by(table.c.id)))


def _remove(connection: Connection, member_id: str) -> None:
    connection.execute(delete(claims_table).where(claims_table.c.owner == member_id))
    connection.execute(delete(coordinators_table).where(coordinators_table.c.id == member_id))


def _build_member(row: Row[Any]) -> Member:
    return Member(row.id, row.host, row.pid, row.budget)


def _is_live(row: Row[Any]) -> bool:
    """Say whether a lease is valid: not too old, and its process not known to be gone."""
    if row.age_s > row.lease_s:
        return False
    machine = _describe_machine()
    if machine is None or not row.process.startswith(machine):
        return True
    return bool(_describe_process(row.pid) == row.process)


def _describe_process(pid: int) -> str | None:
    """Return a text that no other process of any machine has; None where there is no such process, or it is unknown."""
    machine = _describe_machine()
    try:
        # The name in parentheses may hold spaces; the start time is the 20th field after it (proc(5)).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return None
    return None if machine is None or fields[0] == "Z" else f"{machine}{pid} {fields[19]}"


def _describe_machine() -> str | None:
    """Return a text for what numbers processes: one boot of one machine, and the container in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()} "
    except OSError:
        return None
