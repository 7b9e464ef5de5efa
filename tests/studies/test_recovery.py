"""The study of recovery: its rows are those of the library, and its mixture holds every kind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lpsearch.data import Windows
from studies import recovery, windows_file


def _write_windows(path: Path, count: int, *, seed: int) -> Path:
    tokens = np.random.default_rng(seed).integers(0, 250, (count, 48), dtype=np.int32)
    windows_file.save_windows(path, Windows(tokens, path.stem))
    return path


def test_what_is_fitted_to_holds_every_kind_all_the_way():
    kinds = {
        name: recovery.Kind(
            Windows(np.full((count, 4), value, dtype=np.int32), name), Windows(np.ones((1, 4)), "v"), None
        )
        for name, count, value in (("many", 12, 1), ("few", 4, 2))
    }
    mixed = recovery.mix_to_fit(kinds, 8).input_ids[:, 0].tolist()
    assert sorted(mixed) == [1] * 8 + [2] * 4
    assert all(2 in mixed[start : start + 3] for start in range(0, 12, 3))


def test_a_refit_and_distilling_lower_the_loss(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train = _write_windows(tmp_path / "train.npz", 60, seed=0)
    test = _write_windows(tmp_path / "test.npz", 8, seed=1)
    arguments = [
        "--model", str(tiny_model_dir), "--joins", "1,3", "--text", f"noise={train},{test}", "--sampled", "40",
        "--seq-len", "48", "--test-windows", "8", "--tokens", "6000", "--tokens-per-step", "480",
        "--learning-rate", "1e-3", "--device", "cpu",
    ]  # fmt: skip
    assert recovery.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {row["weights"]: row for row in json.loads(lines[-1])["rows"]}
    assert list(rows) == ["untouched", "refit", "distilled"]
    # On sampled text the loss against the unmodified model is the divergence from it, which both lower.
    losses = [row["losses"]["sampled"][0] for row in rows.values()]
    assert losses[0] > max(losses[1:])
    assert set(rows["refit"]["losses"]) == {"noise", "sampled"}
    assert rows["distilled"]["tokens"] >= 6000


@pytest.mark.parametrize("text", ["", "=a.npz", "name=", "name=a,b,c,d"])
def test_a_text_of_another_form_is_refused(text: str, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert recovery.main(["--model", str(tiny_model_dir), "--joins", "1", "--text", text, "--device", "cpu"]) == 2
    assert "NAME=TRAIN,TEST" in capsys.readouterr().err
