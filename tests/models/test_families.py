"""Which models are understood, which are refused, and that the self-test can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lpsearch.errors import FamilyError, ModelError
from lpsearch.models.families import build_blocks, check_family, get_decoder, get_decoder_layers
from tests.tiny_models import FAMILIES, VOCAB_SIZE, build_tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_supported_families_pass_the_self_test(family: str, dtype: torch.dtype) -> None:
    model = build_tiny_model(family, num_layers=4).to(dtype)
    check_family(model)
    assert len(get_decoder_layers(model)) == 4


def test_the_decoder_is_found_from_every_head() -> None:
    causal = build_tiny_model("llama", num_layers=2)
    classifier = AutoModelForSequenceClassification.from_config(causal.config)
    gemma3 = CONFIG_MAPPING["gemma3"](
        text_config=build_tiny_model("gemma3_text", num_layers=2).config,
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    vision_language = AutoModel.from_config(gemma3)
    assert get_decoder(causal) is causal.model
    assert get_decoder(causal.model) is causal.model
    assert get_decoder(classifier) is classifier.model
    assert get_decoder(vision_language) is vision_language.language_model
    check_family(vision_language)


def test_the_self_test_leaves_the_model_as_it_was() -> None:
    model = build_tiny_model("phi3", num_layers=2).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    check_family(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(layer._forward_hooks for layer in get_decoder_layers(model))


_SMALL: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_FOREIGN: dict[str, tuple[Any, dict[str, Any], str]] = {
    "gpt2": (AutoModelForCausalLM, {"vocab_size": 9, "n_embd": 8, "n_layer": 2, "n_head": 2}, "has no list of decoder"),
    "opt": (
        AutoModelForCausalLM,
        {**_SMALL, "ffn_dim": 32, "word_embed_proj_dim": 32},
        r"OPTDecoderLayer\) is not built",
    ),
    "mamba": (
        AutoModelForCausalLM,
        {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 2},
        r"MambaBlock\) is not built",
    ),
    "bert": (AutoModel, {**_SMALL, "intermediate_size": 32}, "has no list of decoder layers"),
    "t5": (AutoModelForSeq2SeqLM, {"vocab_size": 9, "d_model": 8, "num_layers": 1}, "has an encoder and a decoder"),
}


@pytest.mark.parametrize("model_type", _FOREIGN)
def test_other_families_are_refused_by_name(model_type: str) -> None:
    auto_class, options, message = _FOREIGN[model_type]
    model = auto_class.from_config(CONFIG_MAPPING[model_type](**options))
    with pytest.raises(FamilyError, match=rf"^model type {model_type} \(\w+\).*{message}.*Use a model of a supported"):
        check_family(model)


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(FamilyError, match="Linear is no transformers model"):
        check_family(nn.Linear(2, 2))


class ScaledResidualLayer(LlamaDecoderLayer):
    """A layer with all the submodules of Llama's, but another sum."""

    scale = 1.01

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return self.scale * hidden_states + (super().forward(hidden_states, **kwargs) - hidden_states)


class SwappedNormsLayer(LlamaDecoderLayer):
    """A layer that takes each norm for the other."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended = self.self_attn(self.post_attention_layernorm(hidden_states), **kwargs)[0] + hidden_states
        return attended + self.mlp(self.input_layernorm(attended))


class ParallelLayer(LlamaDecoderLayer):
    """A layer whose MLP does not see its attention."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + attended + self.mlp(self.post_attention_layernorm(hidden_states))


class TupleLayer(LlamaDecoderLayer):
    """A layer that returns more than hidden states."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        return (super().forward(hidden_states, **kwargs),)


def _with_layer(layer_class: type[LlamaDecoderLayer], *, layer_idx: int) -> PreTrainedModel:
    model = build_tiny_model("llama", num_layers=4)
    odd = layer_class(model.config, layer_idx)
    odd.load_state_dict(model.model.layers[layer_idx].state_dict())
    model.model.layers[layer_idx] = odd.eval()
    return model


@pytest.mark.parametrize("layer_class", [ScaledResidualLayer, SwappedNormsLayer, ParallelLayer])
def test_odd_layers_are_refused_by_the_self_test(layer_class: type[LlamaDecoderLayer]) -> None:
    model = _with_layer(layer_class, layer_idx=2)
    build_blocks(model)  # the structure is Llama's
    message = (
        rf"^model type llama \(LlamaForCausalLM\): its decoder layer 2 \({layer_class.__name__}\) is not its input"
    )
    with pytest.raises(FamilyError, match=message):
        check_family(model)
    assert not any(layer._forward_hooks for layer in get_decoder_layers(model))


def test_the_self_test_is_sharp_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScaledResidualLayer, "scale", 1.1)
    with pytest.raises(FamilyError, match="is not its input plus attention plus MLP"):
        check_family(_with_layer(ScaledResidualLayer, layer_idx=2).bfloat16())


def test_layers_that_return_tuples_are_refused() -> None:
    with pytest.raises(FamilyError, match=r"layer 3 \(TupleLayer\).* returns tuple; expected"):
        check_family(_with_layer(TupleLayer, layer_idx=3))


def test_a_layer_is_tested_once_and_a_replaced_one_again() -> None:
    model = build_tiny_model("llama", num_layers=4)
    forwards: list[str] = []
    get_decoder(model).register_forward_pre_hook(lambda decoder, args: forwards.append("ran"))
    check_family(model)
    check_family(model)
    assert forwards == ["ran"]
    model.model.layers[1] = _with_layer(ScaledResidualLayer, layer_idx=1).model.layers[1]
    with pytest.raises(FamilyError, match="layer 1"):
        check_family(model)


def test_layers_of_which_only_some_are_parallel_are_refused() -> None:
    model = build_tiny_model("gpt_neox", num_layers=3)
    model.gpt_neox.layers[1].use_parallel_residual = False
    with pytest.raises(FamilyError, match="only some of its decoder layers"):
        check_family(model)


@pytest.mark.parametrize("spoil", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(spoil: float) -> None:
    model = build_tiny_model("llama", num_layers=2)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(spoil)
    with pytest.raises(ModelError, match=r"layer 1.*not finite in torch\.float32") as caught:
        check_family(model)
    assert not isinstance(caught.value, FamilyError)


def _halve_residual(layer: Any) -> None:
    layer.residual_multiplier = 0.5


def _double_weights(layer: Any) -> None:
    layer.mlp.down_proj.weight.mul_(2)


@pytest.mark.parametrize("change", [_halve_residual, _double_weights])
def test_branches_follow_the_layer_as_it_is_now(change: Callable[[Any], None]) -> None:
    model = build_tiny_model("granite", num_layers=2)
    [_, block] = build_blocks(model)
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    before = block.mlp_branch(x)
    with torch.no_grad():
        change(block.layer)
    assert not torch.equal(block.mlp_branch(x), before)
