"""Fused wide layers against the unfused plan, for every family that can be fused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import lpsearch
from lpsearch.errors import FamilyError, ModelError, PlanError
from lpsearch.export import export_checkpoint
from lpsearch.models.families import get_decoder_layers
from lpsearch.plan import ModelIdentity, Plan, PlanMetadata
from lpsearch.transform import applied_plan, apply_plan, fuse_plan
from tests.fusing import MIXED, PAIRS, compute_logits, compute_planned_logits, relative_difference
from tests.tiny_models import FAMILIES, FUSED_FAMILIES, build_left_padded_batch, build_tiny_model
from tests.tolerances import BFLOAT16_LOGITS, FLOAT32_FUSED

FOUR = Plan.from_groups([[0, 1, 2, 3], [4], [5]])
PLANS = {"pairs": PAIRS, "pair and triple": MIXED, "four": FOUR}

BIASES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "gemma2": {"attention_bias": True},
    "gemma3_text": {"attention_bias": True},
    "gpt_neox_sequential": {"attention_bias": False},  # while its norms have a bias all the same
    "granite": {"attention_bias": True, "mlp_bias": True},
    "olmo2": {"attention_bias": True},
    "qwen3": {"attention_bias": True},
    "smollm3": {"attention_bias": True, "mlp_bias": True},
    "starcoder2": {"use_bias": False},  # likewise
}


@pytest.fixture(scope="module", params=FUSED_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def family_model(family: str) -> PreTrainedModel:
    return build_tiny_model(family)


def fuse_copy(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    return fuse_plan(copy.deepcopy(model), plan)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_fused_logits_are_the_plans(family_model: PreTrainedModel, plan: Plan) -> None:
    expected = compute_planned_logits(family_model, plan)
    fused = fuse_copy(family_model, plan)
    assert relative_difference(compute_logits(fused), expected) < FLOAT32_FUSED
    assert len(get_decoder_layers(fused)) == fused.config.num_hidden_layers
    assert [len(group) for group in fused.config.lpsearch["groups"]] == [len(group) for group in plan.groups]


@pytest.mark.parametrize("name", sorted(BIASES))
def test_biases_are_joined_too(name: str) -> None:
    model = build_tiny_model(name, **BIASES[name])
    expected = compute_planned_logits(model, MIXED)
    assert relative_difference(compute_logits(fuse_plan(model, MIXED)), expected) < FLOAT32_FUSED


def test_bfloat16_is_as_near_as_rounding_lets_it_be(family_model: PreTrainedModel) -> None:
    expected = compute_planned_logits(family_model, MIXED)
    rounded = copy.deepcopy(family_model).to(torch.bfloat16)
    fused = fuse_copy(rounded, MIXED)
    assert {parameter.dtype for parameter in fused.parameters()} == {torch.bfloat16}
    assert relative_difference(compute_logits(fused), expected) < BFLOAT16_LOGITS


def test_generation_is_the_plans_with_either_cache(family_model: PreTrainedModel) -> None:
    batch = build_left_padded_batch()
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    with applied_plan(family_model, MIXED):
        expected = family_model.generate(**batch, **options)
    fused = fuse_copy(family_model, MIXED)
    assert torch.equal(fused.generate(**batch, **options), expected)
    assert torch.equal(fused.generate(**batch, **options, cache_implementation="static"), expected)


def test_the_fused_model_saves_and_loads(family_model: PreTrainedModel, tmp_path: Path) -> None:
    fused = fuse_copy(family_model, MIXED)
    expected = compute_logits(fused)
    fused.save_pretrained(tmp_path / "first")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "first", trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(compute_logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second", trust_remote_code=True)
    assert torch.equal(compute_logits(again), expected)
    assert {file.name for file in (tmp_path / "second").iterdir()} >= {"modeling_lpsearch.py", "config.json"}


def test_layers_alone_keep_their_very_parameters(family_model: PreTrainedModel) -> None:
    model = copy.deepcopy(family_model)
    plan = Plan.from_groups([[0], [1, 2], [3], [4], [5]])
    alone = {name: p for i in (0, 5) for name, p in get_decoder_layers(model)[i].named_parameters(prefix=str(i))}
    fused = get_decoder_layers(fuse_plan(model, plan))
    last = len(fused) - 1
    kept = {f"{i}.{name}": p for i, slot in ((0, 0), (5, last)) for name, p in fused[slot].named_parameters()}
    assert kept.keys() == alone.keys()
    assert all(kept[name] is parameter for name, parameter in alone.items())


def test_the_configuration_that_was_given_is_not_touched(family_model: PreTrainedModel) -> None:
    model = copy.deepcopy(family_model)
    shared = model.config
    before = copy.deepcopy(shared.to_dict())
    fuse_plan(model, MIXED)
    assert shared.to_dict() == before
    assert model.config is not shared
    assert not any(getattr(module, "config", None) is shared for module in model.modules())


def test_the_attention_implementation_can_be_chosen_later(family_model: PreTrainedModel) -> None:
    fused = fuse_copy(family_model, MIXED)
    if family_model.config.model_type != "gemma2":  # whose soft cap only eager attention knows
        fused.set_attn_implementation("sdpa")
    expected = compute_logits(fused)
    fused.set_attn_implementation("eager")
    attentions = fused(**build_left_padded_batch(), output_attentions=True).attentions
    assert len(attentions) == fused.config.num_hidden_layers
    assert attentions[-1] is not None  # which only eager attention returns
    assert relative_difference(compute_logits(fused), expected) < FLOAT32_FUSED


def test_hidden_states_are_those_between_groups(family_model: PreTrainedModel) -> None:
    batch = build_left_padded_batch()
    tokens = batch["attention_mask"].bool()
    with applied_plan(family_model, MIXED):
        planned = family_model(**batch, output_hidden_states=True).hidden_states
    fused = fuse_copy(family_model, MIXED)(**batch, output_hidden_states=True).hidden_states
    assert len(fused) == MIXED.depth + 1
    for actual, expected in zip(fused[:-1], [planned[0], planned[1], planned[3]], strict=True):
        assert relative_difference(actual[tokens], expected[tokens]) < FLOAT32_FUSED


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # its name before transformers 5.23
@pytest.mark.parametrize("name", ["gemma2", "llama", "smollm3"])
def test_gradients_flow_with_and_without_checkpointing(name: str) -> None:
    fused = fuse_plan(build_tiny_model(name), MIXED).requires_grad_(True).train()
    batch = build_left_padded_batch()

    def gradients() -> dict[str, Tensor]:
        fused.zero_grad()
        fused(**batch, use_cache=False).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in fused.named_parameters() if p.grad is not None}

    expected = gradients()
    assert expected.keys() == dict(fused.named_parameters()).keys()
    fused.gradient_checkpointing_enable()
    for parameter, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[parameter], msg=parameter)


def test_a_head_of_its_own_stays_one_whatever_the_configuration_says(tmp_path: Path) -> None:
    model = build_tiny_model("llama", tie_word_embeddings=False)
    model.config.tie_word_embeddings = True
    expected = compute_planned_logits(model, PAIRS)
    fuse_plan(model, PAIRS).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert not loaded.config.tie_word_embeddings
    assert relative_difference(compute_logits(loaded), expected) < FLOAT32_FUSED


def test_modes_are_kept() -> None:
    trainable = fuse_plan(build_tiny_model("llama").requires_grad_(True).train(), PAIRS)
    assert all(parameter.requires_grad for parameter in trainable.parameters())
    assert all(module.training for module in trainable.modules())
    frozen = fuse_plan(build_tiny_model("gemma2"), PAIRS)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not any(module.training for module in frozen.modules())


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(FUSED_FAMILIES)))
def test_what_cannot_be_fused_is_refused_and_left_alone(name: str) -> None:
    model = build_tiny_model(name)
    with pytest.raises(FamilyError, match=f"model type {model.config.model_type} cannot be fused"):
        fuse_plan(model, MIXED)
    assert len(get_decoder_layers(model)) == 6


def test_only_an_unmodified_language_model_is_fused() -> None:
    model = build_tiny_model("llama")
    with pytest.raises(PlanError, match="its groups cover 3 layers"):
        fuse_plan(model, Plan.from_groups([[0, 1], [2]]))
    another = ModelIdentity(id="owner/other", num_layers=6, fingerprint="0-0")
    with pytest.raises(PlanError, match="the plan is for owner/other"):
        fuse_plan(model, Plan.from_groups(MIXED.groups, metadata=PlanMetadata(model=another)))
    apply_plan(model, PAIRS)
    with pytest.raises(ModelError, match=r"a plan is applied.*undo_plan"):
        fuse_plan(model, MIXED)
    lpsearch.undo_plan(model)
    classifier = AutoModelForSequenceClassification.from_config(model.config)
    with pytest.raises(ModelError, match="LlamaForSequenceClassification is not LlamaForCausalLM"):
        fuse_plan(classifier, MIXED)
    fuse_plan(model, MIXED)
    with pytest.raises(ModelError, match="is fused already"):
        fuse_plan(model, MIXED)


def _scale_output(module: nn.Module, args: Any, output: Any) -> Any:
    return output * 0


def _replace_forward(model: Any) -> None:
    attention = model.model.layers[2].self_attn
    attention.forward = lambda hidden_states, **kwargs: (hidden_states, None)


def _add_adapter(model: Any) -> None:
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


def _repeat_layer(model: Any) -> None:
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[i] for i in (0, 1, 1, 3, 4, 5)])


def _delete_layer(model: Any) -> None:
    del model.model.layers[4]


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "forward": (_replace_forward, r"model\.layers\.2\.self_attn has a forward of its own"),
    "hook on an MLP": (
        lambda model: model.model.layers[3].mlp.register_forward_hook(_scale_output),
        r"model\.layers\.3\.mlp has a forward hook \(_scale_output\)",
    ),
    "hook on the head": (
        lambda model: model.lm_head.register_forward_pre_hook(lambda module, args: None),
        "lm_head has a forward pre-hook",
    ),
    "module": (
        lambda model: setattr(model.model.layers[1], "mlp", nn.Linear(32, 32)),
        r"model\.layers\.1\.mlp is a Linear, expected LlamaMLP",
    ),
    "subclass": (
        lambda model: setattr(
            model.model.layers[1].mlp, "__class__", type("Scaled", (type(model.model.layers[1].mlp),), {})
        ),
        r"model\.layers\.1\.mlp is a .*Scaled, expected LlamaMLP",
    ),
    "missing module": (
        lambda model: delattr(model.model.layers[1].mlp, "up_proj"),
        r"model\.layers\.1\.mlp\.up_proj is not there",
    ),
    "bias": (
        lambda model: setattr(model.model.layers[5].mlp.up_proj, "bias", nn.Parameter(torch.ones(48))),
        r"model\.layers\.5\.mlp\.up_proj has a parameter bias",
    ),
    "pruned heads": (
        lambda model: setattr(model.model.layers[0].self_attn, "q_proj", nn.Linear(32, 16, bias=False)),
        r"model\.layers\.0\.self_attn\.q_proj .*expected",
    ),
    "number": (
        lambda model: setattr(model.model.layers[0].self_attn, "scaling", 2.0),
        r"model\.layers\.0\.self_attn has scaling 2\.0, expected 0\.35",
    ),
    "epsilon": (
        lambda model: setattr(model.model.norm, "variance_epsilon", 0.5),
        r"model\.norm has variance_epsilon 0\.5",
    ),
    "adapter": (_add_adapter, r"model\.layers\.0\.self_attn\.q_proj is a peft\..*merge_and_unload"),
    "repeated layer": (_repeat_layer, r"model\.layers\.2 and model\.layers\.1 are one module"),
    "deleted layer": (_delete_layer, r"has 5 decoder layers, and its configuration says 6"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_understood_to_the_bottom_is_refused_and_left_alone(change: str, tmp_path: Path) -> None:
    apply_change, says = CHANGES[change]
    if change == "adapter":
        pytest.importorskip("peft", reason="needs peft: pip install lpsearch[recover]")
    model = build_tiny_model("llama")
    apply_change(model)
    plan = Plan.from_groups([[0], [1, 2], [3, 4]]) if change == "deleted layer" else PAIRS
    modules = dict(model.named_modules(remove_duplicate=False))
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for fuse in (lambda: fuse_plan(model, plan), lambda: export_checkpoint(model, plan, tmp_path / "out")):
        with pytest.raises(ModelError, match=says):
            fuse()
    after = dict(model.named_modules(remove_duplicate=False))
    assert after.keys() == modules.keys()
    assert all(after[name] is module for name, module in modules.items())
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "out").exists()


def test_a_change_is_found_under_the_names_of_another_family() -> None:
    model: Any = build_tiny_model("gpt_neox_sequential")
    model.gpt_neox.layers[2].attention.query_key_value.register_forward_hook(_scale_output)
    with pytest.raises(ModelError, match=r"gpt_neox\.layers\.2\.attention\.query_key_value has a forward hook"):
        fuse_plan(model, MIXED)
    assert len(get_decoder_layers(model)) == 6


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # its name before transformers 5.23
def test_a_model_that_was_used_is_stock_still(family_model: PreTrainedModel) -> None:
    model = copy.deepcopy(family_model)
    batch = build_left_padded_batch()
    with applied_plan(model, MIXED):
        expected = compute_logits(model)
    model(**batch, output_hidden_states=True, output_attentions=True)  # for which transformers hooks the layers
    model.generate(**batch, max_new_tokens=2, do_sample=False)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train().eval()
    assert relative_difference(compute_logits(fuse_plan(model, MIXED)), expected) < FLOAT32_FUSED


def test_quantised_weights_are_refused() -> None:
    model = build_tiny_model("llama")
    layer: Any = get_decoder_layers(model)[1]
    layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"quantised weights.*load it unquantised"):
        fuse_plan(model, MIXED)
