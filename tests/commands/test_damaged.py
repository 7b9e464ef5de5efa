"""Losses in a study that no search keeps: each command names where they are, and none computes with them."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.commands.conftest import Run

CHANGES = {
    "an infinite loss of the unmodified model": (
        "UPDATE lpsearch_evaluations SET nll_nats_per_token = 9e999 WHERE split = 'proxy' AND plan_id = "
        "(SELECT min(id) FROM lpsearch_plans)",
        "the unmodified model has a loss of inf on proxy window 0",
    ),
    "an infinite loss of a plan": (
        "UPDATE lpsearch_evaluations SET nll_nats_per_token = -9e999 WHERE split = 'proxy' AND window_idx = 1 AND "
        "plan_id = (SELECT max(id) FROM lpsearch_plans)",
        "the plan that joins ",
    ),
    "no loss of the unmodified model": (
        "UPDATE lpsearch_evaluations SET nll_nats_per_token = NULL WHERE plan_id = "
        "(SELECT min(id) FROM lpsearch_plans)",
        "trial 0, the unmodified model, has no finite loss",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_losses_that_no_search_keeps_are_named(
    run_lpsearch: Run, tiny_model_dir: Path, text_file: Path, tmp_path: Path, change: str
) -> None:
    out = tmp_path / "study"
    search = [
        *("optimize", "--model", tiny_model_dir, "--data", text_file, "--windows", 3, "--seq-len", 24, "--budget", 5),
        *("--latency", "off", "--dtype", "float32", "--device", "cpu", "--out", out),
    ]
    assert run_lpsearch(*search).exit_code == 0
    (out / "report.html").unlink()
    statement, message = CHANGES[change]
    with closing(sqlite3.connect(out / "study.db")) as connection, connection:
        assert connection.execute(statement).rowcount > 0
    for command in (["report", out], [*search, "--budget", 7]):
        outcome = run_lpsearch(*command)
        assert outcome.exit_code == 1, outcome.stderr
        error = outcome.document["error"]
        assert error["type"] == "StudyError"
        for part in (str(out / "study.db"), message, "--fresh"):
            assert part in error["message"]
        assert "weights" not in error["message"]
        assert "the weights themselves are not finite" not in outcome.stderr
        assert "Traceback" not in outcome.stderr
        assert not (out / "report.html").exists()
    assert run_lpsearch(*search, "--fresh").exit_code == 0


@pytest.mark.parametrize("value", ["Infinity", "NaN", "1e999"])
def test_a_front_with_impossible_losses_is_refused(run_lpsearch: Run, tmp_path: Path, value: str) -> None:
    from tests.report.conftest import search_formula

    search_formula(tmp_path, budget=5, heldout=False)
    path = tmp_path / "front.json"
    front = json.loads(path.read_text(encoding="utf-8"))
    front["front"][1]["delta_nll"] = "HERE"
    path.write_text(json.dumps(front).replace('"HERE"', value), encoding="utf-8")
    outcome = run_lpsearch("plan", "pick", tmp_path, "--max-delta", 1)
    assert outcome.exit_code == 1
    message = outcome.document["error"]["message"]
    assert str(path) in message
    assert ("front.1.delta_nll" if value == "1e999" else f"{value} is no number") in message
