"""Weights of wide layers: a group of m layers as one layer of m times the heads and intermediate size.

The rows of the input projections of all members are stacked, the columns of their output projections put side by side,
so that the sum over the group happens inside the products (or, in families with post-norms, so that one batched product
gives every member's output). Norm weights are folded into the projections behind them: what remains of an RMSNorm is
its scale. Random weights take parts of a workspace; real ones come from a Hugging Face model and carry the same shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lpsearch.latency.architecture import Architecture, Segment

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lpsearch.latency.runtime.memory import Workspace
    from lpsearch.plan import Plan

__all__ = [
    "DecoderWeights",
    "WideLayer",
    "count_cache_elements",
    "count_weight_elements",
    "fuse_model",
    "take_random_weights",
]


@dataclass(frozen=True)
class WideLayer:
    """Weights of one group on one rank. P is 1, or the number of members where each has post-norms.

    Attributes:
        segments: the members, by how they attend; every tensor has them in this order.
        qkv: (rows, hidden); for each segment the queries' rows of all its members, then keys', then values'.
        qkv_bias: (rows,).
        q_norm: for each segment, (heads, head_dim) of all its members, or (members, width) for full-width norms.
        k_norm: likewise for the key-value heads.
        o: (P, hidden, columns): the members' columns side by side if P is 1.
        o_bias: (P, hidden); zero on all ranks but the first, likewise ``down_bias``.
        attention_post: (P, hidden), the post-norms' weights; None without post-norms.
        gate_up: (rows, hidden): the gates of all members, then the ups.
        gate_up_bias: (rows,).
        down: (P, hidden, columns).
        down_bias: (P, hidden).
        mlp_post: as ``attention_post``.
    """

    segments: tuple[Segment, ...]
    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_bias: Tensor | None = None
    o_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    q_norm: tuple[Tensor, ...] = ()
    k_norm: tuple[Tensor, ...] = ()
    attention_post: Tensor | None = None
    mlp_post: Tensor | None = None

    def list_matrices(self) -> tuple[Tensor, ...]:
        """Return the matrices, which a decode step reads once."""
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True)
class DecoderWeights:
    """Weights of a whole decoder on one rank.

    Attributes:
        embedding: (vocab_size, hidden), whole on every rank.
        layers: one wide layer a group.
        head: (rows, hidden): this rank's part of the vocabulary, with the final norm folded in.
        head_start: first token of that part.
    """

    embedding: Tensor
    layers: tuple[WideLayer, ...]
    head: Tensor
    head_start: int


def take_random_weights(
    architecture: Architecture,
    plan: Plan,
    workspace: Workspace,
    *,
    embedding: Tensor,
    head: Tensor,
    rank: int,
    num_ranks: int,
) -> DecoderWeights:
    """Take a plan's weights of one rank out of a workspace; they mean nothing, but cost what real ones cost.

    Args:
        architecture: the shape.
        plan: its groups.
        workspace: where every plan's layers begin at the start.
        embedding: (vocab_size, hidden).
        head: (rows, hidden) of this rank.
        rank: this rank.
        num_ranks: ranks that share the model.
    """
    workspace.rewind()
    layers = []
    for group in plan.groups:
        segments = architecture.split_group(group)
        shapes = _list_shapes(architecture, segments, num_ranks)
        layers.append(_assemble(segments, {name: workspace.take(shape) for name, shape in shapes.items()}))
    return DecoderWeights(embedding, tuple(layers), head, rank * split_vocabulary(architecture, num_ranks))


def fuse_model(
    model: PreTrainedModel, architecture: Architecture, plan: Plan, *, rank: int = 0, num_ranks: int = 1
) -> DecoderWeights:
    """Fuse a Hugging Face model's groups into wide layers, copying the weights in the model's dtype and device.

    Args:
        model: the unmodified model.
        architecture: its architecture.
        plan: its groups.
        rank: this rank.
        num_ranks: ranks that share the model.
    """
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
    members = [_read_member(architecture, layer) for layer in decoder.layers]
    layers = []
    with torch.no_grad():
        for group in plan.groups:
            segments = architecture.split_group(group)
            fused = _fuse_members(architecture, segments, members, rank, num_ranks)
            shapes = _list_shapes(architecture, segments, num_ranks)
            assert {name: tuple(tensor.shape) for name, tensor in fused.items()} == shapes
            layers.append(_assemble(segments, {name: t.to(model.dtype).contiguous() for name, t in fused.items()}))
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        norm = decoder.norm.weight.float() + architecture.norm_offset
        rows = split_vocabulary(architecture, num_ranks)
        part = head.weight[rank * rows : (rank + 1) * rows]
        folded = (part.float() * norm).to(model.dtype)
    return DecoderWeights(decoder.embed_tokens.weight, tuple(layers), folded, rank * rows)


def split_vocabulary(architecture: Architecture, num_ranks: int) -> int:
    """Return the rows of the head that a rank holds; the last may hold fewer."""
    return -(-architecture.vocab_size // num_ranks)


def count_weight_elements(architecture: Architecture, plan: Plan, num_ranks: int) -> int:
    """Return the workspace elements of a plan's layers on one rank."""
    from lpsearch.latency.runtime.memory import align_elements

    groups = [architecture.split_group(group) for group in plan.groups]
    shapes = [shape for segments in groups for shape in _list_shapes(architecture, segments, num_ranks).values()]
    return sum(align_elements(torch.Size(shape).numel()) for shape in shapes)


