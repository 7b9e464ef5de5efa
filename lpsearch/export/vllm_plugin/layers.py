"""What an entry of ``model.layers`` in vLLM can be, beside a family's stock decoder layer."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.models.llama import LlamaAttention

from lpsearch.models.traits import BlockForm


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
        normed, residual = _add_and_norm(self.input_layernorm, hidden_states, residual)
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


class AttendingSlot(nn.Module):
    """The last slot of a group whose MLPs are all dropped.

    Args:
        layer: a decoder layer, of which the attention and its norms are kept.
        block: which of its submodules is which norm.
        is_closing: whether earlier slots of the group attended too.
    """

    def __init__(self, layer: Any, block: BlockForm, *, is_closing: bool) -> None:
        super().__init__()
        self.input_layernorm = layer.input_layernorm
        self.self_attn = layer.self_attn
        self.post_norm = block.attention_post_norm
        if self.post_norm is not None:
            self.add_module(self.post_norm, getattr(layer, self.post_norm))
        self.is_closing = is_closing
        self.residual_multiplier = getattr(layer, "residual_multiplier", None)

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None = None, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Do what the family's layer does before its MLP; Granite's keeps no pair."""
        if self.residual_multiplier is not None:
            attended = self.self_attn(positions=positions, hidden_states=self.input_layernorm(hidden_states))
            output: Tensor = hidden_states + attended * self.residual_multiplier
            return output
        if self.is_closing:
            assert residual is not None
            attended = self.self_attn(positions=positions, hidden_states=self.input_layernorm(residual))
            attended = _join(hidden_states, attended, side_by_side=self.post_norm is not None)
        else:
            normed, residual = _add_and_norm(self.input_layernorm, hidden_states, residual)
            attended = self.self_attn(positions=positions, hidden_states=normed)
        return attended if self.post_norm is None else getattr(self, self.post_norm)(attended), residual


class FeedForward(nn.Module):
    """The MLP of a group that has no attention.

    Args:
        mlp: of vLLM.
        norms: by name, those before and after it.
        block: which of them is which.
        residual_multiplier: Granite's, whose layers keep no pair.
    """

    def __init__(
        self, mlp: nn.Module, norms: dict[str, nn.Module], block: BlockForm, *, residual_multiplier: float | None
    ) -> None:
        super().__init__()
        self.mlp = mlp
        for name, norm in norms.items():
            self.add_module(name, norm)
        self.norm, self.post_norm = block.mlp_norm, block.mlp_post_norm
        self.residual_multiplier = residual_multiplier

    def forward(self, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Take a pair to a pair, or hidden states and None to the same."""
        norm = getattr(self, str(self.norm))
        if self.residual_multiplier is not None:
            return hidden_states + self.mlp(norm(hidden_states)) * self.residual_multiplier, None
        normed, residual = _add_and_norm(norm, hidden_states, residual)
        output = self.mlp(normed)
        return output if self.post_norm is None else getattr(self, self.post_norm)(output), residual


@cache
def build_longer_slot(slot_class: Any, *, keeps_pair: bool) -> type[nn.Module]:
    """Return the class of an entry with further MLPs ahead of it and after it.

    Args:
        slot_class: of the entry.
        keeps_pair: whether it takes and gives a pair, as all but Granite's do.
    """

    class LongerSlot(slot_class):  # type: ignore[misc]
        def forward(
            self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None = None, **kwargs: Any
        ) -> Tensor | tuple[Tensor, Tensor | None]:
            for mlp in self.mlps_ahead:
                hidden_states, residual = mlp(hidden_states, residual)
            if not keeps_pair:
                hidden_states = super().forward(positions, hidden_states)
            else:
                hidden_states, residual = super().forward(positions, hidden_states, residual, **kwargs)
            for mlp in self.more_mlps:
                hidden_states, residual = mlp(hidden_states, residual)
            return (hidden_states, residual) if keeps_pair else hidden_states

    return LongerSlot


def _add_and_norm(norm: Any, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add up a pair, if it is one already, and norm the residual stream."""
    if residual is None:
        return norm(hidden_states), hidden_states
    normed, residual = norm(hidden_states, residual)
    return normed, residual


def _join(carried: Tensor, attended: Tensor, *, side_by_side: bool) -> Tensor:
    """Put a slot's attention output to those of earlier slots."""
    return torch.cat([carried, attended], dim=-1) if side_by_side else carried + attended
