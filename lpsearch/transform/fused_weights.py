"""What a fused model is made of: each of its tensors from those of the base model.

:class:`MemberWeights` computes what one layer brings into a wide one. The weight of a norm, or what of it the members
do not share (:func:`share_norm`), is folded into the projections behind it, in float32 and rounded once. Two layouts
arrange the members of a group:

* :class:`InterleavedWeights`, for ``fuse_plan`` and export: a tensor at a time, by its name in the fused model. The
  key-value heads of the members take turns, so that tensor parallelism gives every rank an equal part of every member.
  The members share a norm, so that what is quantised later keeps columns of the size that it had. A layer alone in its
  group keeps its weights bit for bit.
* :class:`StackedWeights`, for the latency runtime: one :class:`WideLayer` a group, one rank's part of it, with the rows
  of all members projection by projection. Norms are folded into single layers too, since its kernels norm without a
  weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lpsearch.models.traits import OUTPUTS, AttentionPart, FamilyTraits, Projection, read_traits
from lpsearch.plan import Group
from lpsearch.transform.modeling_lpsearch import count_mlp_blocks, list_more_mlps

__all__ = ["InterleavedWeights", "MemberWeights", "StackedWeights", "WideLayer", "name_tensors", "share_norm"]

TensorReader = Callable[[str], Tensor | None]
"""Returns a tensor of the base model by its name in the state dict; None if there is none."""

_TensorKind = Literal["weight", "bias"]

_FOLDED_ELEMENTS = 1 << 20
"""Elements of a weight that are in float32 at a time while a norm is folded into it."""

_LEAST_SHARE = 1 / 64
"""Least share of the largest member's weight that another counts with where members share a norm: what a pair folds is
at most the root of its inverse, 8."""

_LAYER_NAME = re.compile(r"\w+\.layers\.(\d+)\.(.+)")
_MORE_MLPS_NAME = re.compile(r"(mlps_ahead|more_mlps)\.(\d+)\.(.+)")
_MEMBER_NAME = re.compile(r"(.+)\.(\d+)\.(\w+)")


def name_tensors(layers: Iterable[nn.Module], *, decoder: str = "model") -> dict[str, nn.Parameter]:
    """Return the parameters of decoder layers by their names in the state dict of a language model.

    Args:
        layers: all of them.
        decoder: name of the decoder in the language model.
    """
    return {
        f"{decoder}.layers.{layer_idx}.{name}": parameter
        for layer_idx, layer in enumerate(layers)
        for name, parameter in layer.named_parameters()
    }


def share_norm(norms: Sequence[Tensor]) -> Tensor:
    """Return the norm that the members of a wide layer share: the geometric mean of the magnitudes of theirs.

    Where each member has outlying columns of its own, folding a norm whole makes its projections as uneven as the norm
    is, and quantising them afterwards costs more. Only the ratio of a member's norm to the shared one is folded, with
    its sign. A member's weight counts as no less than a 64th of the largest at its place, so that one that is nearly 0
    does not make the other's ratio large; the product is the member's own norm all the same.

    Args:
        norms: what the members' norms multiply by, (hidden,) each, in float32.

    Returns:
        (hidden,), positive; 1 where all are 0.
    """
    sizes = torch.stack([norm.float().abs() for norm in norms])  # (members, hidden)
    largest = sizes.amax(0)
    sizes = torch.maximum(sizes, largest * _LEAST_SHARE)
    return torch.where(largest > 0, sizes.clamp_min(torch.finfo(torch.float32).tiny).log().mean(0).exp(), 1.0)


@dataclass(frozen=True)
class MemberWeights:
    """What one layer of the base model brings into a wide layer.

    Attributes:
        traits: of the base model.
        read: reads its tensors.
    """

    traits: FamilyTraits
    read: TensorReader

    def get(self, layer: int, name: str) -> Tensor:
        """Return a tensor that a layer is known to have, by its name within the layer."""
        tensor = self.find(layer, name)
        assert tensor is not None, (layer, name)
        return tensor

    def find(self, layer: int, name: str) -> Tensor | None:
        """Return a tensor by its name within a layer; None if the layer has none of this name."""
        return self.read(f"{self.traits.family.decoder}.layers.{layer}.{name}")

    def read_norm(self, layer: int, name: str) -> Tensor:
        """Return what a norm multiplies by, in float32."""
        return self.get(layer, f"{name}.weight").float() + self.traits.norm_offset

    def fold(
        self,
        layer: int,
        module: str,
        kind: _TensorKind,
        dtype: torch.dtype = torch.float32,
        shared: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the weights or the biases of the projections in a linear module, the norm before them folded in.

        Args:
            layer: whose.
            module: by its name within the layer.
            kind: of tensor.
            dtype: of weights into which a norm was folded.
            shared: what the norm in front goes on multiplying by, (hidden,) in float32; None for nothing.

        Returns:
            One tensor a projection; biases into which something was folded in float32, and what nothing was folded
            into as stored; none for biases that there are not.
        """
        tensor = self.fold_module(layer, module, kind, dtype, shared)
        if tensor is None:
            return ()
        projections, traits = self.traits.family.projections[module], self.traits
        if projections[0] in OUTPUTS:
            return (tensor,)
        if traits.family.packs_rows_by_head(module):
            heads = torch.unflatten(tensor, 0, (traits.num_heads, len(projections), traits.head_dim))
            return tuple(rows.flatten(0, 1) for rows in heads.unbind(1))
        return torch.split(tensor, [traits.projection_sizes[projection] for projection in projections])

    def fold_module(
        self,
        layer: int,
        module: str,
        kind: _TensorKind,
        dtype: torch.dtype = torch.float32,
        shared: Tensor | None = None,
    ) -> Tensor | None:
        """Return what :meth:`fold` does before it is split by projection; None for a bias that there is not."""
        block = self.traits.family.block
        tensor = self.find(layer, f"{module}.{kind}")
        if self.traits.family.projections[module][0] in OUTPUTS:
            return tensor
        norm = block.attention_norm if module.startswith(f"{block.attention}.") else block.mlp_norm
        norm_bias = None if norm is None else self.find(layer, f"{norm}.bias")
        if kind == "weight" and norm is not None and tensor is not None:
            scale = self.read_norm(layer, norm)
            tensor = _scale_columns(tensor, scale if shared is None else scale / shared.to(scale.device), dtype)
        elif kind == "bias" and norm_bias is not None:
            moved = self.get(layer, f"{module}.weight").float() @ norm_bias.float()
            tensor = moved if tensor is None else moved + tensor.float()
        return tensor


