"""Windows sampled from the model: reproducible, cached, and of the model's own distribution."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoTokenizer

from lpsearch.data import Windows, build_windows
from lpsearch.data.sampling import estimate_sampling_bytes, sample_tokens
from lpsearch.errors import ModelError
from tests.tiny_models import build_tiny_model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LPSEARCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model():
    return build_tiny_model("llama", num_layers=2, vocab_size=512)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def _build(model, tokenizer, **changes) -> Windows:
    options = {"num_windows": 3, "seq_len": 12, "seed": 0, "model": model} | changes
    return build_windows("self", tokenizer=tokenizer, **options)


def test_the_same_seed_gives_the_same_windows_without_the_cache(model, tokenizer, tmp_path, monkeypatch):
    first = _build(model, tokenizer)
    monkeypatch.setenv("LPSEARCH_CACHE", str(tmp_path / "another"))
    np.testing.assert_array_equal(_build(model, tokenizer).input_ids, first.input_ids)
    assert (first.input_ids[:, 0] == tokenizer.bos_token_id).all()
    assert first.spec == "self"


@pytest.mark.parametrize("changes", [{"seed": 1}, {"split": "heldout"}])
def test_other_seeds_and_splits_give_other_windows(model, tokenizer, changes):
    base, other = _build(model, tokenizer), _build(model, tokenizer, **changes)
    assert (base.input_ids[:, 1:] != other.input_ids[:, 1:]).mean() > 0.9


def test_the_cache_is_read_checked_and_keyed(model, tokenizer, tmp_path, caplog):
    first = _build(model, tokenizer)
    (path,) = (tmp_path / "cache" / "windows").iterdir()
    changed = first.input_ids.copy()
    changed[0, 1] += 1
    np.save(path, changed)
    np.testing.assert_array_equal(_build(model, tokenizer).input_ids, changed)
    assert _build(build_tiny_model("llama", num_layers=2, vocab_size=512, seed=1), tokenizer).sha256 != first.sha256
    path.write_bytes(b"damaged")
    np.testing.assert_array_equal(_build(model, tokenizer).input_ids, first.input_ids)
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_head_on_the_same_decoder_gives_other_windows(model, tokenizer, dtype):
    """As where a vocabulary was extended, or the head trained alone."""
    model = copy.deepcopy(model).to(dtype)
    first = _build(model, tokenizer)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))
    assert (_build(model, tokenizer).input_ids[:, 1:] != first.input_ids[:, 1:]).mean() > 0.9


def test_a_cache_that_cannot_be_written_costs_only_a_warning(model, tokenizer, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LPSEARCH_CACHE", str(tmp_path / "file"))
    assert _build(model, tokenizer).num_windows == 3
    assert "were not cached" in caplog.text


def test_cached_decoding_draws_what_full_forwards_would(model):
    """The loop below has no cache, no batches of windows and looks for the quantile element by element."""
    drawn = sample_tokens(
        model=model, first_token=1, num_windows=3, seq_len=6, generator=torch.Generator().manual_seed(5)
    )
    uniforms = torch.rand((3, 5), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for row in range(3):
        tokens = [1]
        for position in range(5):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
            probabilities = logits.double().softmax(-1).tolist()
            left, token = float(uniforms[row, position]), 0
            while left >= probabilities[token] and token < len(probabilities) - 1:
                left -= probabilities[token]
                token += 1
            tokens.append(token)
        assert drawn[row].tolist() == tokens


def test_sampled_tokens_follow_the_models_distribution():
    model = build_tiny_model("llama", num_layers=2, vocab_size=8)
    drawn = sample_tokens(
        model=model, first_token=1, num_windows=3000, seq_len=3, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, token] for token in range(8)]), use_cache=False).logits
    first = logits[0, 0].double().softmax(-1)
    second = logits[:, 1].double().softmax(-1)  # (first token, second token)
    assert chisquare(np.bincount(drawn[:, 1], minlength=8), 3000 * first.numpy()).pvalue > 1e-3
    pairs = np.bincount(drawn[:, 1] * 8 + drawn[:, 2], minlength=64)
    expected = (first[:, None] * second).flatten().numpy() * 3000
    usual = expected >= 5
    observed = np.append(pairs[usual], pairs[~usual].sum())
    assert chisquare(observed, np.append(expected[usual], expected[~usual].sum())).pvalue > 1e-3


def test_self_without_a_model_is_refused(tokenizer):
    with pytest.raises(ModelError, match="no model was given"):
        build_windows("self", tokenizer=tokenizer, num_windows=1, seq_len=8)


def test_progress_reaches_its_end(model, tokenizer):
    steps: list[tuple[int, int]] = []
    _build(model, tokenizer, on_progress=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (11, 11)
    assert len(steps) == 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])
def test_a_sequence_takes_the_memory_that_is_estimated(family, dtype):
    model = build_tiny_model(family).to(dtype)
    seq_len = 24
    cache = model(input_ids=torch.zeros((1, seq_len), dtype=torch.long), use_cache=True).past_key_values
    cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    logits_bytes = estimate_sampling_bytes(model, 0)
    assert logits_bytes >= 3 * 8 * model.config.vocab_size  # a distribution, its sum and one more in float64
    estimated = (estimate_sampling_bytes(model, seq_len) - logits_bytes) * 4 // 5
    if family == "qwen3":  # whose last layers keep a window alone
        assert estimated / 2 < cache_bytes < estimated
    else:
        assert cache_bytes == estimated
