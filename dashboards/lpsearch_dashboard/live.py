"""The study as the live page shows it: read again when it changed, at a bounded share of the machine's time."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from lpsearch.errors import UsageError
from lpsearch.front_file import FRONT_NAME
from lpsearch.report import StudyReport, load_report
from lpsearch.report.html import PAGE_TOP, build_parts, read_asset
from lpsearch.search import StudyStore
from lpsearch.search.storage_url import find_sqlite_path
from lpsearch.wording import escape_html as escape
from lpsearch.wording import name_count

__all__ = ["LiveStudy", "Snapshot"]

MAX_BUSY_SHARE = 0.1
"""Share of one core that building the page may take: the machine is there for the search."""


@dataclass(frozen=True)
class Snapshot:
    """What there is to show of a study at one time.

    Attributes:
        state: while a process runs the study, ``waiting`` before the first plan is finished, then ``searching``. When
            none does, ``done`` if the plan files are those of the front, else ``interrupted``. ``lost`` is a page of a
            study that cannot be read.
        message: the same for people.
        title: of the page, as HTML.
        body: ``<header>`` and ``<main>``.
        data: the figures as JSON; ``null`` while waiting.
    """

    state: str
    message: str
    title: str
    body: str
    data: str

    @property
    def etag(self) -> str:
        """Return the HTTP entity tag of what is shown."""
        content = "\0".join((self.state, self.message, self.body, self.data))
        return f'"{hashlib.sha256(content.encode()).hexdigest()[:32]}"'

    def to_json(self) -> str:
        """Return what the page needs to renew itself."""
        fields = json.dumps({"state": self.state, "message": self.message, "body": self.body})
        return f'{fields[:-1]}, "data": {self.data}}}'


class LiveStudy:
    """A study that others may be writing; safe for several threads.

    Args:
        store: its database; nothing is written to it.
        directory: its directory.
    """

    def __init__(self, store: StudyStore, directory: Path) -> None:
        self._store = store
        self._directory = directory
        self._lock = threading.Lock()
        self._database_lock = threading.Lock()  # of its own: reading the study takes long
        self._database_path = find_sqlite_path(store.url)
        self._inode = self._read_inode()
        self._revision = ""
        self._snapshot: Snapshot | None = None
        self._failure: Exception | None = None
        self._not_before = 0.0

    @property
    def store(self) -> StudyStore:
        """Its database."""
        return self._store

    @property
    def inode(self) -> int | None:
        """The database file that was last followed, by its number; None for another kind of database."""
        return self._inode

    def read(self) -> Snapshot:
        """Return what there is to show now, or was a moment ago.

        Raises:
            StudyError: if the study cannot be read.
        """
        with self._lock:
            began_at = time.monotonic()
            if began_at < self._not_before:
                if self._failure is not None:
                    raise self._failure.with_traceback(None)
                if self._snapshot is not None:
                    return self._snapshot
            self._failure = None
            self.follow_database()
            revision = self._read_revision()
            if self._snapshot is None or revision != self._revision:
                try:
                    self._snapshot = self._build()
                    self._revision = revision
                except Exception as error:  # to read a study that cannot be shown takes as long
                    self._failure = error
                    raise
                finally:
                    duration_s = time.monotonic() - began_at
                    self._not_before = began_at + duration_s / MAX_BUSY_SHARE
            return self._snapshot

    def render_page(self) -> str:
        """Return the whole page as it is now.

        Raises:
            StudyError: if the study cannot be read.
        """
        snapshot = self.read()
        return _render(snapshot, etag=snapshot.etag, optuna_path=self._find_optuna_path())

    def render_failure(self, reason: str) -> str:
        """Return a page for a study that cannot be read now, which shows the study once it can.

        Args:
            reason: why it cannot be read.
        """
        snapshot = self._build_waiting("lost", reason, _LOST)
        return _render(snapshot, etag="", optuna_path="/dashboard")  # no tag, so that the first answer is whole

    def follow_database(self) -> None:
        """Release a database file that was moved aside, as by ``optimize --fresh``, and open the one in its place.

        Raises:
            StudyError: if there is none; SQLite would make one.
        """
        with self._database_lock:
            inode = self._read_inode()
            if inode != self._inode:
                self._store.optuna_storage.engine.dispose()
                self._inode = inode

    def _read_inode(self) -> int | None:
        if self._database_path is None:
            return None
        with self._store.translate_errors():
            return self._database_path.stat().st_ino

    def _read_revision(self) -> str:
        """Return a text that changes with the study, the files of its front, and the process that runs it."""
        known = f"{self._store.read_stamp()} {self._store.lock.find_holder()}"
        try:
            status = (self._directory / FRONT_NAME).stat()
        except FileNotFoundError:
            return known
        return f"{known} {status.st_ino} {status.st_mtime_ns} {status.st_size}"

    def _build(self) -> Snapshot:
        is_run = self._store.lock.find_holder() is not None
        try:
            report = load_report(self._store, self._directory)
        except UsageError as error:  # no plan is finished yet
            state, message = "waiting", "waiting for the first plan"
            if not is_run:
                state, message = "interrupted", f"the search ended before its first plan; {_RESUME}"
            return self._build_waiting(state, message, f"{error}; the figures appear by themselves.")
        parts = build_parts(report)
        state = "searching" if is_run else "done" if report.is_current else "interrupted"
        return Snapshot(state, _describe(report, state), parts.title, parts.body, parts.data)

    def _build_waiting(self, state: str, message: str, note: str) -> Snapshot:
        name = escape(self._store.study_name)
        return Snapshot(
            state, message, f"{name}: layer parallelism", _WAITING.format(name=name, note=escape(note)), "null"
        )

    def _find_optuna_path(self) -> str:
        """Return where optuna-dashboard shows the study; its list of studies where Optuna does not have it yet."""
        with self._store.translate_errors():
            try:
                study_id = self._store.optuna_storage.get_study_id_from_name(self._store.study_name)
            except KeyError:
                return "/dashboard"
        return f"/dashboard/studies/{study_id}"


def _describe(report: StudyReport, state: str) -> str:
    plans = name_count(len(report.results), "plan")
    if state == "done":
        return f"{plans}; the search is done, and its plan files are written"
    if state == "interrupted":
        return f"{plans} so far; the search was interrupted; {_RESUME}"
    return f"{plans} so far; this page follows the search"


def _render(snapshot: Snapshot, *, etag: str, optuna_path: str) -> str:
    return _PAGE.format(
        meta="",
        title=snapshot.title,
        style=read_asset("page.css") + _read_own_asset("live.css"),
        state=snapshot.state,
        etag=escape(etag),
        message=escape(snapshot.message),
        optuna_path=optuna_path,
        body=snapshot.body,
        data=snapshot.data,
        scripts="".join(f'<script src="/lpsearch/{name}"></script>\n' for name in _list_scripts(snapshot)),
    )


def _list_scripts(snapshot: Snapshot) -> tuple[str, ...]:
    return ("live.js",) if snapshot.data == "null" else ("plotly.js", "page.js", "live.js")


def _read_own_asset(name: str) -> str:
    return files("lpsearch_dashboard").joinpath(name).read_text(encoding="utf-8")


_WAITING = "<header><div class='bar'><h1>{name}</h1></div></header>\n<main id='main'><p class='note'>{note}</p></main>"

_RESUME = "run the same command to resume it"

_LOST = "The study cannot be read now. This page tries again, and shows the study once it can be read."

_PAGE = (
    PAGE_TOP
    + """<div id="live" data-state="{state}" data-etag="{etag}"><p role="status"><span class="dot"></span>\
<span id="live-message">{message}</span></p><a href="{optuna_path}">Optuna dashboard</a></div>
{body}
<script type="application/json" id="data">{data}</script>
{scripts}</body>
</html>
"""
)
