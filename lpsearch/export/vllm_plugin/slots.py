"""One entry of ``model.layers`` in vLLM: a family's stock decoder layer, built for a whole group.

``config.lpsearch`` names the layers of the base model in each group, those that share a cache slot, and those whose
MLPs follow. A group whose members attend in several ways has several slots. Every entry attends, so vLLM's cache has no
exceptions: the MLP of a group that has no attention left is a part of the entry before it. vLLM's layers pass on a
pair, what is still to be added to the residual stream and that stream; within a group the pair is instead what earlier
slots found and the stream as the group got it, so nothing but the group's own slots needs to know.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer

from lpsearch.errors import ModelError
from lpsearch.export.vllm_plugin.layers import (
    AttendingSlot,
    ClosingPostNormSlot,
    ClosingSlot,
    FeedForward,
    LeadingSlot,
    MemberLinears,
    NoRotaryAttention,
    build_longer_slot,
)
from lpsearch.models.traits import BlockForm, Family, FamilyTraits, read_traits
from lpsearch.transform.modeling_lpsearch import (
    MemberNorms,
    MemberPostNorms,
    count_mlp_blocks,
    list_mlps,
    list_more_mlps,
)


def build_slot(vllm_config: VllmConfig, *, family: Family, prefix: str) -> nn.Module:
    """Build the entry of ``model.layers`` that the last part of a prefix numbers.

    Args:
        vllm_config: vLLM's configuration.
        family: the base model's entry, which names a model of vLLM.
        prefix: the entry's name, e.g. ``model.layers.3``.

    Raises:
        ModelError: if tensor parallelism would cut through a member of a group that has norms of its own.
    """
    config = vllm_config.model_config.hf_config
    traits = read_traits(config, family=family)
    names, slot = config.lpsearch, int(prefix.rpartition(".")[2])
    slots, mlp = names["slots"], list_mlps(names)[slot]
    group = next(group for group in names["groups"] if slots[slot][0] in group)
    alike = [members for members in slots if members[0] in group]  # the slots of the group
    num_members, num_attending = len(slots[slot]), sum(map(len, alike))
    layer = _build_layer(traits, vllm_config, prefix=prefix, slot=slot)
    further = {
        attribute: [
            _build_feed_forward(
                traits, layer, vllm_config, num_members=len(more["layers"]), prefix=f"{prefix}.{attribute}.{position}"
            )
            for position, more in enumerate(mlps)
        ]
        for attribute, mlps in list_more_mlps(names, slot).items()
    }
    if num_attending > 1:
        _check_heads(traits, layer, num_members=num_members, prefix=prefix)
    if traits.qk_norm != "none" and num_members > 1:
        _give_head_norms(layer.self_attn, num_members)
    if traits.has_post_norms:
        _give_attention_post_norms(
            layer, family.block, num_members=num_members, num_attending=num_attending, prefix=prefix
        )
        _give_mlp_post_norms(layer, family.block, num_members=len(mlp), prefix=prefix)
    is_leading, is_closing = slots[slot] != alike[-1], len(alike) > 1
    if is_leading:
        layer = LeadingSlot(layer, is_first=slots[slot] == alike[0], side_by_side=traits.has_post_norms)
    elif not mlp:
        layer = AttendingSlot(layer, family.block, is_closing=is_closing)
    elif is_closing:
        layer = ClosingPostNormSlot(layer, family.block) if traits.has_post_norms else ClosingSlot(layer)
    if any(further.values()):
        for attribute, mlps in further.items():
            layer.add_module(attribute, nn.ModuleList(mlps))
        slot_class: Any = type(layer)
        keeps_pair = getattr(layer, "residual_multiplier", None) is None
        layer.__class__ = build_longer_slot(slot_class, keeps_pair=keeps_pair)
    built: nn.Module = layer
    return built


def _build_layer(traits: FamilyTraits, vllm_config: VllmConfig, *, prefix: str, slot: int) -> Any:
    """Build vLLM's decoder layer of a family for one entry's own configuration."""
    assert traits.family.vllm is not None
    module_name, stem = traits.family.vllm
    module = import_module(f"vllm.model_executor.models.{module_name}")
    layer_class: Callable[..., Any] = getattr(module, f"{stem}DecoderLayer", LlamaDecoderLayer)
    config, kind = vllm_config.model_config.hf_config.per_layer_config[slot], traits.kinds[slot]
    if layer_class is LlamaDecoderLayer and traits.has_bias("q") != traits.has_bias("o"):
        config = copy.copy(config)
        config.qkv_bias, config.attention_bias = traits.has_bias("q"), traits.has_bias("o")
    options: dict[str, Any] = {
        "vllm_config": vllm_config,
        "cache_config": vllm_config.cache_config,
        "quant_config": vllm_config.quant_config,
        "per_layer_sliding_window": kind.window,
        "attn_layer_type": LlamaAttention if kind.rotates else NoRotaryAttention,
    }
    taken = signature(layer_class).parameters
    own = {name: option for name, option in options.items() if name in taken}
    return layer_class(config=config, prefix=prefix, **own)


def _build_feed_forward(
    traits: FamilyTraits, layer: Any, vllm_config: VllmConfig, *, num_members: int, prefix: str
) -> nn.Module:
    """Build the MLP of a group without attention, of the kinds that a decoder layer has."""
    config, block = vllm_config.model_config.hf_config, traits.family.block
    options: dict[str, Any] = {
        "hidden_size": traits.hidden_size,
        "intermediate_size": num_members * traits.intermediate_size,
        "hidden_act": getattr(config, "hidden_act", None),
        "hidden_activation": getattr(config, "hidden_activation", None),
        "bias": traits.has_bias("up"),
        "quant_config": vllm_config.quant_config,
        "prefix": f"{prefix}.mlp",
    }
    mlp_class = type(layer.mlp)
    taken = signature(mlp_class).parameters
    built = FeedForward(
        mlp_class(**{name: option for name, option in options.items() if name in taken}),
        {name: _build_norm(getattr(layer, name)) for name in (block.mlp_norm, block.mlp_post_norm) if name is not None},
        block,
        residual_multiplier=getattr(layer, "residual_multiplier", None),
    )
    if traits.has_post_norms:
        _give_mlp_post_norms(built, block, num_members=num_members, prefix=prefix)
    return built


def _check_heads(traits: FamilyTraits, layer: Any, *, num_members: int, prefix: str) -> None:
    """Refuse more GPUs than the heads of a single member can be split over: its norms see its own alone."""
    if traits.qk_norm != "none" or traits.has_post_norms:
        _check_share(layer.self_attn.total_num_kv_heads // num_members, "key-value heads", prefix=prefix)


def _check_share(count: int, what: str, *, prefix: str) -> None:
    """Refuse a tensor parallel size that does not divide a number."""
    world_size = get_tensor_model_parallel_world_size()
    if count % world_size:
        raise ModelError(
            f"{prefix}: each of the layers of this group has {count} {what}, which {world_size} tensor-parallel ranks "
            "cannot share equally; use a tensor parallel size that divides it"
        )


def _give_head_norms(attention: Any, num_members: int) -> None:
    """Give every member its own norm of queries and keys, over (tokens, heads, head_dim)."""
    query_block = attention.num_heads // attention.num_kv_heads
    for name, block in (("q_norm", query_block), ("k_norm", 1)):
        norm = getattr(attention, name)
        norms = [_build_norm(norm) for _ in range(num_members)]
        setattr(attention, name, MemberNorms(norms, -2, block))


def _give_attention_post_norms(
    layer: Any, block: BlockForm, *, num_members: int, num_attending: int, prefix: str
) -> None:
    """Give every member of a slot its own output projection, and every one of its group its own norm after that."""
    attention = layer.self_attn
    if num_members > 1:
        turn = attention.head_dim * attention.num_heads // attention.num_kv_heads
        _split_linear(attention, "o_proj", num_members, turn, prefix=f"{prefix}.self_attn")
    if num_attending > 1:
        _repeat_norm(layer, block.attention_post_norm, num_attending)


def _give_mlp_post_norms(owner: Any, block: BlockForm, *, num_members: int, prefix: str) -> None:
    """Give every member of an MLP its own output projection and the norm after it."""
    if num_members <= 1:
        return
    inner = owner.mlp.down_proj.input_size // num_members
    num_blocks = count_mlp_blocks(inner)
    _check_share(num_blocks, "blocks of MLP features", prefix=prefix)
    _split_linear(owner.mlp, "down_proj", num_members, inner // num_blocks, prefix=f"{prefix}.mlp")
    _repeat_norm(owner, block.mlp_post_norm, num_members)


def _repeat_norm(owner: Any, name: str | None, num_members: int) -> None:
    """Replace a norm by one a member."""
    assert name is not None  # it has post-norms
    setattr(owner, name, MemberPostNorms([_build_norm(getattr(owner, name)) for _ in range(num_members)]))


def _split_linear(owner: Any, name: str, num_members: int, block: int, *, prefix: str) -> None:
    """Replace a wide linear module by those of the members that it stands for.

    As in lpsearch's modelling code, whose names the weights have, they are registered under the plural of its name.
    """
    linear = getattr(owner, name)
    delattr(owner, name)
    has_bias = linear.bias is not None
    linears = [
        RowParallelLinear(
            linear.input_size // num_members,
            linear.output_size,
            bias=has_bias,
            reduce_results=has_bias,  # vLLM adds a bias on the first rank only if the module adds up over ranks itself
            prefix=f"{prefix}.{name}s.{member}",
        )
        for member in range(num_members)
    ]
    setattr(owner, f"{name}s", MemberLinears(linears, block, is_reduced=has_bias))
    vars(owner)[name] = getattr(owner, f"{name}s")


def _build_norm(norm: Any) -> nn.Module:
    """Build another norm of the same kind and size."""
    built: nn.Module = type(norm)(norm.weight.shape[0], eps=norm.variance_epsilon)
    return built
