"""Plans on models that accelerate spreads over devices: on a CPU over memory and disk, elsewhere over two GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lpsearch.data import Windows
from lpsearch.errors import ModelError
from lpsearch.evaluation import ModelEvaluator
from lpsearch.models import fingerprint_parts, load_model, resolve_source
from lpsearch.models.placement import holds_weights_elsewhere, is_spread, list_run_devices, read_parameter
from lpsearch.plan import Plan
from lpsearch.transform import applied_plan, apply_plan, fuse_plan, undo_plan
from tests.tiny_models import build_tiny_model

PLANS = {
    "pairs": Plan.from_groups([[0, 1], [2, 3], [4, 5]]),
    "triples": Plan.from_groups([[0, 1, 2], [3, 4, 5]]),
    "drops": Plan.from_groups([[0], [1, 2], [3], [4, 5]]).drop({"attention": [3, 4, 5], "mlp": [0, 4, 5]}),
    "one whole layer of a pair": Plan.from_groups([[0], [1], [2], [3], [4, 5]]).drop({"attention": [4], "mlp": [4]}),
}


def count_bytes(*modules: torch.nn.Module) -> int:
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


@pytest.fixture(scope="module", params=["disk", pytest.param("two GPUs", marks=pytest.mark.multi_gpu)])
def max_memory(request: pytest.FixtureRequest) -> dict[int | str, int]:
    """Return memory for about four of six layers in a first place, and the rest in a second."""
    model: Any = build_tiny_model("llama", vocab_size=512)
    first = count_bytes(model.model.embed_tokens, *model.model.layers[:4]) + 1000
    if request.param == "disk":
        return {"cpu": first + 10_000}
    return {0: first, 1: 1 << 30, "cpu": 0}


@pytest.fixture(scope="module")
def spread(tiny_model_dir: Path, max_memory: dict[int | str, int]) -> PreTrainedModel:
    """Return the tiny model, of which some layers are elsewhere."""
    device = "cuda" if 0 in max_memory else "cpu"
    loaded = load_model(
        resolve_source(str(tiny_model_dir)), device=device, dtype=torch.float32, spread=True, max_memory=max_memory
    )
    assert is_spread(loaded.model)
    assert len(set(loaded.model.hf_device_map.values())) == 2
    if device == "cpu":
        assert holds_weights_elsewhere(loaded.model)
    else:
        assert len(list_run_devices(loaded.model)) == 2
    return loaded.model


@pytest.fixture(scope="module")
def whole(tiny_model_dir: Path, max_memory: dict[int | str, int]) -> PreTrainedModel:
    """Return the same model on one device."""
    device = "cuda" if 0 in max_memory else "cpu"
    return load_model(resolve_source(str(tiny_model_dir)), device=device, dtype=torch.float32).model


def run(model: PreTrainedModel) -> Tensor:
    input_ids = torch.arange(24).reshape(2, 12).to(next(iter(list_run_devices(model))))
    with torch.no_grad():
        return model(input_ids=input_ids).logits.cpu()


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_gives_the_bits_of_the_model_on_one_device(
    spread: PreTrainedModel, whole: PreTrainedModel, name: str
) -> None:
    untouched = run(spread)
    forwards = [layer.__dict__["forward"] for layer in spread.get_decoder().layers]
    assert torch.equal(untouched, run(whole))
    with applied_plan(spread, PLANS[name]), applied_plan(whole, PLANS[name]):
        planned = run(spread)
        assert torch.equal(planned, run(whole))
        assert not torch.equal(planned, untouched)
    assert [layer.__dict__["forward"] for layer in spread.get_decoder().layers] == forwards
    assert torch.equal(run(spread), untouched)
    apply_plan(spread, PLANS[name])
    apply_plan(spread, PLANS["pairs"])  # over the other
    undo_plan(spread)
    assert torch.equal(run(spread), untouched)


def test_generation_under_a_plan(spread: PreTrainedModel, whole: PreTrainedModel) -> None:
    words: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    tokens = []
    for model in (spread, whole):
        with applied_plan(model, PLANS["drops"]):
            input_ids = torch.arange(3, 9)[None].to(list_run_devices(model)[0])
            tokens.append(model.generate(input_ids, **words).cpu())
    assert torch.equal(*tokens)


@pytest.mark.parametrize("location", ["device", "host"])
@pytest.mark.parametrize("metric", ["nll", "kl"])
def test_the_proxy_gives_the_same_losses(
    spread: PreTrainedModel, whole: PreTrainedModel, metric: Any, location: Any
) -> None:
    windows = Windows(np.random.default_rng(0).integers(3, 500, (6, 16)).astype(np.int32), "random")
    options: dict[str, Any] = {"windows": windows, "metric": metric, "batch_size": 2, "cache_location": location}
    options["cache_bytes"] = 1 << 24  # what is free on a GPU changes between two questions
    evaluators = [ModelEvaluator(model=model, **options) for model in (spread, whole)]
    for plan in (Plan.baseline(6), *PLANS.values(), Plan.from_joins(6, [0, 4])):
        losses = [evaluator.evaluate_windows(plan, range(6)) for evaluator in evaluators]
        assert losses[0] == losses[1]
    usage = evaluators[0].cache_usage
    assert usage == evaluators[1].cache_usage
    assert usage.layers_run < usage.layers_asked


def test_the_model_is_recognised(spread: PreTrainedModel, whole: PreTrainedModel, tiny_model_dir: Path) -> None:
    tokenizer = load_model(resolve_source(str(tiny_model_dir)), device="cpu", dtype=torch.float32).tokenizer
    assert fingerprint_parts(spread, tokenizer) == fingerprint_parts(whole, tokenizer)
    for name, parameter in whole.get_decoder().layers.named_parameters():
        assert torch.equal(read_parameter(spread.get_decoder().layers, name).cpu(), parameter.cpu())


def test_what_changes_weights_is_refused(spread: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match="needs the whole model on one device"):
        fuse_plan(spread, PLANS["pairs"])
