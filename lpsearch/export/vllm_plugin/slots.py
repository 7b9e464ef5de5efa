"""One entry of ``model.layers`` in vLLM: a family's stock decoder layer, built for a whole group.

``config.lpsearch`` names the layers of the base model in each group, and those that share a cache slot. A group whose
members attend in several ways has several slots. vLLM's layers pass on a pair, what is still to be added to the
residual stream and that stream; within a group the pair is instead what earlier slots found and the stream as the
group got it, so nothing but the group's own slots needs to know.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer

from lpsearch.errors import ModelError
from lpsearch.models.traits import BlockForm, Family, FamilyTraits, read_traits
from lpsearch.transform.modeling_lpsearch import MemberNorms, MemberPostNorms, count_mlp_blocks


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
    slots, slot = config.lpsearch["slots"], int(prefix.rpartition(".")[2])
    group = next(group for group in config.lpsearch["groups"] if slots[slot][0] in group)
    num_members = len(slots[slot])
    layer = _build_layer(traits, vllm_config, prefix=prefix, slot=slot)
    if len(group) > 1:
        _check_tensor_parallel(traits, layer, num_members=num_members, num_grouped=len(group), prefix=prefix)
    if traits.qk_norm != "none" and num_members > 1:
        _give_head_norms(layer.self_attn, num_members)
    if traits.has_post_norms and len(group) > 1:
        _give_post_norms(layer, family.block, num_members=num_members, num_grouped=len(group), prefix=prefix)
    if num_members == len(group):
        built: nn.Module = layer
        return built
    is_first = slots[slot][0] == group[0]
    is_last = slot + 1 == len(slots) or slots[slot + 1][0] not in group
    if not is_last:
        return LeadingSlot(layer, is_first=is_first, side_by_side=traits.has_post_norms)
    return ClosingPostNormSlot(layer, family.block) if traits.has_post_norms else ClosingSlot(layer)


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


def _check_tensor_parallel(
    traits: FamilyTraits, layer: Any, *, num_members: int, num_grouped: int, prefix: str
) -> None:
    """Refuse more GPUs than a single member can be split over: its norms see its own heads and features alone."""
    world_size = get_tensor_model_parallel_world_size()
    counts = {}
    if traits.qk_norm != "none" or traits.has_post_norms:
        counts["key-value heads"] = layer.self_attn.total_num_kv_heads // num_members
    if traits.has_post_norms:
        counts["blocks of MLP features"] = count_mlp_blocks(layer.mlp.down_proj.input_size // num_grouped)
    for what, count in counts.items():
        if count % world_size:
            raise ModelError(
                f"{prefix}: each of the {num_grouped} layers of this group has {count} {what}, which "
                f"{world_size} tensor-parallel ranks cannot share equally; use a tensor parallel size that divides it"
            )


def _give_head_norms(attention: Any, num_members: int) -> None:
    """Give every member its own norm of queries and keys, over (tokens, heads, head_dim)."""
    query_block = attention.num_heads // attention.num_kv_heads
    for name, block in (("q_norm", query_block), ("k_norm", 1)):
        norm = getattr(attention, name)
        norms = [_build_norm(norm) for _ in range(num_members)]
        setattr(attention, name, MemberNorms(norms, -2, block))


def _give_post_norms(layer: Any, block: BlockForm, *, num_members: int, num_grouped: int, prefix: str) -> None:
    """Give every member its own output projections and post-norms."""
    attention, mlp = layer.self_attn, layer.mlp
    if num_members > 1:
        turn = attention.head_dim * attention.num_heads // attention.num_kv_heads
        _split_linear(attention, "o_proj", num_members, turn, prefix=f"{prefix}.self_attn")
    inner = mlp.down_proj.input_size // num_grouped
    _split_linear(mlp, "down_proj", num_grouped, inner // count_mlp_blocks(inner), prefix=f"{prefix}.mlp")
    for name in (block.attention_post_norm, block.mlp_post_norm):
        assert name is not None  # it has post-norms
        setattr(layer, name, MemberPostNorms([_build_norm(getattr(layer, name)) for _ in range(num_grouped)]))


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


class NoRotaryAttention(LlamaAttention):  # type: ignore[misc]
    """Llama's attention without position information (NoPE)."""

    def _init_rotary_emb(self, config: Any, quant_config: Any) -> None:
        self.rotary_emb = _leave_unrotated


