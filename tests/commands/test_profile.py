"""``lpsearch profile``: what it writes, what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lpsearch.latency import load_profile
from tests.commands.conftest import Run
from tests.tolerances import FLOAT64_COSTS


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


def test_what_plans_may_drop_is_measured(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    outcome = run_lpsearch(*arguments, "--allow", "joins,drops", "--workload", "decode:2x8,prefill:6")
    assert outcome.exit_code == 0, outcome.stderr
    profile = load_profile(tmp_path / "profile.json")
    assert [(w.kind, w.batch_size, w.context_len) for w in profile.workloads] == [("decode", 2, 8), ("prefill", 1, 6)]
    kinds = ["1 full", "2 full"]
    kinds += ["no attention, 1 MLP", "no attention, 2 MLPs", "1 full, no MLP", "2 full, no MLP"]
    kinds += ["1 full, 2 MLPs", "2 full, 1 MLP"]
    assert all(set(workload.cost_ms) == set(kinds) for workload in profile.workloads)
    assert set(outcome.document["saved_ms"]) == {"an attention dropped", "an MLP dropped"}
    costs = profile.workloads[0].cost_ms
    saved = costs["1 full"] - costs["no attention, 1 MLP"]
    assert outcome.document["saved_ms"]["an attention dropped"] == pytest.approx(saved, abs=FLOAT64_COSTS)
    assert outcome.stderr.count("an MLP dropped") == 2
    assert outcome.document["kv_bytes_per_token"] > 0


def test_an_estimate_says_so(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    outcome = run_lpsearch(*arguments, "--context", 8, "--emulate-tp", 2, "--all-reduce-us", 5)
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.document["emulated"] is True
    assert "estimate" in outcome.document["runtime"]
    assert load_profile(tmp_path / "profile.json").emulated


def test_the_table_says_what_the_last_line_says_where_memory_is_short(
    run_lpsearch: Run, arguments: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lpsearch.latency.measure._MAX_CPU_BYTES", 2 * 75_000)  # bytes of five layers in bfloat16
    outcome = run_lpsearch(*arguments, "--context", 8)
    assert outcome.exit_code == 0, outcome.stderr
    profile = load_profile(tmp_path / "profile.json")
    assert 4 <= profile.workloads[0].num_layers_measured < profile.geometry.num_layers
    document = outcome.document
    speedup = document["baseline_latency_ms"] / document["least_depth_latency_ms"]
    (row,) = [line for line in outcome.stderr.splitlines() if line.strip().startswith("decode 1 x 8")]
    assert f"eager {document['baseline_latency_ms']:.2f} " in row
    assert f"eager {speedup:.2f}x" in row
    assert document["baseline_latency_ms"] == profile.workloads[0].unmodified_ms["eager"]


def test_the_default_context_is_what_the_model_reads(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    outcome = run_lpsearch(*arguments)
    assert outcome.exit_code == 0, outcome.stderr
    assert load_profile(tmp_path / "profile.json").workloads[0].context_len == 127


@pytest.mark.parametrize(
    ("out", "exit_code", "message"),
    [
        ("file/profile.json", 2, "not a file in a directory that exists"),
        ("nowhere/profile.json", 2, "not a file in a directory that exists"),
        ("directory", 2, "is a directory; name a file in it"),
        (f"{'x' * 250}.json", 1, "cannot be written"),  # too long for the temporary file beside it
        (f"{'x' * 300}.json", 1, "cannot be written"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_it_measures(
    run_lpsearch: Run, arguments: list, tmp_path: Path, out: str, exit_code: int, message: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "directory").mkdir()
    outcome = run_lpsearch(*arguments[:-1], tmp_path / out)
    assert outcome.exit_code == exit_code
    assert message in outcome.document["error"]["message"]
    assert "--out" in outcome.document["error"]["message"]
    assert "measuring" not in outcome.stderr


def test_the_engine_is_named(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    with torch.compiler.set_stance("force_eager"):  # what is compiled is tested in tests/latency
        outcome = run_lpsearch(*arguments, "--context", 8, "--engine", "transformers")
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.document["engine"] == "transformers"
    assert "transformers: generate, static cache, compiled step" in outcome.stderr
    assert load_profile(tmp_path / "profile.json").engine == "transformers"


def test_an_engine_that_is_not_installed_is_refused_before_it_measures(
    run_lpsearch: Run, arguments: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    outcome = run_lpsearch(*arguments, "--engine", "llama.cpp")
    assert outcome.exit_code == 2
    expected = "--engine llama.cpp: xllamacpp is not installed here; run pip install 'lpsearch[llamacpp]'"
    assert outcome.document["error"]["message"] == expected
    assert "measuring" not in outcome.stderr


def test_a_file_is_replaced_only_if_that_is_asked_for(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text("precious", encoding="utf-8")
    refused = run_lpsearch(*arguments, "--context", 8)
    assert refused.exit_code == 2
    assert "add --overwrite to replace it" in refused.document["error"]["message"]
    assert "measuring" not in refused.stderr
    assert path.read_text(encoding="utf-8") == "precious"
    outcome = run_lpsearch(*arguments, "--context", 8, "--overwrite")
    assert outcome.exit_code == 0, outcome.stderr
    assert load_profile(path).geometry.num_layers == 6
    for echoed in ("6 layers", "wide layers", "each timed", f"--latency {path}"):
        assert echoed in outcome.stderr


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
        (["--context", "9" * 5000], "expected whole numbers from 0"),
        (["--context", "1,²"], "expected whole numbers from 0"),
        (["--context", "8,100000000"], "--context 100000000: the model reads at most 128 tokens"),
        (["--context", 128, "--tp", 2], "--context 128: the model reads at most 128 tokens"),
        (["--workload", "decode:8"], "--workload decode:8: expected decode:SEQUENCESxTOKENS"),
        (["--workload", "decode:1x8", "--batch", 2], "--workload says what is measured"),
        (["--engine", "transformers", "--tp", 2], "--engine transformers: a model shared by 2 GPUs is not timed there"),
        (["--engine", "transformers", "--context", 0], "--engine transformers: it decodes after a prompt"),
        (["--engine", "transformers", "--emulate-tp", 2, "--all-reduce-us", 5], "a model shared by 2 GPUs is not"),
        (["--engine", "ollama"], "'ollama' is not one of"),
        (["--allow", "splits"], "--allow splits: 'splits' is none of joins, drops"),
        (["--context", 8, "--prefill", 129], "--prefill 129: the model reads at most 128 tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(run_lpsearch: Run, arguments: list, options: list, message: str) -> None:
    outcome = run_lpsearch(*arguments, *options)
    assert outcome.exit_code == 2
    assert message in outcome.document["error"]["message"]
