"""Fused models of plans that drop branches, against the unfused model in which those branches add nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

from lpsearch.errors import FamilyError, PlanError
from lpsearch.models.families import get_decoder_layers
from lpsearch.models.traits import read_traits
from lpsearch.plan import Plan
from lpsearch.transform import applied_plan, fuse_plan
from lpsearch.transform import modeling_lpsearch as modeling
from tests.fusing import (
    DROPPING,
    MIXED,
    compute_logits,
    compute_planned_logits,
    relative_difference,
    silence_dropped,
)
from tests.tiny_models import FAMILIES, FUSED_FAMILIES, build_left_padded_batch, build_tiny_model
from tests.tolerances import FLOAT32_FUSED, FLOAT32_LOGITS

BIASES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "gpt_neox_sequential": {"attention_bias": False},
    "starcoder2": {"use_bias": False},  # one option for attention and MLP, of which one may be alone
}
HARD = DROPPING["before the first attention and after another"]


@pytest.fixture(scope="module", params=FUSED_FAMILIES)
def family_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build_tiny_model(request.param)


def fuse_copy(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    return fuse_plan(copy.deepcopy(model), plan)


def count_elements(layers: Any, names: tuple[str, ...]) -> int:
    """Count the elements of the matrices in the modules of these names."""
    return sum(
        parameter.numel()
        for layer in layers
        for name, parameter in layer.named_parameters()
        if parameter.ndim == 2 and any(part in name for part in names)
    )


@pytest.mark.parametrize("where", DROPPING)
def test_fused_logits_are_those_without_the_branches(family_model: PreTrainedModel, where: str) -> None:
    plan = DROPPING[where]
    expected = compute_planned_logits(family_model, plan)
    assert relative_difference(expected, compute_planned_logits(family_model, MIXED)) > 0.01  # they matter
    fused = fuse_copy(family_model, plan)
    assert relative_difference(compute_logits(fused), expected) < FLOAT32_FUSED
    layers = get_decoder_layers(fused)
    assert len(layers) == fused.config.num_hidden_layers == len(fused.config.lpsearch["slots"])
    # What is left of each kind of matrix is the share of the branches that are left.
    for names, branch in ((("attention.", "attn."), "attention"), (("mlp.",), "mlp")):
        whole = count_elements(get_decoder_layers(family_model), names)
        kept = plan.num_layers - len(plan.dropped[branch])
        assert count_elements(layers, names) * plan.num_layers == whole * kept


@pytest.mark.parametrize("name", sorted(BIASES))
@pytest.mark.parametrize("where", DROPPING)
def test_biases_are_joined_too(name: str, where: str) -> None:
    model = build_tiny_model(name, **BIASES[name])
    expected = compute_planned_logits(model, DROPPING[where])
    assert relative_difference(compute_logits(fuse_plan(model, DROPPING[where])), expected) < FLOAT32_FUSED


@pytest.mark.parametrize("where", ["before the first attention and after another", "within groups"])
def test_generation_is_that_without_the_branches(family_model: PreTrainedModel, where: str) -> None:
    """Padded on the left, past every sliding window, with either cache and without one."""
    batch = build_left_padded_batch()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    silenced = copy.deepcopy(family_model)
    with applied_plan(silenced, silence_dropped(silenced, DROPPING[where])):
        expected = silenced.generate(**batch, **options)
    fused = fuse_copy(family_model, DROPPING[where])
    assert torch.equal(fused.generate(**batch, **options), expected)
    assert torch.equal(fused.generate(**batch, **options, use_cache=False), expected)
    assert torch.equal(fused.generate(**batch, **options, cache_implementation="static"), expected)


def test_the_cache_has_no_slot_for_a_dropped_attention() -> None:
    fused = fuse_plan(build_tiny_model("gemma2"), HARD)
    cache = fused(**build_left_padded_batch(), use_cache=True).past_key_values
    assert len(cache) == 3  # layer 2, then 4 and 5, of which one slides
    assert [layer.keys.shape[1] for layer in cache.layers] == [2, 2, 2]  # key-value heads
    assert cache.get_seq_length() == 14
    assert fused.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]


def test_a_model_that_was_saved_loads_as_it_was(family_model: PreTrainedModel, tmp_path: Path) -> None:
    fused = fuse_copy(family_model, HARD)
    fused.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(compute_logits(loaded), compute_logits(fused))


def test_branches_alone_keep_their_very_parameters(family_model: PreTrainedModel) -> None:
    model = copy.deepcopy(family_model)
    plan = Plan.from_groups([[0], [1, 2], [3], [4], [5]], dropped={"attention": [4], "mlp": [2, 3]})
    block = read_traits(model.config).family.block
    in_attention = {block.attention, block.attention_norm, *block.attention_post}

    def parameters_of(branch: str, *layers: int) -> set[int]:
        named = [item for i in layers for item in get_decoder_layers(model)[i].named_parameters()]
        return {id(p) for name, p in named if (name.split(".")[0] in in_attention) == (branch == "attention")}

    alone = parameters_of("attention", 0, 3, 5) | parameters_of("mlp", 0, 1, 4, 5)
    dropped = parameters_of("attention", 4) | parameters_of("mlp", 2, 3)
    kept = {id(p) for p in get_decoder_layers(fuse_plan(model, plan)).parameters()}
    assert alone <= kept
    assert not dropped & kept


@pytest.mark.parametrize("where", DROPPING)
def test_a_decode_step_is_one_graph(where: str) -> None:
    model = fuse_plan(build_tiny_model("gemma3_text"), DROPPING[where])
    prompt = torch.randint(3, 90, (1, 8), generator=torch.Generator().manual_seed(0))
    logits = []
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")  # raises where the graph would break
    with torch.no_grad():
        for step in (model.forward, compiled):
            cache = StaticCache(config=model.config, max_cache_len=32)
            model(prompt, past_key_values=cache, use_cache=True)
            logits.append(step(torch.tensor([[5]]), past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=FLOAT32_LOGITS)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # its name before transformers 5.23
@pytest.mark.parametrize("name", ["gemma2", "granite", "llama"])
def test_gradients_flow_with_and_without_checkpointing(name: str) -> None:
    fused = fuse_plan(build_tiny_model(name), HARD).requires_grad_(True).train()

    def gradients() -> dict[str, Tensor]:
        fused.zero_grad()
        fused(**build_left_padded_batch(), use_cache=False).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in fused.named_parameters() if p.grad is not None}

    expected = gradients()
    assert expected.keys() == dict(fused.named_parameters()).keys()
    fused.gradient_checkpointing_enable()
    for parameter, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[parameter], msg=parameter)


def test_hidden_states_are_those_after_every_entry() -> None:
    model = build_tiny_model("gemma3_text")
    batch = build_left_padded_batch()
    hidden_states = fuse_copy(model, HARD)(**batch, output_hidden_states=True).hidden_states
    silenced = copy.deepcopy(model)
    with applied_plan(silenced, silence_dropped(silenced, HARD)):
        planned = silenced(**batch, output_hidden_states=True).hidden_states
    tokens = batch["attention_mask"].bool()
    after_layer = [planned[i][tokens] for i in (0, 4)]  # embeddings; layers 0 to 3, of which one attends
    assert relative_difference(hidden_states[0][tokens], after_layer[0]) < FLOAT32_FUSED
    assert relative_difference(hidden_states[1][tokens], after_layer[1]) < FLOAT32_FUSED


def test_a_configuration_of_a_version_that_dropped_nothing_builds_the_same(
    family_model: PreTrainedModel, tmp_path: Path
) -> None:
    fused = fuse_copy(family_model, MIXED)
    fused.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("mlps", "more_mlps", "mlp_norm", "mlp_post", "attention_post"):
        del config["lpsearch"][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(compute_logits(loaded), compute_logits(fused))
    assert "mlps" not in loaded.config.lpsearch
    assert modeling.list_mlps(loaded.config.lpsearch) == fused.config.lpsearch["mlps"]


def test_a_model_without_any_attention_is_refused_and_left_alone() -> None:
    model = build_tiny_model("llama")
    before = compute_logits(model)
    with pytest.raises(PlanError, match="drops the attention of every layer"):
        fuse_plan(model, Plan.baseline(6).drop({"attention": range(6)}))
    assert torch.equal(compute_logits(model), before)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(FUSED_FAMILIES)))
def test_what_cannot_be_fused_is_refused_by_name(name: str) -> None:
    model = build_tiny_model(name)
    with pytest.raises(FamilyError, match=f"model type {model.config.model_type} cannot be fused"):
        fuse_plan(model, HARD)
