"""One coordinator a SQLite file, which a file lock beside it holds; on a database server several, each with a lease."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sqlalchemy.engine import URL

from lpsearch.errors import StudyError
from lpsearch.search.claims import POLL_S, Claims
from lpsearch.search.coordinators import Coordinators, Member
from lpsearch.search.interrupts import let_interrupts_through
from lpsearch.search.storage_url import describe_url, find_sqlite_path, translate_storage_errors

__all__ = ["HeldElsewhereError", "StudyLock", "get_lock_path", "hold_file_lock"]

logger = logging.getLogger(__name__)

PATIENCE_S = 0.5
"""How long a file lock is tried for: others hold it for a moment to make the tables, or to ask who holds it."""


class HeldElsewhereError(Exception):
    """Another process holds the lock.

    Attributes:
        holder: its process id, with its host.
    """

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


class StudyLock:
    """The right to write a study.

    A SQLite file is locked as a whole through ``<file>.lock``, which the system releases when its holder dies: it has
    one coordinator at a time. A study on a database server has any number, each of which joins the others. They begin
    the study one after another: the first makes what the others then find.

    Args:
        url: of the database.
        get_study_name: tells the study, which may be chosen after the database was opened.
        coordinators: who searches the study.
        claims: of this process.
    """

    def __init__(
        self, url: URL, get_study_name: Callable[[], str], *, coordinators: Coordinators, claims: Claims
    ) -> None:
        self._url = url
        self._get_study_name = get_study_name
        self._coordinators = coordinators
        self._claims = claims
        self._is_held = False

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lock, or be one of the coordinators, during a block; may be nested.

        Raises:
            StudyError: if the database fails, or another process holds the lock of a SQLite file, naming it.
        """
        if self._is_held:
            yield
            return
        path = find_sqlite_path(self._url)
        with ExitStack() as held:
            if path is not None:
                try:
                    held.enter_context(hold_file_lock(get_lock_path(path)))
                except HeldElsewhereError as error:
                    raise self._build_refusal(error.holder) from None
            elif self._url.get_backend_name() != "sqlite":  # nobody else sees a database in memory
                held.enter_context(self._coordinators.join())
            self._is_held = True
            try:
                yield
            finally:
                self._is_held = False

    def wait_for_turn(self) -> None:
        """Wait until no other coordinator begins the study; those that come later wait for :meth:`end_turn`.

        Raises:
            StudyError: if the database fails.
        """
        is_told = False
        while not self._claims.take(self._turn):
            if not is_told:
                others = ", ".join(map(str, self._coordinators.list_others()))
                logger.info("waiting for another process, which begins the study (%s)", others)
                is_told = True
            with let_interrupts_through():
                time.sleep(POLL_S)

    def end_turn(self) -> None:
        """Let the others go on that wait for their turn."""
        self._claims.give_back(self._turn)

    def announce(self, budget: int) -> None:
        """Tell the others that this process searches, and up to how many trials."""
        self._coordinators.announce(budget)

    def refuse_others(self) -> None:
        """Refuse what nobody may do while others search the study.

        Raises:
            StudyError: naming these processes.
        """
        others = self.list_searching()
        if others:
            raise self._build_refusal(", ".join(map(str, others)))

    def list_searching(self) -> list[Member]:
        """Return the other coordinators that search the study; none where it has one at a time."""
        if self._url.get_backend_name() == "sqlite":
            return []
        return [member for member in self._coordinators.list_others() if member.budget is not None]

    def find_holder(self) -> str | None:
        """Return the processes that run the study, of whatever machine; None if none does. Nothing is written.

        Raises:
            StudyError: if the database fails.
        """
        path = find_sqlite_path(self._url)
        if path is not None:
            return _find_file_lock_holder(get_lock_path(path))
        if self._url.get_backend_name() == "sqlite":
            return None
        return ", ".join(sorted(map(str, self._coordinators.list_live()))) or None

    @property
    def _turn(self) -> str:
        return f"beginning of study {self._get_study_name()}"

    def _build_refusal(self, holder: str) -> StudyError:
        return StudyError(
            f"{describe_url(self._url)}: study {self._get_study_name()!r} is being run by process {holder}; wait for "
            "it or end it, or name another directory with --out"
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
            os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
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
    return os.pread(descriptor, 300, 0).decode(errors="replace").strip() or "of unknown id"
