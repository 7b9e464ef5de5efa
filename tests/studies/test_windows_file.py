"""Windows files: what was tokenised comes back, and other files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lpsearch.data import Windows, build_windows
from lpsearch.errors import DataError
from lpsearch.models import load_model, resolve_source
from studies import windows_file


def test_holds_what_lpsearch_tokenises(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "windows.npz"
    arguments = ["--model", str(tiny_model_dir), "--data", str(text_file), "--windows", "3", "--seq-len", "20"]
    assert windows_file.main([*arguments, "--spec", "squares", "--out", str(out)]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    loaded = load_model(resolve_source(str(tiny_model_dir)), device="cpu", dtype=torch.float32)
    expected = build_windows(str(text_file), tokenizer=loaded.tokenizer, num_windows=3, seq_len=20)
    whole = windows_file.get_windows(str(out), loaded, num_windows=None, seq_len=None)
    np.testing.assert_array_equal(whole.input_ids, expected.input_ids)
    assert (whole.spec, whole.sha256) == ("squares", expected.sha256) == (document["spec"], document["sha256"])
    part = windows_file.get_windows(str(out), loaded, num_windows=2, seq_len=7)
    np.testing.assert_array_equal(part.input_ids, expected.input_ids[:2, :7])
    text = windows_file.get_windows(str(text_file), loaded, num_windows=3, seq_len=20)
    np.testing.assert_array_equal(text.input_ids, expected.input_ids)


@pytest.mark.parametrize("size", [{"num_windows": 4}, {"seq_len": 6}, {"seq_len": 1}])
def test_more_than_there_is_is_refused(size: dict[str, int], tmp_path: Path):
    path = tmp_path / "windows.npz"
    windows_file.save_windows(path, Windows(np.arange(15, dtype=np.int32).reshape(3, 5), "numbers"))
    with pytest.raises(DataError, match="holds 3 windows of 5 tokens"):
        windows_file.load_windows(path, **size)


@pytest.mark.parametrize(
    "arrays",
    [
        {"input_ids": [[1, 2, 3]]},
        {"input_ids": [1, 2, 3], "spec": "x"},
        {"input_ids": [[1.0, 2.0]], "spec": "x"},
        {"input_ids": [[1, -2]], "spec": "x"},
        {"input_ids": np.zeros((0, 4), np.int32), "spec": "x"},
        None,
    ],
)
def test_a_file_of_another_form_is_refused(arrays: dict[str, object] | None, tmp_path: Path):
    path = tmp_path / "windows.npz"
    if arrays is None:
        path.write_bytes(b"no archive")
    else:
        np.savez(path, **{name: np.asarray(value) for name, value in arrays.items()})
    with pytest.raises(DataError, match=str(path)):
        windows_file.load_windows(path)


def test_tokens_that_the_model_does_not_have_are_refused(tiny_model_dir: Path, tmp_path: Path):
    path = tmp_path / "windows.npz"
    windows_file.save_windows(path, Windows(np.array([[1, 2, 600]], dtype=np.int32), "numbers"))
    loaded = load_model(resolve_source(str(tiny_model_dir)), device="cpu", dtype=torch.float32)
    with pytest.raises(DataError, match="token 600"):
        windows_file.get_windows(str(path), loaded, num_windows=None, seq_len=None)
    with pytest.raises(DataError, match="no such"):
        windows_file.get_windows(str(tmp_path / "missing.npz"), loaded, num_windows=None, seq_len=None)
