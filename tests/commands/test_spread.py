"""A search of a model that does not fit into one place gives what it gives where it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from lpsearch.models import loading, placement
from tests.commands.conftest import Run
from tests.tiny_models import build_tiny_model


def test_a_search_of_a_model_that_is_partly_on_disk(
    run_lpsearch: Run, tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(parameter.nbytes for parameter in build_tiny_model("llama", vocab_size=512).parameters())
    monkeypatch.setattr(loading, "choose_max_memory", lambda: {"cpu": size * 2 // 3})
    places: list[str] = []
    describe = placement.describe_placement
    monkeypatch.setattr(loading, "describe_placement", lambda model: places.append(describe(model)) or places[-1])
    command = ["optimize", "--model", tiny_model_dir, "--data", text_file, "--budget", 6, "--device", "cpu"]
    command += ["--windows", 3, "--seq-len", 24, "--latency", "off", "--dtype", "float32"]
    whole = run_lpsearch(*command, "--out", tmp_path / "whole")
    spread = run_lpsearch(*command, "--out", tmp_path / "spread", "--device-map", "auto", "--cache-location", "host")
    assert whole.exit_code == spread.exit_code == 0, spread.stderr
    assert "disk" in places[0]
    assert spread.document["front"] == whole.document["front"]
    evaluate = ["evaluate", tmp_path / "whole" / whole.document["front"][-1]["plan"], "--device", "cpu"]
    losses = [run_lpsearch(*evaluate, *more).document["delta_nll"] for more in ([], ["--device-map", "auto"])]
    assert losses[0] == losses[1]
    refused = run_lpsearch(*command, "--out", tmp_path / "new", "--device-map", "auto", "--recover", "refit")
    assert refused.exit_code == 2
    assert "needs the whole model on one device" in refused.stderr
    resumed = run_lpsearch(*command, "--out", tmp_path / "spread", "--budget", 8)
    assert resumed.document["trials"] == 8, "the place of a model is no setting of a study"
