"""The model that studies train: its tokenizer is bytes, and it learns."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lpsearch.data import build_windows
from lpsearch.models import load_model, needs_bos, resolve_source
from studies import train_small
from studies.windows_file import load_windows
from tests.tolerances import LOSS_OF_BFLOAT16

TEXT = "naïve café, 東京\n\t x = f(a, b)  # \U0001f642\x00\x7f\xad"


def test_tokens_are_bytes():
    tokenizer = train_small.build_tokenizer()
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert ids == list(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer(TEXT).input_ids == [train_small.BOS_ID, *ids]
    assert needs_bos(tokenizer)


def test_every_byte_has_a_token():
    vocabulary = train_small.build_tokenizer().get_vocab()
    assert sorted(vocabulary.values()) == list(range(257))


def test_trains_a_model_that_lpsearch_loads(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(
            f"File {number}. {text_file.read_text(encoding='utf-8')}", encoding="utf-8"
        )
    out = tmp_path / "model"
    arguments = ["--text", str(texts), "--suffix", ".txt", "--seconds", "3", "--layers", "2", "--hidden", "64"]
    arguments += ["--batch", "4", "--seq-len", "32", "--device", "cpu", "--out", str(out)]
    assert train_small.main(arguments) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["train_tokens"] == document["steps"] * 4 * 31
    assert document["train_nll"] < 0.8 * math.log(256)
    loaded = load_model(resolve_source(str(out)), device="cpu", dtype=torch.float32)
    assert loaded.identity.num_layers == 2
    windows = load_windows(out / "heldout.npz")
    data, heldout = train_small.read_bytes([texts], suffix=".txt", seed=0)
    assert len(data) == document["train_bytes"]
    (tmp_path / "heldout.txt").write_bytes(heldout.numpy().tobytes())
    expected = build_windows(str(tmp_path / "heldout.txt"), tokenizer=loaded.tokenizer, num_windows=16, seq_len=512)
    np.testing.assert_array_equal(windows.input_ids, expected.input_ids)
    ids = torch.from_numpy(windows.input_ids.copy()).long()
    loss = torch.nn.functional.cross_entropy(
        loaded.model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    assert float(loss) == pytest.approx(document["heldout_nll"], abs=LOSS_OF_BFLOAT16)  # saved in bfloat16


def test_the_rate_rises_and_falls():
    rates = [train_small.compute_rate(share / 100) for share in range(101)]
    assert rates[0] == 0
    assert max(rates) == rates[5] == pytest.approx(1)
    assert rates[100] == pytest.approx(0.1)
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_batches_begin_with_bos_and_hold_consecutive_bytes():
    data = torch.arange(200, dtype=torch.uint8)
    batch = train_small.draw_batch(data, batch_size=50, seq_len=9, generator=torch.Generator().manual_seed(0))
    assert batch.shape == (50, 9)
    assert bool((batch[:, 0] == train_small.BOS_ID).all())
    assert bool((batch[:, 2:] - batch[:, 1:-1] == 1).all())
    assert int(batch[:, 1:].max()) <= 199


@pytest.mark.parametrize("text", ["missing", "short.py"])
def test_texts_that_are_no_use_are_refused(text: str, tmp_path: Path):
    (tmp_path / "short.py").write_text("x = 1\n", encoding="utf-8")
    arguments = ["--text", str(tmp_path / text), "--seconds", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert train_small.main(arguments) == 2
