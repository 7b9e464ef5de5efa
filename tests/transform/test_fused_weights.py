"""Fused weights: that both layouts hold the same rows, and that shapes are known without weights."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from lpsearch.models.families import get_decoder_layers
from lpsearch.models.traits import read_traits
from lpsearch.transform.fused_config import build_fused_config
from lpsearch.transform.fused_weights import (
    InterleavedWeights,
    MemberWeights,
    StackedWeights,
    name_tensors,
    share_norm,
)
from tests.fusing import MIXED
from tests.tiny_models import RUNTIME_FAMILIES, build_tiny_model
from tests.tolerances import FLOAT32_FUSED


def sort_rows(tensor: Tensor) -> Tensor:
    """Return the rows of a matrix in an order of their own, so that two layouts of them compare."""
    return tensor[torch.argsort(tensor[:, 0])]


def test_rows_packed_by_head_are_told_apart() -> None:
    model = build_tiny_model("gpt_neox_sequential")
    traits = read_traits(model.config)
    layer = get_decoder_layers(model)[1]
    norm, packed = layer.input_layernorm, layer.attention.query_key_value
    members = MemberWeights(traits, name_tensors(get_decoder_layers(model), decoder="gpt_neox").get)
    weights, biases = (members.fold(1, "attention.query_key_value", kind) for kind in ("weight", "bias"))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    normed = torch.nn.functional.layer_norm(x, (32,), eps=norm.eps)
    heads = packed(norm(x)).view(5, 4, 3 * 8)  # as transformers' attention splits them
    for weight, bias, expected in zip(weights, biases, heads.chunk(3, dim=-1), strict=True):
        torch.testing.assert_close(normed @ weight.T + bias, expected.flatten(1))


@pytest.mark.parametrize("family", RUNTIME_FAMILIES)
def test_both_layouts_hold_the_same_rows(family: str) -> None:
    model = build_tiny_model(family)
    traits = read_traits(model.config)
    read = name_tensors(get_decoder_layers(model)).get
    stacked = StackedWeights(traits, read)
    fused_config = build_fused_config(model.config, MIXED)
    interleaved = InterleavedWeights(model.config, fused_config, read)
    slots = fused_config.lpsearch["slots"]
    for group in ([1, 2], [3, 4, 5]):
        own = [slot for slot, members in enumerate(slots) if members[0] in group]
        wide = stacked.compute(group)
        assert [list(part.layers) for part in wide.parts] == [slots[slot] for slot in own]
        rows = {name: parts for name, parts in traits.family.projections.items() if parts[0] not in ("o", "down")}
        for module in rows:
            in_attention = module.startswith("self_attn")
            norm = traits.family.block.attention_norm if in_attention else traits.family.block.mlp_norm
            matrix = wide.qkv if in_attention else wide.gate_up
            found = [slot for slot in (own if in_attention else own[-1:]) if not in_attention or len(slots[slot]) > 1]
            for slot in found:  # a member that attends alone is not folded
                rows_in_turns = interleaved.compute(f"model.layers.{slot}.{module}.weight", torch.float32)
                if norm is not None:  # what the members share is still in front
                    shared = interleaved.compute(f"model.layers.{slot}.{norm}.weight", torch.float32)
                    rows_in_turns = rows_in_turns * (shared + traits.norm_offset)
                nearest = (rows_in_turns[:, None] - matrix[None]).abs().amax(2).amin(1)
                assert float(nearest.max()) < FLOAT32_FUSED * float(matrix.abs().max()), module
            assert found or in_attention


def test_members_share_the_geometric_mean_of_their_norms() -> None:
    first = torch.tensor([4.0, -1.0, 0.5, 0.0, 0.0, 1e-9])
    second = torch.tensor([1.0, 1.0, -8.0, 3.0, 0.0, -16.0])
    shared = share_norm([first, second])
    # By hand: a weight of less than a 64th of the other's counts as that 64th; 1 where there is nothing to share.
    expected = [2.0, 1.0, 2.0, (3 * 3 / 64) ** 0.5, 1.0, (16 * 16 / 64) ** 0.5]
    assert shared.tolist() == pytest.approx(expected, rel=FLOAT32_FUSED)
    for norm in (first, second):
        assert float((norm / shared).abs().max()) <= 8 * (1 + FLOAT32_FUSED)
        torch.testing.assert_close(norm / shared * shared, norm)


def test_what_members_do_not_share_is_folded_against_the_norm_that_is_stored() -> None:
    model = build_tiny_model("llama").bfloat16()
    read = name_tensors(get_decoder_layers(model)).get
    interleaved = InterleavedWeights(model.config, build_fused_config(model.config, MIXED), read)
    norms = [get_decoder_layers(model)[layer].post_attention_layernorm.weight.float() for layer in (1, 2)]
    stored = interleaved.compute("model.layers.1.post_attention_layernorm.weight", torch.bfloat16)
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored, share_norm(norms).bfloat16())
    ups = interleaved.compute("model.layers.1.mlp.up_proj.weight", torch.bfloat16)
    for layer, norm, rows in zip((1, 2), norms, ups.chunk(2), strict=True):
        weight = get_decoder_layers(model)[layer].mlp.up_proj.weight.float()
        assert torch.equal(rows, (weight * (norm / stored.float())).bfloat16())  # rounded once


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("family", RUNTIME_FAMILIES)
def test_shapes_are_known_without_weights(family: str, num_ranks: int) -> None:
    model = build_tiny_model(family)
    traits = read_traits(model.config)
    read = name_tensors(get_decoder_layers(model)).get
    for group in ([0], [1, 2], [3, 4, 5]):
        expected = StackedWeights.from_shape(traits, num_ranks=num_ranks).compute(group)
        ranks = [
            StackedWeights(traits, read, rank=rank, num_ranks=num_ranks).compute(group) for rank in range(num_ranks)
        ]
        for attribute in fields(expected):
            value = getattr(expected, attribute.name)
            for found in (getattr(wide, attribute.name) for wide in ranks):
                if isinstance(value, Tensor):
                    assert found.shape == value.shape, attribute.name
                elif attribute.name in ("q_norm", "k_norm"):
                    assert [norm.shape for norm in found] == [norm.shape for norm in value]
                else:
                    assert found == value, attribute.name


def test_the_ranks_of_a_layer_together_are_the_layer() -> None:
    model = build_tiny_model("granite", attention_bias=True, mlp_bias=True)
    traits = read_traits(model.config)
    read = name_tensors(get_decoder_layers(model)).get
    whole = StackedWeights(traits, read).compute([1, 2])
    first, second = (StackedWeights(traits, read, rank=rank, num_ranks=2).compute([1, 2]) for rank in range(2))
    assert whole.o_bias is not None
    assert first.o_bias is not None
    assert second.o_bias is not None
    assert torch.equal(first.o_bias + second.o_bias, whole.o_bias)
    assert not second.o_bias.any()
    for part in ("qkv", "gate_up"):
        halves = torch.cat([getattr(first, part), getattr(second, part)])
        assert torch.equal(sort_rows(halves), sort_rows(getattr(whole, part)))
    down = sum(model.model.layers[i].mlp.down_proj.weight.double().sum() for i in (1, 2)) * 0.6
    assert torch.isclose(first.down.double().sum() + second.down.double().sum(), down)
