"""A latency profile whose estimates are far off: every command that uses it says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.commands.conftest import Run


@pytest.fixture
def profile(run_lpsearch: Run, tiny_model_dir: Path, tmp_path: Path) -> Path:
    """Return a profile of the tiny model."""
    path = tmp_path / "profile.json"
    device = ["--device", "cpu", "--seconds", 0.1, "--context", 8]
    assert run_lpsearch("profile", "--model", tiny_model_dir, *device, "--out", path).exit_code == 0
    return path


def _set_error(profile: Path, error: float) -> None:
    document = json.loads(profile.read_text(encoding="utf-8"))
    for workload in document["workloads"]:
        workload |= {"check_error": 2 * error, "check_mean_error": error}
    profile.write_text(json.dumps(document), encoding="utf-8")


@pytest.mark.parametrize(("error", "is_said"), [(0.34, True), (0.01, False)])
def test_a_profile_that_is_far_off_is_said_wherever_it_is_used(
    run_lpsearch: Run,
    tiny_model_dir: Path,
    text_file: Path,
    tmp_path: Path,
    profile: Path,
    error: float,
    is_said: bool,
) -> None:
    _set_error(profile, error)
    out = tmp_path / "study"
    search = [
        *("optimize", "--model", tiny_model_dir, "--data", text_file, "--windows", 3, "--seq-len", 24, "--budget", 5),
        *("--dtype", "float32", "--device", "cpu", "--out", out),
    ]
    commands = {
        f"--latency {profile}": [*search, "--latency", profile],
        "study.db: the latency profile of the study": [*search, "--budget", 6],
        f"{out}: the latency profile of the study": ["report", out],
        f"{out}/front.json": ["plan", "pick", out, "--max-delta", 100],
        f"{out}/plans/joins-00.json": ["plan", "show", out / "plans" / "joins-00.json"],
    }
    for name, command in commands.items():
        outcome = run_lpsearch(*command)
        assert outcome.exit_code == 0, outcome.stderr
        said = " ".join(outcome.stderr.split())
        assert (f"{name}: estimates of latency were 34% off" in said) == is_said
        assert "latency were" not in said or is_said
    front = json.loads((out / "front.json").read_text(encoding="utf-8"))
    assert (front["latency_error"], front["latency_engine"]) == (error, "runtime")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert ", engine runtime, decode of 1 x 8 tokens" in page
    assert ("(estimated, 34% off where it was checked)" in page) == is_said
    assert ("Latency profile: estimates of latency were 34% off" in page) == is_said


def test_the_profile_that_is_far_off_is_said_when_it_is_measured(
    run_lpsearch: Run, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound below any error that measuring leaves."""
    monkeypatch.setattr("lpsearch.latency.profile.LARGEST_QUIET_ERROR", -1.0)
    arguments = ["--device", "cpu", "--seconds", 0.1, "--context", 8, "--out", tmp_path / "profile.json"]
    outcome = run_lpsearch("profile", "--model", tiny_model_dir, *arguments)
    assert outcome.exit_code == 0, outcome.stderr
    assert f"{tmp_path}/profile.json, decode 1 x 8: estimates of latency were" in " ".join(outcome.stderr.split())
