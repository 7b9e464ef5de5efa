"""A dashboard that is served, and one that is called without a network."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest

pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is not installed")

from lpsearch.commands.studies import open_existing_study
from lpsearch.report import StudyReport
from lpsearch.report.annotations import annotate_study
from lpsearch.search import StudyStore
from lpsearch_dashboard import live
from lpsearch_dashboard.app import build_app
from tests.commands.conftest import run_lpsearch, start_lpsearch
from tests.report.conftest import make_study, search_formula

__all__ = ["make_study", "run_lpsearch", "start_lpsearch"]  # fixtures of other test packages


NUM_TRIALS = 14
"""Trials of the study that :func:`finished_study` copies."""


@dataclass(frozen=True)
class Answer:
    """What an application answers."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Ask = Callable[..., Answer]


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the page be built as often as a test asks for it."""
    monkeypatch.setattr(live, "MAX_BUSY_SHARE", 1e9)


@pytest.fixture(scope="session")
def study_template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyReport]:
    """Run a study once for all tests, with what optuna-dashboard shows of it."""
    directory = tmp_path_factory.mktemp("template")
    report = search_formula(directory, budget=NUM_TRIALS)
    with StudyStore(f"sqlite:///{directory / 'study.db'}", study_name="demo") as store:
        annotate_study(store, report, directory)
    return directory, report


@pytest.fixture
def finished_study(study_template: tuple[Path, StudyReport], tmp_path: Path) -> StudyReport:
    """Put a finished study of ten layers into ``tmp_path``."""
    template, report = study_template
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return report


def build_ask(store: StudyStore, directory: Path) -> Ask:
    """Return a function that asks the application of a study."""
    app = build_app(live.LiveStudy(store, directory), directory)

    def ask(path: str, method: str = "GET", body: bytes = b"", **environ: str) -> Answer:
        asked: dict[str, Any] = {"REQUEST_METHOD": method, "PATH_INFO": path, "wsgi.input": io.BytesIO(body)}
        asked |= {
            "CONTENT_LENGTH": str(len(body)),
            "CONTENT_TYPE": "application/json",
            "HTTP_ACCEPT_ENCODING": "",
            **environ,
        }
        setup_testing_defaults(asked)
        begun: list[Any] = []
        answered = app(asked, lambda status, headers, exc_info=None: begun.append((status, headers)))
        content = b"".join(answered)
        getattr(answered, "close", lambda: None)()
        status, headers = begun[-1]
        return Answer(int(status.split()[0]), dict(headers), content)

    return ask


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Ask]:
    """Return a function that asks the application of the study in ``tmp_path``, opened when first asked."""
    with ExitStack() as held:
        built: list[Ask] = []

        def call(*arguments: Any, **environ: str) -> Answer:
            if not built:
                store = held.enter_context(open_existing_study(tmp_path, storage=None, study=None, annotates=True))
                built.append(build_ask(store, tmp_path))
            return built[0](*arguments, **environ)

        yield call
