"""One coordinator a study: a file lock beside a SQLite file, a renewed claim in any other database."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.engine import URL
from sqlalchemy.exc import IntegrityError

from lpsearch.errors import StudyError
from lpsearch.search.database import describe_url, find_sqlite_path, translate_storage_errors
from lpsearch.search.schema import claims_table

__all__ = ["HeldElsewhereError", "StudyLock", "hold_file_lock"]

CLAIM_LIFETIME_S = 900.0
"""Age at which a claim from another machine counts as abandoned; it is renewed with every evaluation."""


class HeldElsewhereError(Exception):
    """Another process holds the lock.

    Attributes:
        holder: its process id, with its host where that may be another.
    """

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


class StudyLock:
    """The right to write a study, which one process has at a time.

    A SQLite file is locked as a whole through ``<file>.lock``, which the system releases when its holder dies. Other
    databases hold a claim, which is renewed with every evaluation and taken over once its process is gone.

    Args:
        url: of the database.
        study_name: the study.
        begin_transaction: begins a transaction on the database.
    """

    def __init__(
        self, url: URL, study_name: str, begin_transaction: Callable[[], AbstractContextManager[Connection]]
    ) -> None:
        self._url = url
        self._study_name = study_name
        self._begin_transaction = begin_transaction
        self._is_held = False
        self._claim: _Claim | None = None

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lock during a block; may be nested.

        Raises:
            StudyError: if another process holds it, naming that process.
        """
        if self._is_held:
            yield
            return
        path = find_sqlite_path(self._url)
        with ExitStack() as held:
            try:
                if path is not None:
                    held.enter_context(hold_file_lock(path.with_name(path.name + ".lock")))
                else:
                    subject = f"coordinator of {self._study_name}"
                    self._claim = held.enter_context(_hold_claim(subject, self._begin_transaction))
            except HeldElsewhereError as error:
                raise StudyError(
                    f"{describe_url(self._url)}: study {self._study_name!r} is being run by process {error.holder}; "
                    "wait for it or end it, or name another directory with --out"
                ) from None
            self._is_held = True
            try:
                yield
            finally:
                self._is_held = False
                self._claim = None

    def renew(self, connection: Connection) -> None:
        """Put off the age at which a claim counts as abandoned, where there is one.

        Raises:
            StudyError: if another process took it over.
        """
        if self._claim is not None and not self._claim.renew(connection):
            raise StudyError(
                f"{describe_url(self._url)}: another process took over study {self._study_name!r}; this one stops"
            )


@contextmanager
def hold_file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, which the system releases when its holder dies, however it dies.

    Raises:
        HeldElsewhereError: if another process holds it.
        StudyError: if the file cannot be made.
    """
    with translate_storage_errors(str(path)):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with translate_storage_errors(str(path)):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise HeldElsewhereError(os.read(descriptor, 100).decode().strip() or "of unknown id") from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)  # releases the lock; the file stays, since removing it would race with its next holder


@dataclass(frozen=True)
class _Claim:
    """A row that says who works on something.

    Attributes:
        subject: what is worked on.
        owner: ``host:pid`` of the process that does.
    """

    subject: str
    owner: str

    def renew(self, connection: Connection) -> bool:
        """Put off the age at which the claim counts as abandoned; False if it was taken over meanwhile."""
        table = claims_table
        ours = (table.c.subject == self.subject) & (table.c.owner == self.owner)
        return connection.execute(update(table).where(ours).values(claimed_at=time.time())).rowcount > 0


@contextmanager
def _hold_claim(subject: str, transaction: Callable[[], AbstractContextManager[Connection]]) -> Iterator[_Claim]:
    """Hold the only claim on a subject; one whose process is gone is taken over.

    Args:
        subject: what to claim.
        transaction: begins a transaction on the database.

    Raises:
        HeldElsewhereError: if another process holds it.
    """
    claim = _Claim(subject, f"{socket.gethostname()}:{os.getpid()}")
    table = claims_table
    with transaction() as connection:
        row = connection.execute(select(table).where(table.c.subject == subject)).one_or_none()
        if row is not None:
            if not _is_abandoned(row.owner, row.claimed_at):
                raise HeldElsewhereError(row.owner)
            # Only the claim that was judged goes: if another process takes it over now, the insertion fails.
            connection.execute(delete(table).where(table.c.subject == subject, table.c.owner == row.owner))
        try:
            connection.execute(insert(table).values(subject=subject, owner=claim.owner, claimed_at=time.time()))
        except IntegrityError:
            raise HeldElsewhereError("that began at the same moment") from None
    try:
        yield claim
    finally:
        with transaction() as connection:
            connection.execute(delete(table).where(table.c.subject == subject, table.c.owner == claim.owner))


def _is_abandoned(owner: str, claimed_at: float) -> bool:
    """Say whether the process of a claim is gone: known on this machine, presumed by age on another."""
    host, _, pid = owner.rpartition(":")
    if host != socket.gethostname():
        return time.time() - claimed_at > CLAIM_LIFETIME_S
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
