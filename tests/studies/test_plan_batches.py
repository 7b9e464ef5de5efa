"""Batches of plans against evaluating each of them by itself."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lpsearch.data import Windows
from lpsearch.evaluation import ModelEvaluator
from lpsearch.search import PlanSpace
from studies import plan_batches
from studies.plan_batches import PlanBatchEvaluator
from tests.tiny_models import VOCAB_SIZE, build_tiny_model
from tests.tolerances import FLOAT32_LOSS


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "smollm3"])
@pytest.mark.parametrize("small_batches", [False, True])
def test_losses_are_those_of_each_plan(family: str, small_batches: bool, monkeypatch: pytest.MonkeyPatch):
    if small_batches:
        monkeypatch.setattr(plan_batches, "MAX_PLANS", 3)
        monkeypatch.setattr(plan_batches, "_BATCH_TOKENS", {"cpu": 32})
        monkeypatch.setattr(plan_batches, "_LOGIT_BYTES", {"cpu": 1})
    model = build_tiny_model(family)
    rng = np.random.default_rng(0)
    windows = Windows(rng.integers(3, VOCAB_SIZE, (4, 16), dtype=np.int32), "random")
    space = PlanSpace(6, 3, allow=("joins", "drop-attention", "drop-mlp"))
    draws = random.Random(0)
    plans = [space.draw_plan(draws.randrange(6), draws) for _ in range(11)]
    plans.append(plans[4])
    evaluator = PlanBatchEvaluator(model, windows)
    found = evaluator.evaluate(plans, [3, 0, 1])
    assert evaluator.num_tokens == 12 * 3 * 16
    slow = ModelEvaluator(model=model, windows=windows, metric="kl", cache_bytes=0)
    for plan, nll, kl in zip(plans, found.nll, found.kl, strict=True):
        expected = slow.evaluate_windows(plan, [3, 0, 1])
        assert nll.tolist() == pytest.approx(expected.nll_nats_per_token, abs=FLOAT32_LOSS)
        assert kl.tolist() == pytest.approx(expected.kl_nats_per_token, abs=FLOAT32_LOSS)
    single = evaluator.evaluate_windows(plans[1], [3, 0, 1])
    assert single.nll_nats_per_token == pytest.approx(found.nll[1], abs=FLOAT32_LOSS)
    assert single.tokens_per_window == 15


def test_windows_are_counted_by_their_tokens():
    windows = Windows(np.full((4, 16), 5, dtype=np.int32), "fives")
    evaluator = PlanBatchEvaluator(build_tiny_model("llama"), windows)
    assert [evaluator.count_windows(tokens) for tokens in (1, 16, 17, 64, 1000)] == [1, 1, 2, 4, 4]
