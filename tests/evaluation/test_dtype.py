"""Casting a model only where that keeps its losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lpsearch.data import Windows
from lpsearch.evaluation import ModelEvaluator, apply_dtype, choose_dtype
from lpsearch.plan import Plan
from tests.tiny_models import VOCAB_SIZE, build_tiny_model
from tests.tolerances import FLOAT64_MEAN


@pytest.fixture(scope="module")
def windows() -> Windows:
    return Windows(np.random.default_rng(0).integers(3, VOCAB_SIZE, size=(2, 21), dtype=np.int32), "random")


def _evaluate(model, windows) -> float:
    losses = ModelEvaluator(model=model, windows=windows).evaluate_windows(Plan.baseline(6), [0, 1])
    return float(np.mean(losses.nll_nats_per_token))


def test_an_accurate_cast_is_kept_and_its_difference_reported(windows):
    model = build_tiny_model("llama", tie_word_embeddings=True)
    before = _evaluate(model, windows)
    check = apply_dtype(model, dtype=torch.bfloat16, windows=windows, tolerance=0.1)
    assert check.dtype == model.dtype == torch.bfloat16
    assert check.nll_difference == pytest.approx(_evaluate(model, windows) - before, abs=FLOAT64_MEAN)
    assert check.nll_difference != 0
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_an_inaccurate_cast_is_undone(windows, caplog):
    model = build_tiny_model("llama")
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    check = apply_dtype(model, dtype=torch.bfloat16, windows=windows, tolerance=0.0)
    assert (check.dtype, check.requested) == (torch.float32, torch.bfloat16)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert "staying in float32" in caplog.text


def test_a_loss_that_overflows_is_not_accurate(windows):
    model = build_tiny_model("llama")
    model.model.layers[2].mlp.down_proj.weight.mul_(1e6)
    check = apply_dtype(model, dtype=torch.float16, windows=windows, tolerance=1e9)
    assert not np.isfinite(check.nll_difference)
    assert model.dtype == torch.float32


def test_the_check_wants_a_float32_model(windows):
    with pytest.raises(ValueError, match="load it in float32"):
        apply_dtype(build_tiny_model("llama").bfloat16(), dtype=torch.bfloat16, windows=windows)


def test_a_cpu_takes_bfloat16_only_with_instructions_for_it(monkeypatch):
    for capabilities, expected in (({"avx512_f": True}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert choose_dtype("cpu") == expected
    assert choose_dtype("meta") == torch.float32


@pytest.mark.gpu
def test_a_gpu_takes_bfloat16_from_capability_8():
    expected = torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float32
    assert choose_dtype("cuda") == expected
