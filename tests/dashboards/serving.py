"""Serving a study in this process, and asking a dashboard over the network."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lpsearch.commands.studies import open_existing_study
from lpsearch.search import StudyStore
from lpsearch_dashboard import build_server


@contextmanager
def hold_study(directory: Path) -> Iterator[None]:
    """Hold the lock of a study, as a process that runs it does."""
    with StudyStore(f"sqlite:///{directory / 'study.db'}", study_name="demo") as store, store.hold_lock():
        yield


@contextmanager
def serve(directory: Path, *, storage: str | None = None) -> Iterator[str]:
    """Serve a study in a thread of this process, and give the address."""
    with (
        open_existing_study(directory, storage=storage, study=None, annotates=True) as store,
        build_server(store, directory, port=0) as server,
    ):
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


def fetch(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.loads(answer.read())


def wait_for_address(process: subprocess.Popen[str]) -> str:
    for line in process.stderr:
        found = re.search(r"http://127\.0\.0\.1:\d+/", line)
        if found:
            return found.group()
    raise AssertionError("the dashboard ended before it said where it serves")
