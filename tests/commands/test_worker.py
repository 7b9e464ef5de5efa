"""``lpsearch worker``: joins the search of another process, and several processes that run one study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from lpsearch.search import StudyStore, read_results
from tests.commands.conftest import Run, Start


@pytest.fixture
def optimize(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> list[object]:
    """Return a search of the tiny model's 13 plans."""
    return [
        *("optimize", "--model", tiny_model_dir, "--data", text_file, "--windows", 3, "--seq-len", 16),
        *("--latency", "off", "--dtype", "float32", "--device", "cpu", "--out", tmp_path / "study"),
    ]


def test_a_worker_evaluates_plans_of_a_study_that_another_process_searches(
    run_lpsearch: Run, optimize: list[object], tiny_model_dir: Path, postgres_url: str, tmp_path: Path
) -> None:
    storage = ["--storage", postgres_url, "--device", "cpu"]
    assert run_lpsearch(*optimize, "--storage", postgres_url, "--budget", 4).document["trials"] == 4
    refused = run_lpsearch("worker", *storage)
    assert refused.exit_code == 2
    assert "no process searches" in refused.document["error"]["message"]

    before = sorted(tmp_path.rglob("*"))
    with StudyStore(postgres_url, study_name=tiny_model_dir.name) as other, other.hold_lock():
        other.lock.announce(9)
        joined = run_lpsearch("worker", *storage, "--quiet")
    assert joined.exit_code == 0, joined.stderr
    assert joined.document == {
        "study": tiny_model_dir.name,
        "storage": postgres_url,
        "trials": 9,
        "evaluated": 5,
        "timed_out": False,
    }
    assert sorted(tmp_path.rglob("*")) == before, "it writes no file"

    moved = tmp_path / "copy of the model"
    tiny_model_dir.rename(moved)
    try:
        refused = run_lpsearch("worker", *storage, "--budget", 11)
        assert refused.exit_code == 2, refused.stderr
        joined = run_lpsearch("worker", *storage, "--budget", 11, "--model", moved)
        assert joined.document["evaluated"] == 2, joined.stderr
    finally:
        moved.rename(tiny_model_dir)
    document = run_lpsearch(*optimize, "--storage", postgres_url, "--budget", 13).document
    assert document["trials"] == 13
    with StudyStore(postgres_url, study_name=tiny_model_dir.name) as store:
        results = read_results(store)
    assert len(results) == 13 == len({result.plan for result in results})
    assert {point["num_joins"] for point in document["front"]} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--storage", "sqlite:///study.db"], "PostgreSQL or MySQL URL"),
        (["--storage", "nonsense"], "not a database URL"),
        (["--storage", "sqlite://", "--timeout", "0"], "above 0"),
        ([], "--storage"),
    ],
)
def test_what_a_worker_cannot_join_is_refused(run_lpsearch: Run, arguments: list[str], message: str) -> None:
    outcome = run_lpsearch("worker", *arguments)
    assert outcome.exit_code == 2
    assert message in outcome.document["error"]["message"]


def test_two_searches_that_begin_at_once_on_a_server_share_the_study(
    start_lpsearch: Start, optimize: list[object], postgres_url: str, tiny_model_dir: Path
) -> None:
    searches = [start_lpsearch(*optimize, "--storage", postgres_url, "--budget", 13) for _ in range(2)]
    fronts = []
    for search in searches:
        stdout, stderr = search.communicate(timeout=250)
        assert search.returncode == 0, stderr
        document = json.loads(stdout.splitlines()[-1])
        assert document["trials"] == 13
        fronts.append(document["front"])
    assert fronts[0] == fronts[1]
    with StudyStore(postgres_url, study_name=tiny_model_dir.name) as store:
        assert len(read_results(store)) == 13
    engine = create_engine(postgres_url)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM trials WHERE state = 'COMPLETE'")).scalar_one() == 13
        assert connection.execute(text("SELECT count(*) FROM lpsearch_studies")).scalar_one() == 1
    engine.dispose()
