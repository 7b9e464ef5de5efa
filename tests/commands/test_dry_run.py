"""What a dry run says, against what the study then takes. No time is compared here: studies/dry_run_check.py does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lpsearch.commands.rehearsal import rehearse_study
from lpsearch.data import Windows
from lpsearch.errors import LpsearchError
from lpsearch.evaluation import ModelEvaluator, probe
from lpsearch.evaluation.probe import measure_evaluation_rates, measure_model_size
from lpsearch.kinds import TextKind
from lpsearch.search import PlanSpace, StudyStore, run_study
from tests.commands.conftest import Run
from tests.tiny_models import FAMILIES, build_tiny_config, build_tiny_model


@pytest.fixture
def arguments(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> list[Any]:
    return [
        *("optimize", "--model", tiny_model_dir, "--data", text_file, "--out", tmp_path / "study", "--latency", "off"),
        *("--windows", 8, "--seq-len", 24, "--device", "cpu", "--dtype", "float32"),
    ]


def count_heldout_tokens(document: dict[str, Any]) -> int:
    return document["front"] * 8 * 23


@pytest.mark.parametrize("metric", ["nll", "kl"])
def test_an_enumerated_study_is_counted_exactly(
    run_lpsearch: Run, arguments: list, metric: str, tmp_path: Path
) -> None:
    arguments += ["--budget", 20, "--metric", metric]
    dry = run_lpsearch(*arguments, "--dry-run")
    assert dry.exit_code == 0, dry.stderr
    assert not (tmp_path / "study").exists()
    assert dry.document["plans"] == 13, "all pairs of six layers"
    assert dry.document["tokens"]["proxy"] == dry.document["tokens"]["proxy_most"] == 13 * 8 * 23
    assert dry.document["tokens"]["heldout"] == count_heldout_tokens(dry.document)
    assert "tokens of the search" in dry.stderr
    study = run_lpsearch(*arguments)
    assert study.document["trials"] == dry.document["plans"]
    assert "2,392 tokens" in study.stderr


def test_racing_is_counted_between_the_least_and_the_most(run_lpsearch: Run, arguments: list) -> None:
    arguments += ["--budget", 11, "--max-group", 4]
    tokens = run_lpsearch(*arguments, "--dry-run").document["tokens"]
    assert tokens["proxy_least"] == (8 + 10 * 4) * 23, "the baseline on all windows, the others on the first rung"
    assert tokens["proxy_most"] == 11 * 8 * 23
    assert tokens["proxy_least"] <= tokens["proxy"] <= tokens["proxy_most"]
    study = run_lpsearch(*arguments)
    found = next(line for line in study.stderr.splitlines() if " tokens, " in line)
    evaluated = int(found.partition("(")[2].partition(" tokens")[0].replace(",", ""))
    assert tokens["proxy_least"] <= evaluated <= tokens["proxy_most"]


@pytest.mark.parametrize("cache_states", [0, 3, 1000])
def test_the_layers_that_run_are_those_of_the_evaluator(tmp_path: Path, cache_states: int) -> None:
    """Of a space that is enumerated, plans and their order do not depend on losses, so the two counts are equal."""
    model = build_tiny_model("llama", num_layers=6)
    windows = Windows(np.random.default_rng(0).integers(3, 90, (6, 16)).astype(np.int32), "random")
    state_bytes = 16 * 32 * 4
    evaluator = ModelEvaluator(model=model, windows=windows, batch_size=3, cache_bytes=cache_states * 3 * state_bytes)
    space = PlanSpace(6, 2)
    with StudyStore(f"sqlite:///{tmp_path / 'study.db'}", study_name="real") as store:
        result = run_study(evaluator=evaluator, space=space, budget=20, store=store)
    counted = rehearse_study(
        space,
        budget=20,
        num_windows=6,
        kinds=(TextKind("random"),),
        sampler="pairset",
        seed=0,
        metric="nll",
        objective="depth",
        staged=True,
        seq_len=16,
        batch_size=3,
        state_bytes=state_bytes,
        cache_bytes=cache_states * 3 * state_bytes,
    )
    usage = evaluator.cache_usage
    assert counted.num_plans == len(result.results)
    assert (counted.proxy.layers, counted.proxy.layers_asked) == (usage.layers_run, usage.layers_asked)
    assert usage.held_bytes <= counted.proxy.held_bytes <= usage.budget_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setattr(probe, "_PROBE_S", 0.0)
    model = build_tiny_model(family)
    size = measure_model_size(build_tiny_config(family))
    layers = model.get_decoder().layers
    assert size.num_parameters == model.num_parameters()
    assert size.num_layers == len(layers) == 6
    in_layers = sum(parameter.numel() for parameter in layers.parameters())
    if family != "qwen3_moe":  # whose layers differ
        assert 6 * size.num_layer_parameters == in_layers
    rates = measure_evaluation_rates(
        build_tiny_config(family), device=torch.device("cpu"), dtype=torch.float32, seq_len=16, num_windows=2
    )
    assert rates.layer_s + rates.rest_s > 0
    assert rates.probe_tokens == 32


def test_a_model_too_large_to_be_measured_is_run_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_MOST_FLOPS", {"cpu": 3e6})
    config = build_tiny_config("llama")
    rates = measure_evaluation_rates(
        config, device=torch.device("cpu"), dtype=torch.float32, seq_len=128, num_windows=4, metric="kl"
    )
    assert 16 <= rates.probe_tokens < 128
    monkeypatch.setattr(probe, "find_free_bytes", lambda device: 1000)
    with pytest.raises(LpsearchError, match="name the hardware with --hardware"):
        measure_evaluation_rates(config, device=torch.device("cpu"), dtype=torch.float32, seq_len=128, num_windows=4)


def test_seventy_billion_parameters_need_no_weights(run_lpsearch: Run, tmp_path: Path) -> None:
    command = ["optimize", "--model", "llama3.1-70b", "--out", tmp_path / "study", "--budget", 6, "--dry-run"]
    one = run_lpsearch(*command, "--hardware", "h100")
    assert one.exit_code == 0, one.stderr
    assert one.document["num_parameters"] == 70_553_706_496
    assert one.document["memory_bytes"]["weights"] == 2 * 70_553_706_496
    assert not one.document["memory_bytes"]["fits"]
    assert "this study does not fit" in one.stderr
    two = run_lpsearch(*command, "--hardware", "2xH100", "--device-map", "auto").document
    memory = two["memory_bytes"]
    assert memory["weights"] + memory["weights_elsewhere"] == 2 * 70_553_706_496
    assert memory["weights_elsewhere"] > 0, "0.8 of two H100s hold 126 GiB"
    four = run_lpsearch(*command, "--hardware", "4xh100", "--device-map", "auto").document
    assert four["memory_bytes"]["weights_elsewhere"] == 0
    assert four["memory_bytes"]["fits"]
    assert four["seconds"]["search"] < two["seconds"]["search"], "no weight is brought for each batch"
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("words", [["--hardware", "abacus", "--dry-run"], ["--hardware", "0xh100", "--dry-run"]])
def test_unknown_hardware_is_refused(run_lpsearch: Run, words: list[str]) -> None:
    outcome = run_lpsearch("optimize", "--model", "llama2-7b", *words)
    assert outcome.exit_code == 2
    assert "h100, h200" in outcome.document["error"]["message"]


def test_hardware_is_for_dry_runs_alone(run_lpsearch: Run) -> None:
    outcome = run_lpsearch("optimize", "--model", "llama2-7b", "--hardware", "h100")
    assert outcome.exit_code == 2
    assert "add --dry-run" in outcome.document["error"]["message"]
