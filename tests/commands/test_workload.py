"""``lpsearch optimize --workload``: a mix of workloads is what the latency is of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lpsearch.latency import LatencyModel, load_profile
from lpsearch.plan import Plan, load_plan
from tests.commands.conftest import Run
from tests.tolerances import FLOAT64_COSTS
from tests.warm import run_warm

MIX = "decode:1x8,prefill:16@3"


@pytest.fixture(scope="module")
def profile_path(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a profile of three workloads; tests read it."""
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    options = ("--workload", "decode:1x8,decode:2x8,prefill:16", "--device", "cpu", "--seconds", 0.1, "--out", path)
    made = run_warm("profile", "--model", tiny_model_dir, *options)
    assert made.returncode == 0, made.stderr
    return path


@pytest.fixture
def arguments(tiny_model_dir: Path, text_file: Path, profile_path: Path, tmp_path: Path) -> list[object]:
    return [
        *("optimize", "--model", tiny_model_dir, "--data", text_file, "--windows", 3, "--seq-len", 24, "--budget", 4),
        *("--objective", "latency", "--latency", profile_path),
        *("--dtype", "float32", "--device", "cpu", "--out", tmp_path / "study"),
    ]


def test_a_mix_is_searched_recorded_and_resumed(
    run_lpsearch: Run, arguments: list, profile_path: Path, tmp_path: Path
) -> None:
    outcome = run_lpsearch(*arguments, "--workload", MIX)
    assert outcome.exit_code == 0, outcome.stderr
    profile = load_profile(profile_path)
    unmodified = Plan.baseline(profile.geometry.num_layers)
    decode, prefill = LatencyModel(profile, 0), LatencyModel(profile, 2)
    for point in outcome.document["front"]:
        plan = load_plan(tmp_path / "study" / point["plan"])
        share = 0.25 * decode.estimate_latency_ms(plan) / decode.estimate_latency_ms(unmodified)
        share += 0.75 * prefill.estimate_latency_ms(plan) / prefill.estimate_latency_ms(unmodified)
        assert point["speedup"] == pytest.approx(1 / share, abs=FLOAT64_COSTS)
        assert plan.metadata.metrics.latency.workload == "decode:1x8@0.25,prefill:16@0.75"
        assert plan.metadata.metrics.latency.kv_bytes_per_token > 0
    assert "decode:1x8@0.25,prefill:16@0.75" in outcome.stderr
    assert "decode:1x8@0.25,prefill:16@0.75" in (tmp_path / "study" / "report.html").read_text(encoding="utf-8")
    again = run_lpsearch(*arguments, "--workload", "decode:1x8@2", "--workload", "prefill:16@6")  # the same
    assert again.exit_code == 0, again.stderr
    assert run_lpsearch(*arguments).document["front"] == again.document["front"]  # as recorded
    refused = run_lpsearch(*arguments, "--workload", "decode:1x8")
    assert refused.exit_code == 2
    message = refused.document["error"]["message"]
    assert "--workload was decode:1x8@0.25,prefill:16@0.75, now decode:1x8@1" in message


def test_a_study_of_the_first_workload_keeps_it(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    assert run_lpsearch(*arguments).exit_code == 0
    refused = run_lpsearch(*arguments, "--workload", "decode:2x8")
    assert refused.exit_code == 2
    assert "--workload was " in refused.document["error"]["message"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workload", "decode:4x8"], "it has no workload decode:4x8 (it has decode:1x8, decode:2x8, prefill:16)"),
        (["--workload", "prefill:500"], "--workload prefill:500: the model reads at most 128 tokens"),
        (["--workload", "decode:x8"], "--workload decode:x8: expected"),
        (["--workload", "decode:1x8", "--objective", "depth", "--latency", "off"], "--latency off that none does"),
    ],
)
def test_what_cannot_be_searched_by_is_refused(
    run_lpsearch: Run, arguments: list, options: list, message: str, tmp_path: Path
) -> None:
    outcome = run_lpsearch(*arguments, *options)
    assert outcome.exit_code == 2
    assert message in outcome.document["error"]["message"]
    assert not (tmp_path / "study" / "front.json").exists()
    assert run_lpsearch(*arguments, "--workload", "decode:2x8").exit_code == 0  # nothing was recorded


@pytest.mark.usefixtures("brief_timing")
@pytest.mark.slow
def test_workloads_are_measured_where_there_is_no_profile(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    auto = ["--latency", "auto", "--workload", "decode:2x4,prefill:8"]
    outcome = run_lpsearch(*arguments, *auto)
    assert outcome.exit_code == 0, outcome.stderr
    plan = json.loads((tmp_path / "study" / outcome.document["front"][0]["plan"]).read_text(encoding="utf-8"))
    assert plan["metrics"]["latency"]["workload"] == "decode:2x4@0.5,prefill:8@0.5"