class InterleavedWeights:
    """The tensors of a fused model, each computed when it is asked for.

    Args:
        config: of the unmodified model.
        fused_config: from :func:`lpsearch.transform.fused_config.build_fused_config`.
        read: reads the tensors of the unmodified model.
    """

    def __init__(self, config: PretrainedConfig, fused_config: PretrainedConfig, read: TensorReader) -> None:
        self._traits = read_traits(config)
        self._members = MemberWeights(self._traits, read)
        names = fused_config.lpsearch
        self._slots: list[list[int]] = names["slots"]
        self._mlps: list[list[int]] = names["mlps"]
        self._more_mlps = {
            (attribute, slot, position): more["layers"]
            for slot in range(len(self._slots))
            for attribute, stages in list_more_mlps(names, slot).items()
            for position, more in enumerate(stages)
        }
        # What is kept apart for each attention of a group stands in the order of the slots.
        self._attending = [
            [layer for slot in self._slots if slot[0] in group for layer in slot]
            for members in self._slots
            for group in names["groups"]
            if members[0] in group
        ]

    @torch.no_grad()
    def compute(self, name: str, dtype: torch.dtype) -> Tensor:
        """Compute a tensor of the fused model.

        Args:
            name: in the fused model's state dict.
            dtype: of the result; what is folded is rounded to it once.
        """
        match = _LAYER_NAME.fullmatch(name)
        if match is None:
            tensor = self._members.read(name)
            assert tensor is not None, name
            return tensor.to(dtype)
        block = self._traits.family.block
        rest, layers = self._find_members(int(match[1]), match[2])
        in_attention = rest.startswith(f"{block.attention}.")
        if len(layers) == 1:
            return self._get_alone(layers[0], rest).to(dtype)
        if match := _MEMBER_NAME.fullmatch(rest):
            module = match[1].replace("_projs", "_proj")
            return self._members.get(layers[int(match[2])], f"{module}.{match[3]}").to(dtype)
        module, _, kind = rest.rpartition(".")
        if module not in self._traits.family.projections:  # a norm; its bias is folded whole
            return (
                self._store_shared_norm(layers, module, dtype)
                if kind == "weight"
                else torch.zeros_like(self._members.get(layers[0], rest), dtype=dtype)
            )
        is_output = self._traits.family.projections[module][0] in OUTPUTS
        if is_output and kind == "bias":
            return self._add_biases(layers, rest).to(dtype)
        if in_attention:
            num_turns = self._traits.num_kv_heads
        else:
            num_turns = count_mlp_blocks(self._traits.intermediate_size) if self._traits.has_post_norms else 1
        norm = block.attention_norm if in_attention else block.mlp_norm
        shared = None
        if norm is not None and not is_output:
            shared = self._store_shared_norm(layers, norm, dtype).float() + self._traits.norm_offset
        members = (
            self._fold_blocks(layer, module, "weight" if kind == "weight" else "bias", dtype, shared)
            for layer in layers
        )
        return _take_turns(members, len(layers), num_turns, dim=1 if is_output else 0, dtype=dtype)

    def _find_members(self, slot: int, name: str) -> tuple[str, list[int]]:
        """Return the name of a tensor as one layer has it, and the layers that it is made of.

        Args:
            slot: an entry of ``model.layers``.
            name: of the tensor within the entry.
        """
        block = self._traits.family.block
        if match := _MORE_MLPS_NAME.fullmatch(name):
            return match[3], self._more_mlps[match[1], slot, int(match[2])]
        if name.startswith((f"{block.attention}.", f"{block.attention_norm}.")):
            return name, self._slots[slot]
        return name, self._attending[slot] if name.startswith(f"{block.attention_post_norm}.") else self._mlps[slot]

    def _get_alone(self, layer: int, name: str) -> Tensor:
        """Return a tensor of a branch that is alone in its group, as it is stored.

        A bias that it has not is zero: where attention and MLP have one option for biases, a wide one needs it.
        """
        tensor = self._members.find(layer, name)
        if tensor is None and name.endswith(".bias"):
            weight = self._members.get(layer, f"{name.removesuffix('.bias')}.weight")
            return weight.new_zeros(weight.shape[0])
        return self._members.get(layer, name) if tensor is None else tensor

    def _store_shared_norm(self, layers: Sequence[int], norm: str, dtype: torch.dtype) -> Tensor:
        """Return the norm that members share as it is stored: rounded, and less the offset of the family's norms."""
        first, *others = (self._members.read_norm(layer, norm) for layer in layers)
        shared = share_norm([first, *(other.to(first.device) for other in others)])
        return (shared - self._traits.norm_offset).to(dtype)

    def _fold_blocks(
        self, layer: int, module: str, kind: _TensorKind, dtype: torch.dtype, shared: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return what takes turns in a linear module: its projections, or all at once where each head packs its own."""
        if not self._traits.family.packs_rows_by_head(module):
            return self._members.fold(layer, module, kind, dtype, shared)
        tensor = self._members.fold_module(layer, module, kind, dtype, shared)
        assert tensor is not None, (layer, module, kind)
        return (tensor,)

    def _add_biases(self, layers: Sequence[int], name: str) -> Tensor:
        """Add the biases of output projections, those that there are."""
        total = torch.zeros(self._traits.hidden_size)
        for layer in layers:
            bias = self._members.find(layer, name)
            total = total if bias is None else total.to(bias.device) + bias.float()
        return total


def _scale_columns(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply the columns of a weight in float32 and round once, some rows at a time: a whole copy would be large."""
    scaled = torch.empty_like(weight, dtype=dtype)
    num_rows = max(1, _FOLDED_ELEMENTS // weight.shape[1])
    for rows, target in zip(torch.split(weight, num_rows), torch.split(scaled, num_rows), strict=True):
        target.copy_(rows.float() * scale)
    return scaled


def _take_turns(
    members: Iterable[Sequence[Tensor]], num_members: int, num_turns: int, *, dim: int, dtype: torch.dtype
) -> Tensor:
    """Join the projections of layers along a dimension, block by block: the first of each member, then the second.

    One member is held at a time, beside the result.
    """
    joined: Tensor | None = None
    for position, projections in enumerate(members):
        if joined is None:
            shape = list(projections[0].shape)
            shape[dim] = num_members * sum(tensor.shape[dim] for tensor in projections)
            joined = torch.empty(shape, dtype=dtype, device=projections[0].device)
        sizes = [num_members * tensor.shape[dim] for tensor in projections]
        for tensor, target in zip(projections, joined.split_with_sizes(sizes, dim), strict=True):
            blocks = torch.unflatten(target, dim, (num_turns, num_members, -1)).select(dim + 1, position)
            blocks.copy_(torch.unflatten(tensor, dim, (num_turns, -1)))
    assert joined is not None
    return joined


@dataclass(frozen=True)
class WideLayer:
    """Weights of one group on one rank. P is 1, or the number of members where each has post-norms.

    The members of an attention are the layers whose attention the plan keeps, and likewise for the MLP. A stage
    without members has no tensors.

    Attributes:
        parts: the members whose attention runs, by how they attend; every tensor of it has them in this order.
        qkv: (rows, hidden); for each attention part the queries' rows of all its members, then keys', then values'.
        o: (P, hidden, columns): the members' columns side by side if P is 1.
        gate_up: (rows, hidden): the gates of all members, then the ups.
        down: (P, hidden, columns).
        qkv_bias: (rows,).
        o_bias: (P, hidden); zero on all ranks but the first, likewise ``down_bias``.
        gate_up_bias: (rows,).
        down_bias: (P, hidden).
        q_norm: for each attention part (heads, head_dim) of all its members, or (members, width) for full-width norms.
        k_norm: likewise for the key-value heads.
        attention_post: (P, hidden), the post-norms' weights; None without post-norms.
        mlp_post: as ``attention_post``.
    """

    parts: tuple[AttentionPart, ...]
    qkv: Tensor | None
    o: Tensor | None
    gate_up: Tensor | None
    down: Tensor | None
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
        matrices = (self.qkv, self.o, self.gate_up, self.down)
        return tuple(matrix for matrix in matrices if matrix is not None)

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> WideLayer:
        """Return a layer with each tensor replaced by what a function makes of it, in the order of the attributes."""
        changed: dict[str, Any] = {}
        for attribute in fields(self):
            value = getattr(self, attribute.name)
            if isinstance(value, Tensor):
                changed[attribute.name] = function(value)
            elif attribute.name in ("q_norm", "k_norm"):
                changed[attribute.name] = tuple(function(tensor) for tensor in value)
        return replace(self, **changed)


class StackedWeights:
    """The wide layers of a model as the latency runtime reads them.

    Args:
        traits: of the unmodified model.
        read: reads its tensors.
        rank: whose part of them.
        num_ranks: ranks that share the model.
    """

    def __init__(self, traits: FamilyTraits, read: TensorReader, *, rank: int = 0, num_ranks: int = 1) -> None:
        self._traits = traits
        self._members = MemberWeights(traits, read)
        self._rank, self._num_ranks = rank, num_ranks

    @classmethod
    def from_shape(cls, traits: FamilyTraits, *, num_ranks: int = 1) -> StackedWeights:
        """Stack tensors that have a shape and no memory, to know the shapes of what they become."""
        shapes = traits.list_tensor_shapes()

        def read(name: str) -> Tensor | None:
            match = _LAYER_NAME.fullmatch(name)
            assert match is not None
            return torch.empty(shapes[match[2]], device="meta") if match[2] in shapes else None

        return cls(traits, read, num_ranks=num_ranks)

    @torch.no_grad()
    def compute(self, group: Sequence[int]) -> WideLayer:
        """Compute the wide layer of a group; what is folded is in float32.

        Args:
            group: its layers; what a :class:`~lpsearch.plan.Group` drops is not in the wide layer.
        """
        traits, block = self._traits, self._traits.family.block
        group = group if isinstance(group, Group) else Group.whole(group)
        parts = traits.split_group(group.attention_layers)
        attentions = tuple(layer for part in parts for layer in part.layers)
        mlps = tuple(layer for part in traits.split_group(group.mlp_layers) for layer in part.layers)
        found = {
            layer: self._read_projections(layer, attention=layer in attentions, mlp=layer in mlps) for layer in group
        }

        def stack(kind: _TensorKind, names: tuple[Projection, ...], *runs: tuple[int, ...]) -> Tensor | None:
            order = [(layer, name) for run in runs for name in names for layer in run]
            rows = [self._shard(found[layer][name, kind], 0) for layer, name in order if (name, kind) in found[layer]]
            return torch.cat(rows) if rows else None

        def join(name: Projection, layers: tuple[int, ...]) -> Tensor | None:
            if not layers:
                return None
            columns = [self._shard(self._scale(found[layer][name, "weight"]), 1) for layer in layers]
            return torch.stack(columns) if traits.has_post_norms else torch.cat(columns, 1)[None]

        def add_biases(name: Projection, layers: tuple[int, ...]) -> Tensor | None:
            biases = [tensor.float() for layer in layers if (tensor := found[layer].get((name, "bias"))) is not None]
            if not biases:
                return None
            stacked = self._scale(torch.stack(biases)) * (self._rank == 0)
            return stacked if traits.has_post_norms else stacked.sum(0, keepdim=True)

        def stack_post_norms(name: str | None, layers: tuple[int, ...]) -> Tensor | None:
            if name is None or not layers:
                return None
            return torch.stack([self._members.read_norm(layer, name) for layer in layers]) * traits.residual_scale

        alike = [part.layers for part in parts]
        return WideLayer(
            parts=parts,
            qkv=stack("weight", ("q", "k", "v"), *alike),
            o=join("o", attentions),
            gate_up=stack("weight", ("gate", "up"), mlps),
            down=join("down", mlps),
            qkv_bias=stack("bias", ("q", "k", "v"), *alike),
            o_bias=add_biases("o", attentions),
            gate_up_bias=stack("bias", ("gate", "up"), mlps),
            down_bias=add_biases("down", mlps),
            q_norm=self._stack_head_norms(parts, "q_norm", traits.num_heads),
            k_norm=self._stack_head_norms(parts, "k_norm", traits.num_kv_heads),
            attention_post=stack_post_norms(block.attention_post_norm, attentions),
            mlp_post=stack_post_norms(block.mlp_post_norm, mlps),
        )

    def _read_projections(
        self, layer: int, *, attention: bool, mlp: bool
    ) -> dict[tuple[Projection, _TensorKind], Tensor]:
        """Return the weights and biases that a layer's projections have, with the norms before them folded in.

        Args:
            layer: whose.
            attention: whether those of its attention are wanted.
            mlp: whether those of its MLP are.
        """
        found: dict[tuple[Projection, _TensorKind], Tensor] = {}
        kinds: tuple[_TensorKind, ...] = ("weight", "bias")
        for module, names in self._traits.family.projections.items():
            if not (attention if module.startswith(f"{self._traits.family.block.attention}.") else mlp):
                continue
            for kind in kinds:
                tensors = self._members.fold(layer, module, kind)
                found |= {(name, kind): tensor for name, tensor in zip(names[: len(tensors)], tensors, strict=True)}
        return found

    def _stack_head_norms(self, parts: Sequence[AttentionPart], name: str, num_heads: int) -> tuple[Tensor, ...]:
        """Return the norms of queries or keys of each attention part."""
        if self._traits.qk_norm == "none":
            return ()
        module = f"{self._traits.family.block.attention}.{name}"
        norms = [[self._members.read_norm(layer, module) for layer in part.layers] for part in parts]
        if self._traits.qk_norm == "full":
            return tuple(torch.stack([self._shard(norm, 0) for norm in members]) for members in norms)
        num_rows = num_heads // self._num_ranks
        return tuple(torch.cat([norm.expand(num_rows, -1) for norm in members]) for members in norms)

    def _scale(self, tensor: Tensor) -> Tensor:
        """Fold the factor of the branches into an output, unless the post-norm behind it takes the factor."""
        if self._traits.has_post_norms or self._traits.residual_scale == 1:
            return tensor
        return tensor.float() * self._traits.residual_scale

    def _shard(self, tensor: Tensor, dim: int) -> Tensor:
        """Return this rank's part of a tensor."""
        return tensor.chunk(self._num_ranks, dim)[self._rank]