def count_cache_elements(architecture: Architecture, *, batch_size: int, capacity: int, num_ranks: int) -> int:
    """Return the elements of one layer's keys and values on one rank."""
    return 2 * batch_size * architecture.num_kv_heads // num_ranks * capacity * architecture.head_dim


def _list_shapes(arch: Architecture, segments: Sequence[Segment], num_ranks: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a wide layer on one rank, by its name in :class:`WideLayer`."""
    num_members = sum(len(segment.layers) for segment in segments)
    heads, kv_heads = arch.num_heads // num_ranks, arch.num_kv_heads // num_ranks
    inner, hidden = arch.intermediate_size // num_ranks, arch.hidden_size
    outputs = num_members if arch.has_post_norms else 1
    shapes: dict[str, tuple[int, ...]] = {
        "qkv": (num_members * (heads + 2 * kv_heads) * arch.head_dim, hidden),
        "o": (outputs, hidden, num_members // outputs * heads * arch.head_dim),
        "gate_up": (2 * num_members * inner, hidden),
        "down": (outputs, hidden, num_members // outputs * inner),
    }
    if arch.qkv_bias:
        shapes["qkv_bias"] = shapes["qkv"][:1]
    if arch.o_bias:
        shapes["o_bias"] = (outputs, hidden)
    if arch.mlp_bias:
        shapes |= {"gate_up_bias": shapes["gate_up"][:1], "down_bias": (outputs, hidden)}
    if arch.has_post_norms:
        shapes |= {"attention_post": (outputs, hidden), "mlp_post": (outputs, hidden)}
    for index, segment in enumerate(segments):
        members = len(segment.layers)
        if arch.qk_norm == "head":
            shapes[f"q_norm.{index}"] = (members * heads, arch.head_dim)
            shapes[f"k_norm.{index}"] = (members * kv_heads, arch.head_dim)
        elif arch.qk_norm == "full":
            shapes[f"q_norm.{index}"] = (members, heads * arch.head_dim)
            shapes[f"k_norm.{index}"] = (members, kv_heads * arch.head_dim)
    return shapes


def _assemble(segments: tuple[Segment, ...], tensors: Mapping[str, Tensor]) -> WideLayer:
    values: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if "." not in name}
    for name in ("q_norm", "k_norm"):
        parts = (f"{name}.{index}" for index in range(len(segments)))
        values[name] = tuple(tensors[part] for part in parts if part in tensors)
    return WideLayer(segments, **values)


def _read_member(arch: Architecture, layer: Any) -> dict[str, Tensor | None]:
    """Return a decoder layer's weights by part, norms as factors in float32; views where transformers packs them."""
    attention, mlp = layer.self_attn, layer.mlp
    widths = [arch.num_heads * arch.head_dim, *[arch.num_kv_heads * arch.head_dim] * 2]
    member: dict[str, Tensor | None] = {"o": attention.o_proj.weight, "o_bias": attention.o_proj.bias}
    member |= {"down": mlp.down_proj.weight, "down_bias": mlp.down_proj.bias}
    if hasattr(attention, "qkv_proj"):
        member |= dict(zip("qkv", attention.qkv_proj.weight.split(widths), strict=True))
        member |= dict(zip(("gate", "up"), mlp.gate_up_proj.weight.chunk(2), strict=True))
    else:
        for name in "qkv":
            projection = getattr(attention, f"{name}_proj")
            member |= {name: projection.weight, f"{name}_bias": projection.bias}
        for name in ("gate", "up"):
            projection = getattr(mlp, f"{name}_proj")
            member |= {name: projection.weight, f"{name}_bias": projection.bias}
    norms: dict[str, Any] = {
        "pre": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
        "post": {"attention_post": "post_attention_layernorm", "mlp_post": "post_feedforward_layernorm"},
        "sandwich": {
            "attention_norm": "input_layernorm",
            "attention_post": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post": "post_feedforward_layernorm",
        },
    }[arch.norm_form]
    for part, name in norms.items():
        member[part] = getattr(layer, name).weight.float() + arch.norm_offset
    if arch.qk_norm != "none":
        member |= {name: getattr(attention, name).weight.float() + arch.norm_offset for name in ("q_norm", "k_norm")}
    return member


def _fuse_members(
    arch: Architecture,
    segments: Sequence[Segment],
    members: Sequence[Mapping[str, Tensor | None]],
    rank: int,
    num_ranks: int,
) -> dict[str, Tensor]:
    """Compute the tensors of a wide layer on one rank, by their names in :class:`WideLayer`, in float32."""
    group = [members[layer_idx] for segment in segments for layer_idx in segment.layers]

    def shard(tensor: Tensor | None, dim: int) -> Tensor:
        assert tensor is not None
        return tensor.float().chunk(num_ranks, dim)[rank]

    def fold(member: Mapping[str, Tensor | None], name: str, norm: str) -> Tensor:
        factor = member.get(norm)
        part = shard(member[name], 0)
        return part if factor is None else part * factor

    def whole(name: str) -> list[Tensor]:
        return [tensor.float() for member in group if (tensor := member[name]) is not None]

    def add_bias(name: str) -> Tensor:
        """Return an output bias: added up over members, or stacked; on the first rank alone."""
        stacked = torch.stack(whole(name)) * arch.residual_scale * (rank == 0)
        return stacked if arch.has_post_norms else stacked.sum(0, keepdim=True)

    def join_columns(name: str) -> Tensor:
        parts = [shard(member[name], 1) * arch.residual_scale for member in group]
        return torch.stack(parts) if arch.has_post_norms else torch.cat(parts, 1)[None]

    in_order = [(name, members[i]) for segment in segments for name in "qkv" for i in segment.layers]
    fused = {
        "qkv": torch.cat([fold(member, name, "attention_norm") for name, member in in_order]),
        "o": join_columns("o"),
        "gate_up": torch.cat([fold(member, name, "mlp_norm") for name in ("gate", "up") for member in group]),
        "down": join_columns("down"),
    }
    if arch.qkv_bias:
        fused["qkv_bias"] = torch.cat([shard(member[f"{name}_bias"], 0) for name, member in in_order])
    if arch.o_bias:
        fused["o_bias"] = add_bias("o_bias")
    if arch.mlp_bias:
        biases = [shard(member[f"{name}_bias"], 0) for name in ("gate", "up") for member in group]
        fused |= {"gate_up_bias": torch.cat(biases), "down_bias": add_bias("down_bias")}
    if arch.has_post_norms:
        fused |= {name: torch.stack(whole(name)) for name in ("attention_post", "mlp_post")}
    for index, segment in enumerate(segments):
        for name, count in (("q_norm", arch.num_heads // num_ranks), ("k_norm", arch.num_kv_heads // num_ranks)):
            if arch.qk_norm == "none":
                continue
            norms = [members[i][name] for i in segment.layers]
            if arch.qk_norm == "full":
                fused[f"{name}.{index}"] = torch.stack([shard(norm, 0) for norm in norms])
            else:
                rows = [norm.float().expand(count, -1) for norm in norms if norm is not None]
                fused[f"{name}.{index}"] = torch.cat(rows)
    return fused
