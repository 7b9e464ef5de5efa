"""A timed study of a random tiny model: what it counts, against counting by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lpsearch.data import Windows
from lpsearch.models import load_geometry
from studies import search_large
from studies.windows_file import save_windows


@pytest.mark.parametrize("metric", ["kl", "nll"])
def test_reports_what_a_study_ran(metric: str, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--model", str(tiny_model_dir), "--trials", "8", "--windows", "3", "--seq-len", "20"]
    arguments += ["--metric", metric, "--device", "cpu", "--dtype", "float32"]
    assert search_large.main(arguments) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (document["trials"], document["metric"], document["parameters"] > 0) == (8, metric, True)
    assert document["tokens"] <= document["tokens_unstaged"] == 8 * 3 * 20
    assert 0 < document["layers_run"] < document["layers_asked"]
    assert document["study_s"] > 0
    assert document["front"][0] == [0, 0.0]
    assert len(document["front"]) > 1
    if metric == "kl":  # every layer matters
        assert min(cost for joins, cost in document["front"] if joins > 0) > 1e-4


def test_predicts_from_the_products_of_matrices(tiny_model_dir: Path):
    """A layer has four attention projections and three of the MLP; attention multiplies twice with half of itself."""
    config = load_geometry(str(tiny_model_dir))
    model = search_large.build_random_model(config, device=torch.device("cpu"), dtype=torch.float32, seed=0)
    hidden, inner, seq_len = config.hidden_size, config.intermediate_size, 20
    keys = config.num_key_value_heads * config.head_dim
    queries = config.num_attention_heads * config.head_dim
    weights = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * inner
    attention = 2 * (2 * seq_len * seq_len * queries) // 2
    assert search_large.count_flops(model, seq_len=seq_len) == (
        2 * seq_len * weights + attention,
        2 * seq_len * hidden * config.vocab_size,
    )


def test_hidden_states_stay_in_scale(tiny_model_dir: Path):
    config = load_geometry(str(tiny_model_dir))
    model = search_large.build_random_model(config, device=torch.device("cpu"), dtype=torch.float32, seed=1)
    ids = torch.arange(3, 40)[None]
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    scales = [float(state.std()) for state in states]
    assert all(0.5 < scale < 5 for scale in scales)
    assert not torch.equal(states[1], states[2])


def test_reads_a_windows_file(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "windows.npz"
    save_windows(path, Windows(np.arange(40, dtype=np.int32).reshape(2, 20), "numbers"))
    arguments = ["--model", str(tiny_model_dir), "--trials", "3", "--windows-file", str(path), "--device", "cpu"]
    assert search_large.main(arguments) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (document["windows"], document["seq_len"], document["data"]) == (2, 20, "numbers")
    assert search_large.main([*arguments, "--trials", "0"]) == 2
