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
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update
from sqlalchemy.engine import URL
from sqlalchemy.exc import IntegrityError

from lpsearch.errors import StudyError
from lpsearch.search.schema import claims_table
from lpsearch.search.storage_url import describe_url, find_sqlite_path, translate_storage_errors

__all__ = ["HeldElsewhereError", "StudyLock", "get_lock_path", "hold_file_lock"]

CLAIM_LIFETIME_S = 900.0
"""Age at which a claim from another machine counts as abandoned; it is renewed with every evaluation."""

PATIENCE_S = 0.5
"""How long a file lock is tried for: others hold it for a moment to make the tables, or to ask who holds it."""


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
        get_study_name: tells the study, which may be chosen after the database was opened.
        begin_transaction: begins a transaction on the database.
    """

    def __init__(
        self,
        url: URL,
        get_study_name: Callable[[], str],
        begin_transaction: Callable[[], AbstractContextManager[Connection]],
    ) -> None:
        self._url = url
        self._get_study_name = get_study_name
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
                    held.enter_context(hold_file_lock(get_lock_path(path)))
                else:
                    self._claim = held.enter_context(_hold_claim(self._subject, self._begin_transaction))
            except HeldElsewhereError as error:
                raise StudyError(
                    f"{describe_url(self._url)}: study {self._get_study_name()!r} is being run by process "
                    f"{error.holder}; wait for it or end it, or name another directory with --out"
                ) from None
            self._is_held = True
            try:
                yield
            finally:
                self._is_held = False
                self._claim = None

    def find_holder(self) -> str | None:
        """Return the process that runs the study, of whatever machine; None if none does. Nothing is written.

        Raises:
            StudyError: if the database fails.
        """
        path = find_sqlite_path(self._url)
        if path is not None:
            return _find_file_lock_holder(get_lock_path(path))
        with self._begin_transaction() as connection:
            row = _find_claim(connection, self._subject)
        return None if row is None or _is_abandoned(row.owner, row.claimed_at) else row.owner

    @property
    def _subject(self) -> str:
        return f"coordinator of {self._get_study_name()}"

    def renew(self, connection: Connection) -> None:
        """Put off the age at which a claim counts as abandoned, where there is one.

        Raises:
            StudyError: if another process took it over.
        """
        if self._claim is not None and not self._claim.renew(connection):
            raise StudyError(
                f"{describe_url(self._url)}: another process took over study {self._get_study_name()!r}; this one stops"
            )


def get_lock_path(path: Path) -> Path:
    """Return the file whose lock stands for a SQLite file."""
    return path.with_name(path.name + ".lock")


@contextmanager
def hold_file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, which the system releases when its holder dies, however it dies.

    Args:
        path: the file; made if it is not there.

    Raises:
        HeldElsewhereError: if another process holds it.
        StudyError: if the file cannot be made.
    """
    deadline = time.monotonic() + PATIENCE_S
    with translate_storage_errors(str(path)):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with translate_storage_errors(str(path)):
            while not _try_lock(descriptor, fcntl.LOCK_EX):
                if time.monotonic() >= deadline:
                    raise HeldElsewhereError(_read_holder(descriptor))
                time.sleep(0.02)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)  # releases the lock; the file stays, since removing it would race with its next holder


def _find_file_lock_holder(path: Path) -> str | None:
    """Return the process that holds the lock on a file; None if none does."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # it was never locked, or this user may not ask
        return None
    try:
        return None if _try_lock(descriptor, fcntl.LOCK_SH) else _read_holder(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_holder(descriptor: int) -> str:
    return os.pread(descriptor, 100, 0).decode().strip() or "of unknown id"


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
        row = _find_claim(connection, subject)
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


def _find_claim(connection: Connection, subject: str) -> Row[Any] | None:
    return connection.execute(select(claims_table).where(claims_table.c.subject == subject)).one_or_none()


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
