"""Losses against float64 written out, on every family; order, batches and chunks do not matter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lpsearch.data import Windows
from lpsearch.errors import FamilyError, PlanError
from lpsearch.evaluation import ModelEvaluator
from lpsearch.evaluation import evaluator as evaluator_module
from lpsearch.models.families import get_decoder_layers
from lpsearch.plan import Plan
from lpsearch.transform import applied_plan
from tests.tiny_models import FAMILIES, VOCAB_SIZE, build_tiny_model
from tests.tolerances import FLOAT32_LOSS, NLL_NATS_PER_TOKEN

PLAN = Plan.from_groups([[0], [1, 2], [3, 4, 5]])
WIKITEXT = Path(__file__).parents[3] / "shared" / "data" / "wikitext2-valid.txt"


@pytest.fixture(scope="module")
def windows() -> Windows:
    tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, size=(4, 21), dtype=np.int32)
    return Windows(tokens, "random")


def _reference_log_probs(model, plan, windows) -> torch.Tensor:
    """Log-probabilities of the whole model's own logits, float64, (windows, seq, vocab)."""
    input_ids = torch.tensor(windows.input_ids, dtype=torch.long)
    with torch.no_grad(), applied_plan(model, plan):
        logits = torch.stack([model(input_ids=row[None], use_cache=False).logits[0] for row in input_ids])
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_equal_the_definition(family, windows):
    model = build_tiny_model(family)
    losses = ModelEvaluator(model=model, windows=windows, metric="kl", batch_size=3).evaluate_windows(PLAN, range(4))
    plan, base = (_reference_log_probs(model, p, windows) for p in (PLAN, Plan.baseline(6)))
    nll, kl = [], []
    for index, row in enumerate(windows.input_ids):
        nll.append(-np.mean([float(plan[index, t - 1, row[t]]) for t in range(1, len(row))]))
        kl.append(float((base[index].exp() * (base[index] - plan[index])).sum(-1)[:-1].mean()))
    assert losses.nll_nats_per_token == pytest.approx(nll, abs=FLOAT32_LOSS)
    assert losses.kl_nats_per_token == pytest.approx(kl, abs=FLOAT32_LOSS)
    assert min(kl) > 10 * FLOAT32_LOSS, "the plan must change something for the comparison to mean anything"
    assert losses.tokens_per_window == 20


def test_windows_are_answered_in_the_order_asked_for(windows):
    evaluator = ModelEvaluator(model=build_tiny_model("llama"), windows=windows, batch_size=2)
    whole = evaluator.evaluate_windows(PLAN, [0, 1, 2, 3])
    some = evaluator.evaluate_windows(PLAN, [3, 0, 3])
    expected = [whole.nll_nats_per_token[index] for index in (3, 0, 3)]
    assert some.nll_nats_per_token == pytest.approx(expected, abs=FLOAT32_LOSS)
    assert whole.kl_nats_per_token is None
    with pytest.raises(IndexError, match=r"window 4 is outside \[0, 4\)"):
        evaluator.evaluate_windows(PLAN, [4])


def test_chunks_of_positions_change_nothing(windows, monkeypatch):
    model = build_tiny_model("gemma2")
    whole = ModelEvaluator(model=model, windows=windows, metric="kl").evaluate_windows(PLAN, [0, 1])
    monkeypatch.setattr(evaluator_module, "_LOGIT_CHUNK_BYTES", 4 * VOCAB_SIZE * 7)  # 7, 7 and 6 positions
    chunked = ModelEvaluator(model=model, windows=windows, metric="kl").evaluate_windows(PLAN, [0, 1])
    assert chunked.nll_nats_per_token == pytest.approx(whole.nll_nats_per_token, abs=FLOAT32_LOSS)
    assert chunked.kl_nats_per_token == pytest.approx(whole.kl_nats_per_token, abs=FLOAT32_LOSS)


@pytest.mark.parametrize("metric", ["nll", "kl"])
def test_a_variant_of_the_weights_shares_nothing_with_the_raw_model(windows, metric):
    model = build_tiny_model("llama")
    plans = [Plan.from_joins(6, joins) for joins in [(), (3,), (1, 4), (4,)]]
    options = {"model": model, "windows": windows, "metric": metric, "batch_size": 2}
    cached = ModelEvaluator(**options, cache_bytes=1 << 30)
    repaired_layer = get_decoder_layers(model)[2].mlp.down_proj.weight

    def evaluate(evaluator, variant="raw"):
        return [evaluator.evaluate_windows(plan, range(4), variant=variant) for plan in plans]

    if metric == "kl":
        with pytest.raises(ValueError, match="raw model on windows"):
            cached.evaluate_windows(plans[0], range(4), variant="refit")
    raw = evaluate(cached)
    kept = repaired_layer.detach().clone()
    with torch.no_grad():
        repaired_layer *= 1.5
    repaired = evaluate(cached, "refit")
    assert all(some.nll_nats_per_token != other.nll_nats_per_token for some, other in zip(repaired, raw, strict=True))
    uncached = ModelEvaluator(model=model, windows=windows, batch_size=2, cache_bytes=0)
    for some, other in zip(repaired, evaluate(uncached), strict=True):
        assert some.nll_nats_per_token == other.nll_nats_per_token
    with torch.no_grad():
        repaired_layer.copy_(kept)
    asked = cached.cache_usage.layers_run
    assert evaluate(cached) == raw
    assert cached.cache_usage.layers_run - asked < 4 * 4 * 6, "the raw states are still there"


def test_the_baseline_has_no_divergence_and_the_model_is_left_as_it_was(windows):
    model = build_tiny_model("llama")
    input_ids = torch.tensor(windows.input_ids, dtype=torch.long)
    with torch.no_grad():
        before = model(input_ids=input_ids, use_cache=False).logits
    evaluator = ModelEvaluator(model=model, windows=windows, metric="kl")
    assert evaluator.evaluate_windows(Plan.baseline(6), range(4)).kl_nats_per_token == (0.0,) * 4
    evaluator.evaluate_windows(PLAN, range(4))
    with pytest.raises(PlanError):
        evaluator.evaluate_windows(Plan.baseline(5), range(4))
    with torch.no_grad():
        assert torch.equal(model(input_ids=input_ids, use_cache=False).logits, before)
    assert "forward" not in vars(model.base_model)


def test_a_head_that_needs_more_than_hidden_states_is_refused(windows):
    model = build_tiny_model("llama")
    forward = model.forward

    def forward_with_memory(input_ids, **kwargs):
        output = forward(input_ids=input_ids, **kwargs)
        output.logits = output.logits + input_ids[..., None]
        return output

    model.forward = forward_with_memory
    with pytest.raises(FamilyError, match="apart from its layers"):
        ModelEvaluator(model=model, windows=windows)


@pytest.mark.packaged
@pytest.mark.slow
@pytest.mark.skipif(not WIKITEXT.is_file(), reason="WikiText-2 is not part of the repository")
def test_smollm2_baseline_on_wikitext2():
    from lpsearch.data import build_windows
    from lpsearch.models import load_model, resolve_source

    loaded = load_model(resolve_source("smollm2-135m"), device="cpu", dtype=torch.float32)
    windows = build_windows(str(WIKITEXT), tokenizer=loaded.tokenizer, num_windows=4, seq_len=512, model=loaded.model)
    losses = ModelEvaluator(model=loaded.model, windows=windows).evaluate_windows(Plan.baseline(30), range(4))
    assert np.mean(losses.nll_nats_per_token) == pytest.approx(2.9089, abs=NLL_NATS_PER_TOKEN)
