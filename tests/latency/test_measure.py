"""Measuring: the wide layer is the group, and every family is measured. No test asserts a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lpsearch.errors import LpsearchError
from lpsearch.latency import LatencyModel, measure_profile
from lpsearch.latency import measure as measure_module
from lpsearch.latency.shapes import Arena, FixedCacheLayer, ShapeModel, widen_config
from lpsearch.plan import Plan
from lpsearch.transform import applied_plan
from tests.tiny_models import FAMILIES, SLIDING_WINDOW, build_tiny_model
from tests.tolerances import FLOAT32_LOGITS

UNFUSED = {"gpt_neox", "gpt_neox_sequential", "mixtral", "qwen3_moe"}


@torch.no_grad()
def _fuse_llama_group(layers: list[nn.Module], wide: nn.Module) -> None:
    """Fold each member's norm weights into the projections behind them, then stack the members."""
    wide.input_layernorm.weight.fill_(1)
    wide.post_attention_layernorm.weight.fill_(1)
    for name in ("q_proj", "k_proj", "v_proj"):
        folded = [getattr(layer.self_attn, name).weight * layer.input_layernorm.weight for layer in layers]
        getattr(wide.self_attn, name).weight.copy_(torch.cat(folded, dim=0))
    for name in ("gate_proj", "up_proj"):
        folded = [getattr(layer.mlp, name).weight * layer.post_attention_layernorm.weight for layer in layers]
        getattr(wide.mlp, name).weight.copy_(torch.cat(folded, dim=0))
    wide.self_attn.o_proj.weight.copy_(torch.cat([layer.self_attn.o_proj.weight for layer in layers], dim=1))
    wide.mlp.down_proj.weight.copy_(torch.cat([layer.mlp.down_proj.weight for layer in layers], dim=1))


@pytest.mark.parametrize("group_size", [2, 3])
def test_a_widened_layer_with_stacked_weights_is_the_group(group_size):
    model = build_tiny_model("llama", num_layers=group_size)
    input_ids = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), applied_plan(model, Plan.from_groups([range(group_size)])):
        expected = model(input_ids=input_ids, use_cache=False).logits
    layers = list(model.model.layers)
    wide = type(layers[0])(widen_config(model.config, group_size), 0).eval()
    _fuse_llama_group(layers, wide)
    assert wide.self_attn.q_proj.weight.shape == (group_size * 4 * 8, 32)
    assert wide.self_attn.k_proj.weight.shape == (group_size * 2 * 8, 32)
    assert wide.mlp.down_proj.weight.shape == (32, group_size * 48)
    model.model.layers = nn.ModuleList([wide])
    model.config.num_hidden_layers = 1
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=FLOAT32_LOGITS)


def test_widening_leaves_the_configuration_alone():
    config = build_tiny_model("qwen2").config
    before = config.to_dict()
    wide = widen_config(config, 3)
    assert config.to_dict() == before
    assert (wide.num_attention_heads, wide.num_key_value_heads, wide.head_dim) == (12, 6, 8)
    assert wide.intermediate_size == 3 * 48


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured(family):
    config = build_tiny_model(family).config
    profile = measure_profile(config, device="cpu", dtype=torch.float32, context_len=12, max_group=3, budget_s=0.05)
    times = [profile.overhead_ms, *profile.cost_ms.values(), *(point.median_ms for point in profile.points)]
    assert all(math.isfinite(time) and time >= 0 for time in times)
    assert all(point.median_ms > 0 for point in profile.points)
    assert set(profile.cost_ms) == {1, 2, 3}
    assert profile.runtime.endswith("layers not fused" if family in UNFUSED else "fused layers")
    assert {point.use for point in profile.points} == {"fit", "check"}
    assert LatencyModel(profile).estimate_latency_ms(Plan.from_groups([[0], [1, 2], [3, 4, 5]])) > 0


def test_unfused_groups_cost_what_their_layers_cost():
    config = build_tiny_model("mixtral").config
    profile = measure_profile(config, device="cpu", dtype=torch.float32, context_len=4, budget_s=0.05)
    assert profile.cost_ms[2] == 2 * profile.cost_ms[1]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_depths_share_the_memory_of_one_model(family):
    config = build_tiny_model(family).config
    with torch.inference_mode():
        model = ShapeModel(config, batch_size=2, context_len=9, device=torch.device("cpu"), dtype=torch.float32)
        base, wide = model.build_depth([1] * 6), model.build_depth([3, 2, 1])
        assert base.layers[0].self_attn.config._attn_implementation == "sdpa"
        first, last = ([next(depth.layers[slot].parameters()).data_ptr() for depth in (base, wide)] for slot in (0, -1))
        assert first[0] == first[1]
        assert last[0] > first[0]
        num_weights = [
            sum(p.numel() for layer in depth.layers for p in layer.parameters() if p.ndim > 1) for depth in (base, wide)
        ]
        assert num_weights[0] == num_weights[1]
        for depth, num_layers in ((base, 6), (wide, 3), (base, 6)):
            model.use_depth(depth)
            assert model.run_step().shape == (2,)
            assert len(model._layers) == num_layers


def test_a_fixed_cache_holds_the_context_and_slides_where_attention_does():
    arena = Arena(num_elements=4096, dtype=torch.float32, device=torch.device("cpu"))
    keys = torch.ones(2, 3, 1, 8)
    for window, held in ((None, 12), (SLIDING_WINDOW, SLIDING_WINDOW - 1)):
        layer = FixedCacheLayer(context_len=12, sliding_window=window, arena=arena)
        for _ in range(2):  # a second step finds the same length
            found, values = layer.update(keys, 2 * keys)
            assert found.shape == values.shape == (2, 3, held + 1, 8)
            assert (found[:, :, -1] == 1).all()
            assert (values[:, :, -1] == 2).all()
        assert layer.get_seq_length() == 12
        assert layer.get_mask_sizes(1) == (held + 1, 12 - held)


def test_where_memory_is_short_fewer_layers_are_built(monkeypatch, caplog):
    config = build_tiny_model("llama", num_layers=12).config
    monkeypatch.setattr(measure_module, "_get_usable_bytes", lambda device: 4 * (2 * 97 * 32 + 97 + 8 * 9000))
    profile = measure_profile(config, device="cpu", dtype=torch.float32, context_len=4, budget_s=0.05)
    assert 4 <= profile.num_layers_measured < 12
    assert profile.geometry.num_layers == 12
    assert "of 12 layers" in caplog.text
    monkeypatch.setattr(measure_module, "_get_usable_bytes", lambda device: 4 * 20000)
    with pytest.raises(LpsearchError, match="not enough memory on cpu to measure latency: 4 layers"):
        measure_profile(config, device="cpu", dtype=torch.float32, context_len=4)


@pytest.mark.gpu
def test_a_gpu_is_measured():
    config = build_tiny_model("llama").config
    profile = measure_profile(config, device="cuda", dtype=torch.bfloat16, context_len=12, budget_s=0.5)
    assert profile.device == torch.cuda.get_device_name()
    assert all(point.median_ms > 0 for point in profile.points)
