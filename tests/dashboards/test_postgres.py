"""A study on a real PostgreSQL: searched, then served by the command."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
from sqlalchemy import create_engine, inspect, text

from lpsearch.errors import ConfigError, StudyError
from lpsearch.search import PlanSpace, StudyStore, read_results, run_study
from tests.commands.conftest import Run, Start
from tests.dashboards.serving import fetch, wait_for_address
from tests.search.evaluators import SyntheticEvaluator
from tests.warm import WarmProcess, end_all


def test_a_study_on_postgresql_is_served(
    run_lpsearch: Run,
    start_lpsearch: Start,
    postgres_url: str,
    tiny_model_dir: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "study"
    storage = postgres_url.replace("lpsearch@", "lpsearch:secret@")  # it asks for none
    searched = run_lpsearch(
        *("optimize", "--model", tiny_model_dir, "--data", text_file, "--windows", 3, "--seq-len", 24),
        *("--latency", "off", "--dtype", "float32", "--device", "cpu"),
        *("--out", out, "--storage", storage, "--budget", 6),
    )
    assert searched.exit_code == 0, searched.stderr
    assert not (out / "study.db").exists()
    front = searched.document["front"]

    process = start_lpsearch("dashboard", out, "--storage", storage, "--port", 0)
    url = wait_for_address(process)
    shown = fetch(url + "lpsearch/study.json")
    assert shown["state"] == "done"
    assert shown["message"].startswith("6 plans")
    with urlopen(url, timeout=30) as page:
        assert f"plan-{len(front) - 1}" in page.read().decode()
    study = fetch(url + "api/studies/1")
    assert len(study["trials"]) == 6
    assert study["objective_names"] == ["depth_reduction", "perplexity"]
    assert study["note"]["body"].count("\n| ") == len(front) + 2
    hidden = storage.replace("secret", "***")
    command = f"lpsearch dashboard {out} --storage '{hidden}' --study {searched.document['study']}"
    assert f"`{command}`" in study["note"]["body"]
    assert [one["id"] for one in study["plotly_graph_objects"]] == ["lpsearch-front"]
    artifacts = {one["filename"]: one["artifact_id"] for one in study["artifacts"]}
    assert {f"plans/{name}" for name in artifacts} == {point["plan"] for point in front}
    for name, artifact_id in artifacts.items():
        with urlopen(f"{url}artifacts/1/{artifact_id}", timeout=30) as stored:
            assert stored.read() == (out / "plans" / name).read_bytes()
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    assert json.loads(stdout.splitlines()[-1])["study"] == searched.document["study"]


PASSWORD = "Hunter2Tr0ub4dor"


def read_everything(url: str) -> str:
    """Return the text of every row of a database."""
    engine = create_engine(url)
    with engine.connect() as connection:
        names = inspect(connection).get_table_names()
        assert {"studies", "lpsearch_studies"} <= set(names)
        rows = [str(connection.execute(text(f'SELECT * FROM "{name}"')).all()) for name in names]
    engine.dispose()
    return "\n".join(rows)


@pytest.mark.parametrize(
    ("scheme", "user", "query"),
    [
        ("postgres", f"lpsearch:{PASSWORD}@", ""),
        ("postgresql", "lpsearch@", f"?password={PASSWORD}&application_name=search"),
    ],
)
def test_the_password_of_a_study_is_shown_and_kept_nowhere(
    run_lpsearch: Run,
    start_lpsearch: Start,
    postgres_url: str,
    tiny_model_dir: Path,
    text_file: Path,
    tmp_path: Path,
    scheme: str,
    user: str,
    query: str,
) -> None:
    out, shown = tmp_path / "study", []
    storage = postgres_url.replace("postgresql+psycopg://lpsearch@", f"{scheme}://{user}") + query
    optimize = [
        *("optimize", "--model", tiny_model_dir, "--data", text_file, "--windows", 3, "--seq-len", 24),
        *("--latency", "off", "--dtype", "float32", "--device", "cpu", "--out", out, "--storage", storage),
    ]
    report = ["report", out, "--storage", storage]
    for arguments, exit_code in (
        ([*optimize, "--budget", 5], 0),
        ([*optimize, "--budget", 6, "--json"], 0),
        ([*optimize, "--budget", 6, "--windows", 4], 2),
        ([*optimize, "--budget", 4, "--fresh", "--study", "another"], 0),
        (report, 0),
        ([*report, "--study", "none"], 2),
        ([*report, "--out", tmp_path / "absent" / "report.html"], 2),
        (["plan", "pick", out, "--max-delta", 9], 0),
        (["plan", "show", out / "plans" / "joins-00.json"], 0),
        (["evaluate", out / "plans" / "joins-00.json", "--device", "cpu"], 0),
    ):
        outcome = run_lpsearch(*arguments)
        assert outcome.exit_code == exit_code, outcome.stderr
        shown += [outcome.stdout, outcome.stderr]
    process = start_lpsearch("dashboard", out, "--storage", storage, "--port", 0, "--json")
    url = wait_for_address(process)
    studies = [f"api/studies/{one['study_id']}" for one in fetch(url + "api/studies")["study_summaries"]]
    assert len(studies) == 2
    for path in ("", "lpsearch/study.json", "api/studies", *studies, "api/meta", "dashboard"):
        with urlopen(url + path, timeout=30) as page:
            shown.append(page.read().decode())
    process.send_signal(signal.SIGTERM)
    shown += process.communicate(timeout=30)
    shown.append(read_everything(postgres_url))
    shown += [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    assert any("lpsearch dashboard" in one and "***" in one for one in shown), "the note names the masked URL"
    assert not [one for one in shown if PASSWORD in one]


OPEN_AT_ONCE = """
import sys, time
from lpsearch.search import StudyStore

while time.time() < float(sys.argv[2]):
    pass
with StudyStore(sys.argv[1], study_name=sys.argv[3]) as store:
    store.save_settings({})
"""


def test_first_starts_at_once_share_the_making_of_the_tables(postgres_url: str) -> None:
    names = ["a", "b", "c", "d"]
    begin_at = time.time() + 1
    end_all([WarmProcess(postgres_url, begin_at, name, code=OPEN_AT_ONCE) for name in names], timeout=120)
    with StudyStore(postgres_url, study_name="a") as store:
        assert sorted(store.list_studies()) == names


def test_a_study_is_read_without_the_right_to_write(postgres_url: str) -> None:
    with StudyStore(postgres_url, study_name="demo") as store:
        run_study(evaluator=SyntheticEvaluator(6), space=PlanSpace(6), budget=3, store=store)
        with store.hold_lock(), StudyStore(postgres_url, study_name="", read_only=True) as reader:
            reader.study_name = "demo"
            assert reader.lock.find_holder() == f"{os.getpid()} on {socket.gethostname()}"
    engine = create_engine(postgres_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE ROLE reader LOGIN; GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader"))
    engine.dispose()
    with StudyStore(postgres_url.replace("lpsearch@", "reader@"), study_name="demo", read_only=True) as store:
        assert len(read_results(store)) == 3
        assert store.lock.find_holder() is None
    with (
        StudyStore(postgres_url, study_name="demo", read_only=True) as store,
        pytest.raises(StudyError, match="read-only transaction"),
    ):
        store.save_settings({})


def test_a_driver_that_refuses_an_option_does_not_repeat_it(postgres_url: str) -> None:
    with pytest.raises((ConfigError, StudyError), match="nosuchoption") as caught:
        StudyStore(f"{postgres_url}?nosuchoption={PASSWORD}", study_name="demo")
    assert PASSWORD not in str(caught.value)
