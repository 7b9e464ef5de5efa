"""One coordinator a study: a file lock beside a SQLite file, a renewed claim in any other database."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from lpsearch.search.database import claims_table, translate_storage_errors

__all__ = ["Claim", "HeldElsewhereError", "hold_claim", "hold_file_lock"]

CLAIM_LIFETIME_S = 900.0
"""Age at which a claim from another machine counts as abandoned; it is renewed with every evaluation."""


class HeldElsewhereError(Exception):
    """Another process holds the lock.

    Attributes:
        holder: its process id, with its host where that may be another.
    """

    def __init__(self, holder: str) -> None:
        """Store the holder."""
        super().__init__(holder)
        self.holder = holder


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
class Claim:
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
def hold_claim(subject: str, transaction: Callable[[], AbstractContextManager[Connection]]) -> Iterator[Claim]:
    """Hold the only claim on a subject; one whose process is gone is taken over.

    Args:
        subject: what to claim.
        transaction: begins a transaction on the database.

    Raises:
        HeldElsewhereError: if another process holds it.
    """
    claim = Claim(subject, f"{socket.gethostname()}:{os.getpid()}")
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
