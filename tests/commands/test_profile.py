"""``lpsearch profile``: what it writes, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from lpsearch.latency import load_profile
from tests.commands.conftest import Run


@pytest.fixture
def arguments(tiny_model_dir: Path, tmp_path: Path) -> list:
    model = ["--model", tiny_model_dir, "--device", "cpu"]
    return ["profile", *model, "--seconds", 0.1, "--out", tmp_path / "profile.json"]


def test_every_batch_meets_every_context(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    outcome = run_lpsearch(*arguments, "--batch", "1,2", "--context", "4,8", "--prefill", "6")
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.document["workloads"] == 5
    assert outcome.document["emulated"] is False
    workloads = load_profile(tmp_path / "profile.json").workloads
    assert [(w.kind, w.batch_size, w.context_len) for w in workloads] == [
        ("decode", 1, 4),
        ("decode", 1, 8),
        ("decode", 2, 4),
        ("decode", 2, 8),
        ("prefill", 1, 6),
    ]
    assert "speed-up against" in outcome.stderr


def test_an_estimate_says_so(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    outcome = run_lpsearch(*arguments, "--context", 8, "--emulate-tp", 2, "--all-reduce-us", 5)
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.document["emulated"] is True
    assert "estimate" in outcome.document["runtime"]
    assert load_profile(tmp_path / "profile.json").emulated


@pytest.mark.slow
def test_ranks_are_started(run_lpsearch: Run, arguments: list) -> None:
    outcome = run_lpsearch(*arguments, "--context", 8, "--tp", 2)
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.document["num_ranks"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "1,x"], "--batch 1,x: expected whole numbers from 1"),
        (["--batch", "0"], "--batch 0: expected whole numbers from 1"),
        (["--tp", 4], "2 key-value heads cannot be divided over 4 ranks; choose one of 1, 2"),
        (["--emulate-tp", 2], "--emulate-tp and --all-reduce-us go together"),
        (["--emulate-tp", 2, "--all-reduce-us", 5, "--tp", 2], "give one of them"),
        (["--emulate-tp", 2, "--all-reduce-us", 5, "--prefill", 8], "decode steps only"),
    ],
)
def test_what_cannot_be_measured_is_refused(run_lpsearch: Run, arguments: list, options: list, message: str) -> None:
    outcome = run_lpsearch(*arguments, *options)
    assert outcome.exit_code == 2
    assert message in outcome.document["error"]["message"]