def _leave_unrotated(positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Stand where a rotary embedding would."""
    return query, key


class MemberLinears(nn.ModuleList):
    """One row-parallel linear module a member, each on its own features; the outputs stand side by side.

    Each rank sums over its own features, and one all-reduce adds the outputs of all members up.

    Args:
        linears: one a member.
        block: features that a member has in each of its turns.
        is_reduced: whether the modules add up over ranks themselves.
    """

    def __init__(self, linears: list[nn.Module], block: int, *, is_reduced: bool) -> None:
        super().__init__(linears)
        self.block = block
        self.needs_reduction = not is_reduced and get_tensor_model_parallel_world_size() > 1

    def forward(self, features: Tensor) -> tuple[Tensor, None]:
        """Take (tokens, turns x members x block) to (tokens, members x hidden)."""
        parts = features.unflatten(-1, (-1, len(self), self.block)).unbind(-2)  # type: ignore[no-untyped-call]
        output = torch.cat([linear(part.flatten(-2))[0] for linear, part in zip(self, parts, strict=True)], dim=-1)
        if self.needs_reduction:
            output = tensor_model_parallel_all_reduce(output)
        return output, None


class LeadingSlot(nn.Module):
    """The members of a group that attend in a way of their own, ahead of the slot that is the layer.

    Args:
        layer: a decoder layer, of which the attention and the norm before it are kept.
        is_first: whether this slot begins its group.
        side_by_side: whether attention outputs are put beside each other rather than added up.
    """

    def __init__(self, layer: Any, *, is_first: bool, side_by_side: bool) -> None:
        super().__init__()
        self.input_layernorm = layer.input_layernorm
        self.self_attn = layer.self_attn
        self.is_first = is_first
        self.side_by_side = side_by_side

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return what the group's slots found so far and the residual stream as the group got it."""
        if not self.is_first:
            assert residual is not None
            attended = self.self_attn(positions=positions, hidden_states=self.input_layernorm(residual))
            return _join(hidden_states, attended, side_by_side=self.side_by_side), residual
        if residual is None:
            normed, residual = self.input_layernorm(hidden_states), hidden_states
        else:
            normed, residual = self.input_layernorm(hidden_states, residual)
        return self.self_attn(positions=positions, hidden_states=normed), residual


class ClosingSlot(nn.Module):
    """The slot of a group of several that is its layer, for families without post-norms."""

    input_layernorm: Any
    self_attn: Any
    post_attention_layernorm: Any
    mlp: Any

    def __init__(self, layer: Any) -> None:
        super().__init__()
        for name, module in layer.named_children():
            self.add_module(name, module)

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take what earlier slots found and the residual stream as the group got it, and finish the group."""
        attended = self.self_attn(positions=positions, hidden_states=self.input_layernorm(residual))
        attended = _join(hidden_states, attended, side_by_side=False)
        hidden_states, residual = self.post_attention_layernorm(attended, residual)
        return self.mlp(hidden_states), residual


class ClosingPostNormSlot(ClosingSlot):
    """The same for families with post-norms.

    Args:
        layer: a decoder layer.
        block: which of its submodules is which norm.
    """

    def __init__(self, layer: Any, block: BlockForm) -> None:
        super().__init__(layer)
        self.block = block

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take what earlier slots found and the residual stream as the group got it, and finish the group."""
        attention_post, mlp_norm, mlp_post = (
            getattr(self, str(name))
            for name in (self.block.attention_post_norm, self.block.mlp_norm, self.block.mlp_post_norm)
        )
        attended = self.self_attn(positions=positions, hidden_states=self.input_layernorm(residual))
        attended = attention_post(_join(hidden_states, attended, side_by_side=True))
        hidden_states, residual = mlp_norm(attended, residual)
        return mlp_post(self.mlp(hidden_states)), residual


def _join(carried: Tensor, attended: Tensor, *, side_by_side: bool) -> Tensor:
    """Put a slot's attention output to those of earlier slots."""
    return torch.cat([carried, attended], dim=-1) if side_by_side else carried + attended
