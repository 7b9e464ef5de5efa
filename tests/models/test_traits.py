"""What is read of a family: that entries and configurations say what transformers' code does."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
import transformers

from lpsearch.errors import FamilyError
from lpsearch.models.families import build_blocks
from lpsearch.models.traits import FAMILIES, AttentionKind, Family, list_fusible_families, read_traits
from tests.tiny_models import FAMILIES as TINY_FAMILIES
from tests.tiny_models import FUSED_FAMILIES, RUNTIME_FAMILIES, SLIDING_WINDOW, build_tiny_config, build_tiny_model

NOT_FUSED = {
    "cohere": "its attention and MLP read the same input",
    "gpt_neox": "its attention and MLP read the same input",
    "phi": "its attention and MLP read the same input",
    "mixtral": "its MLP is a mixture of experts",
    "qwen3_moe": "its MLP is a mixture of experts",
}
NOT_IN_RUNTIME = NOT_FUSED | dict.fromkeys(("gpt_neox_sequential", "starcoder2"), "its norms are not RMSNorms")


def test_every_entry_has_a_tiny_model_that_the_tests_run_over() -> None:
    assert {build_tiny_config(family).model_type for family in TINY_FAMILIES} == set(FAMILIES)
    assert list(FAMILIES) == sorted(FAMILIES)


def test_what_is_not_fused_or_not_computed_has_its_reason() -> None:
    assert set(FUSED_FAMILIES) == set(TINY_FAMILIES) - set(NOT_FUSED)
    assert set(RUNTIME_FAMILIES) == set(TINY_FAMILIES) - set(NOT_IN_RUNTIME)
    assert set(list_fusible_families()) == {build_tiny_config(family).model_type for family in FUSED_FAMILIES}
    for family, reason in NOT_FUSED.items():
        with pytest.raises(
            FamilyError, match=rf"^model type \w+ cannot be fused into wide layers: {reason}; fused are"
        ):
            read_traits(build_tiny_config(family)).check_fusing()
    for family, reason in NOT_IN_RUNTIME.items():
        with pytest.raises(FamilyError, match=rf"^model type \w+: the runtime computes .*, and {reason}; "):
            read_traits(build_tiny_config(family)).check_runtime()


def test_a_refusal_says_with_which_option_the_family_is_fused() -> None:
    with pytest.raises(FamilyError, match=r"gpt_neox cannot .* gpt_neox \(without use_parallel_residual\), granite, "):
        read_traits(build_tiny_config("gpt_neox")).check_fusing()


def test_a_family_without_an_entry_has_its_shape_and_is_refused_the_rest() -> None:
    config = transformers.StableLmConfig(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4)
    traits = read_traits(config)
    assert (traits.num_layers, traits.num_heads, traits.num_kv_heads, traits.head_dim) == (3, 8, 4, 320)
    assert traits.fusing_obstacle == traits.runtime_obstacle == "it has no entry in lpsearch/models/traits/entries.py"


def test_a_bias_of_norms_needs_a_place() -> None:
    entry = Family(stem="StableLm", norm_kind="layer", qkv_bias="use_qkv_bias", o_bias=False, mlp_bias=False)
    obstacle = read_traits(transformers.StableLmConfig(), family=entry).fusing_obstacle
    assert obstacle == "its norms have a bias, and the projections behind them have none that could take it up"


def test_traits_are_equal_and_hash_alike_for_equal_configurations() -> None:
    first, second = (read_traits(build_tiny_config("gemma3_text")) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)  # so that they can be keys of caches
    assert first != read_traits(build_tiny_config("gemma3_text", num_layers=5))


def test_no_two_forms_have_the_same_submodules() -> None:
    forms = {family.block for family in FAMILIES.values()}
    assert len({form.submodules for form in forms}) == len(forms)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_shape_and_blocks_are_those_of_the_model(family: str) -> None:
    model = build_tiny_model(family, num_layers=4)
    traits = read_traits(model.config)
    assert (traits.num_layers, traits.hidden_size, traits.intermediate_size, traits.vocab_size) == (4, 32, 48, 97)
    assert traits.head_dim == 8
    blocks = build_blocks(model)
    assert {block.form for block in blocks} == {traits.family.block}
    assert {block.parallel for block in blocks} == {traits.is_parallel}


@pytest.mark.parametrize("option", [False, True])
@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_every_tensor_of_a_layer_is_listed_with_its_shape(family: str, option: bool) -> None:
    entry = FAMILIES[build_tiny_config(family).model_type]
    options = {name for name in (entry.qkv_bias, entry.o_bias, entry.mlp_bias) if isinstance(name, str)}
    known = options & set(vars(build_tiny_config(family)))
    model = build_tiny_model(family, num_layers=2, **dict.fromkeys(known, option))
    shapes = {name: tuple(tensor.shape) for name, tensor in build_blocks(model)[0].layer.state_dict().items()}
    assert read_traits(model.config).list_tensor_shapes() == shapes


@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_norms_are_those_of_the_model(family: str) -> None:
    model = build_tiny_model(family, num_layers=2)
    traits = read_traits(model.config)
    block = traits.family.block
    layer = dict(build_blocks(model)[0].layer.named_modules())
    norms = [block.attention_norm, block.attention_post_norm, block.mlp_norm, block.mlp_post_norm]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for name in norms:
        if name is None:
            continue
        norm = layer[name]
        centred = x - x.mean(-1, keepdim=True) if traits.family.norm_kind == "layer" else x
        expected = centred * (centred.square().mean(-1, keepdim=True) + traits.norm_eps).rsqrt()
        expected = expected * (norm.weight + traits.norm_offset)
        torch.testing.assert_close(norm(x), expected + norm.bias if hasattr(norm, "bias") else expected)
    assert ("self_attn.q_norm" in layer) == ("self_attn.k_norm" in layer) == (traits.qk_norm != "none")
    if traits.qk_norm != "none":
        assert len(layer["self_attn.q_norm"].weight) == (8 if traits.qk_norm == "head" else 32)


def test_how_layers_attend() -> None:
    full, sliding = AttentionKind("full"), AttentionKind("sliding", SLIDING_WINDOW)
    assert set(read_traits(build_tiny_config("mistral")).kinds) == {sliding}
    assert set(read_traits(build_tiny_config("mistral", sliding_window=None)).kinds) == {full}
    assert read_traits(build_tiny_config("qwen2")).kinds == (full,) * 3 + (sliding,) * 3
    gemma3 = read_traits(build_tiny_config("gemma3_text"))
    assert [kind.rope_key for kind in gemma3.kinds[:3]] == ["sliding_attention", "sliding_attention", "full_attention"]
    assert [part.layers for part in gemma3.split_group([1, 2, 3])] == [(1, 3), (2,)]
    smollm3 = read_traits(build_tiny_config("smollm3", use_sliding_window=False))
    assert [kind.rotates for kind in smollm3.kinds] == [True, False] * 3
    assert {kind.name for kind in smollm3.kinds} == {"full"}


def test_scales_and_caps() -> None:
    granite = read_traits(build_tiny_config("granite"))
    assert (granite.attention_scale, granite.embedding_scale, granite.residual_scale) == (0.3, 3.0, 0.6)
    assert granite.logits_scale == 0.5
    gemma2 = read_traits(build_tiny_config("gemma2", query_pre_attn_scalar=16, attn_logit_softcapping=7.0))
    assert (gemma2.attention_scale, gemma2.attention_softcap) == (0.25, 7.0)
    assert gemma2.logits_softcap == build_tiny_config("gemma2").final_logit_softcapping
    llama = read_traits(build_tiny_config("llama"))
    assert llama.attention_scale == 8**-0.5
    assert llama.embedding_scale == llama.residual_scale == llama.logits_scale == 1.0


@pytest.mark.parametrize("family", list_fusible_families())
def test_the_stem_names_classes_of_transformers(family: str) -> None:
    entry = FAMILIES[family]
    assert getattr(transformers, f"{entry.stem}Config").model_type == family
    assert issubclass(getattr(transformers, f"{entry.stem}Model"), transformers.PreTrainedModel)
    assert type(build_tiny_model(family, num_layers=1)).__name__ == entry.language_model


def test_reading_traits_needs_no_torch() -> None:
    code = (
        "import sys, lpsearch.models.traits\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not re.search("Warning", done.stderr)
