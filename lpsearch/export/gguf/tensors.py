"""The tensors of a GGUF file of architecture ``deci``, each computed when it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpsearch.export.base import BaseModel
from lpsearch.export.gguf.formats import Bytes, Format, Quantisation, choose_format, count_bytes, encode, is_quantised
from lpsearch.export.gguf.rotary import order_rows, read_rotary
from lpsearch.export.gguf.stored import StoredModel
from lpsearch.models.gguf_rope import ROPE_FREQS
from lpsearch.models.traits import OUTPUTS, Projection, read_traits
from lpsearch.transform.deci import ATTENTION, MLP, TENSOR_NAMES, DeciBlock, list_block_shapes
from lpsearch.transform.fused_weights import MemberWeights, share_norm

__all__ = ["DeciTensors", "GgufTensor"]

_Kind = Literal["weight", "bias"]


@dataclass(frozen=True)
class GgufTensor:
    """A tensor that is to be written.

    Attributes:
        name: in the file.
        shape: in the order of torch.
        format: what it is stored as.
        build: computes its bytes.
    """

    name: str
    shape: tuple[int, ...]
    format: Format
    build: Callable[[], NDArray[np.uint8]]

    @property
    def num_bytes(self) -> int:
        """Size of its bytes."""
        return count_bytes(self.shape, self.format)


class DeciTensors:
    """The tensors of a plan's blocks.

    A branch that is alone in its block keeps its norm and its weights; of a model from a GGUF file, byte for byte. The
    members of a wide one share a norm, and the ratio to it is folded, as
    :func:`~lpsearch.transform.fused_weights.share_norm` says. What else a model multiplies by (Granite) is folded too,
    since ``deci`` does not.

    Args:
        base: the unmodified model.
        stored: the GGUF file that it comes from; None for another source.
        blocks: of the plan, from :func:`~lpsearch.transform.deci.lay_out_blocks`.
        quantisation: of what is not copied from that file; None takes the model's own: what most of it is stored as,
            and q8_0 where that is quantised. What the file holds quantised is copied whatever this says.
    """

    def __init__(
        self,
        base: BaseModel,
        stored: StoredModel | None,
        blocks: Sequence[DeciBlock],
        quantisation: Quantisation | None,
    ) -> None:
        self._base, self._stored, self._blocks = base, stored, blocks
        self._is_converted = quantisation is not None
        self.quantisation: Quantisation = quantisation or _find_quantisation(base, stored)
        self._traits = read_traits(base.config)
        self._members = MemberWeights(self._traits, base.read)
        self._rotary = read_rotary(self._traits)
        projections = self._traits.family.projections
        self._modules = {part: (module, parts.index(part)) for module, parts in projections.items() for part in parts}

    def list_tensors(self) -> list[GgufTensor]:
        """List every tensor of the file, in its order."""
        tensors = self._list_outer()
        for index, block in enumerate(self._blocks):
            shapes = list_block_shapes(self._traits, block)
            if block.num_heads:
                tensors += self._list_branch(index, block.attention, ATTENTION, shapes)
            tensors += self._list_branch(index, block.mlp, MLP, shapes)
        return tensors

    def _list_outer(self) -> list[GgufTensor]:
        """List what stands around the blocks: embedding, head (left out where it is the embedding) and rotary divisors.

        The factor of the logits, and where embedding and head are one tensor the factor of the embedding too, go into
        the last norm.
        """
        traits, config = self._traits, self._base.config
        decoder = traits.family.decoder
        embedding_name = f"{decoder}.embed_tokens.weight"
        is_tied = config.tie_word_embeddings
        logits_scale = traits.logits_scale / (traits.embedding_scale if is_tied else 1.0)
        tensors = [
            self._plan_scaled("token_embd.weight", embedding_name, traits.embedding_scale),
            self._plan_scaled("output_norm.weight", f"{decoder}.norm.weight", logits_scale, offset=traits.norm_offset),
        ]
        if not is_tied:
            tensors.append(self._plan_scaled("output.weight", "lm_head.weight", 1.0))
        if self._rotary.divisors is not None:
            divisors = self._rotary.divisors
            tensors.append(self._plan(ROPE_FREQS, tuple(divisors.shape), lambda: divisors, self._find(ROPE_FREQS)))
        return tensors

    def _list_branch(
        self,
        index: int,
        layers: tuple[int, ...],
        projections: Sequence[Projection],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> list[GgufTensor]:
        """List the tensors of an attention or an MLP: of one layer, of several side by side, or zeros of none."""
        names = {part: f"{TENSOR_NAMES[part]}.weight" for part in projections}
        norm_name = "attn_norm.weight" if projections is ATTENTION else "ffn_norm.weight"
        if not layers:
            ones = self._plan_filled(index, norm_name, shapes[norm_name], 1.0)
            return [ones, *(self._plan_filled(index, name, shapes[name], 0.0) for name in names.values())]
        block = self._traits.family.block
        norm = block.attention_norm if projections is ATTENTION else block.mlp_norm
        assert norm is not None  # `check_gguf` refuses such a model
        stored = None
        if len(layers) == 1:
            stored = self._find(f"blk.{layers[0]}.{norm_name}", self._name(layers[0], f"{norm}.weight"))
        share = self._share_norm(layers, norm)
        tensors = [self._plan(f"blk.{index}.{norm_name}", shapes[norm_name], share, stored)]
        for projection, name in names.items():
            tensors.append(self._plan_projection(index, layers, projection, "weight", shapes[name], share))
            if self._has_bias(layers[0], projection):
                tensors.append(self._plan_projection(index, layers, projection, "bias", shapes[name][:1], share))
        return tensors

    def _plan_projection(
        self,
        index: int,
        layers: tuple[int, ...],
        projection: Projection,
        kind: _Kind,
        shape: tuple[int, ...],
        share: Callable[[], Tensor],
    ) -> GgufTensor:
        """Plan the weight or the bias of a projection of a block."""
        is_output = projection in OUTPUTS
        order = self._order(projection)
        scale = self._scale(projection)

        def read(layer: int, shared: Tensor | None) -> Tensor:
            tensor = self._read(layer, projection, kind, shared)
            if scale is not None:
                tensor = tensor.float() * (scale if kind == "bias" or is_output else scale[:, None])
            return tensor if order is None else tensor[order.to(tensor.device)]

        def compute() -> Tensor:
            if len(layers) == 1:
                return read(layers[0], None)
            shared = None if is_output or kind == "bias" else share()
            members = [read(layer, shared) for layer in layers]
            if is_output and kind == "bias":
                return torch.stack([member.float() for member in members]).sum(0)
            return torch.cat(members, 1 if is_output else 0)

        stored = None
        if len(layers) == 1 and scale is None and self._stored is not None:
            module = self._modules[projection][0]
            if self._name(layers[0], f"{module}.{kind}") not in self._base.replaced:
                stored = self._stored.find_projection(
                    layers[0], projection, kind, sizes=self._traits.projection_sizes, order=order
                )
        return self._plan(f"blk.{index}.{TENSOR_NAMES[projection]}.{kind}", shape, compute, stored)

    def _plan_filled(self, index: int, name: str, shape: tuple[int, ...], value: float) -> GgufTensor:
        """Plan a tensor of a branch that adds nothing."""
        return self._plan(f"blk.{index}.{name}", shape, lambda: torch.full(shape, value), None)

    def _share_norm(self, layers: tuple[int, ...], norm: str) -> Callable[[], Tensor]:
        """Return what computes the norm of a branch: a layer's own, or that which several share."""

        def share() -> Tensor:
            norms = [self._members.read_norm(layer, norm) for layer in layers]
            return norms[0] if len(norms) == 1 else share_norm(norms)

        return share

    def _read(self, layer: int, projection: Projection, kind: _Kind, shared: Tensor | None) -> Tensor:
        """Return what a layer brings into a projection, in transformers' order of rows.

        Args:
            layer: whose.
            projection: which.
            kind: of tensor.
            shared: the norm that is left in front of it; None to fold nothing.
        """
        module, position = self._modules[projection]
        if shared is not None:
            return self._members.fold(layer, module, kind, shared=shared)[position]
        tensor = self._members.get(layer, f"{module}.{kind}")
        parts = self._traits.family.projections[module]
        if len(parts) == 1:
            return tensor
        return torch.split(tensor, [self._traits.projection_sizes[part] for part in parts])[position]

    def _has_bias(self, layer: int, projection: Projection) -> bool:
        return self._members.find(layer, f"{self._modules[projection][0]}.bias") is not None

    def _order(self, projection: Projection) -> Tensor | None:
        """Return the order that one layer's rows are brought into; None where it does not matter."""
        if projection not in ("q", "k"):
            return None
        num_heads = self._traits.num_heads if projection == "q" else self._traits.num_kv_heads
        return order_rows(num_heads, self._traits.head_dim, self._rotary.num_rotated)

    def _scale(self, projection: Projection) -> Tensor | None:
        """Return what a projection's rows are multiplied by since ``deci`` does not, by row or a scalar; None for 1.

        Queries take the factor of the attention scores that is not 1 / sqrt(head_dim), and the square of the factor of
        what is turned.
        """
        traits, rotary = self._traits, self._rotary
        if projection in OUTPUTS:
            return None if traits.residual_scale == 1 else torch.tensor(traits.residual_scale)
        scores = traits.attention_scale * traits.head_dim**0.5
        if projection != "q" or (abs(scores - 1) < 1e-9 and rotary.scale == 1):
            return None
        head = torch.full((traits.head_dim,), scores)
        head[: rotary.num_rotated] *= rotary.scale**2
        return head.repeat(traits.num_heads)

    def _plan_scaled(self, name: str, base_name: str, scale: float, *, offset: float = 0.0) -> GgufTensor:
        """Plan a tensor that stands around the blocks, times a factor."""
        tensor = self._base.read(base_name)
        assert tensor is not None, base_name
        shape = tuple(tensor.shape)
        del tensor

        def compute() -> Tensor:
            found = self._base.read(base_name)
            assert found is not None, base_name
            return found if (scale, offset) == (1, 0) else (found.float() + offset) * scale

        return self._plan(name, shape, compute, self._find(name, base_name) if (scale, offset) == (1, 0) else None)

    def _find(self, name: str, base_name: str | None = None) -> Bytes | None:
        """Return a tensor of the GGUF file that the model comes from, unless another stands in its place."""
        return None if self._stored is None or base_name in self._base.replaced else self._stored.find(name)

    def _plan(
        self, name: str, shape: tuple[int, ...], compute: Callable[[], Tensor], stored: Bytes | None
    ) -> GgufTensor:
        """Plan a tensor: the bytes of the source's file where they can stay, else what is computed."""
        kind = choose_format(shape, self.quantisation)
        if stored is not None and (not self._is_converted or is_quantised(stored.format) or stored.format == kind):
            assert stored.shape == shape, (name, stored.shape, shape)
            data = stored.data
            return GgufTensor(name, shape, stored.format, lambda: np.ascontiguousarray(data))
        return GgufTensor(name, shape, kind, lambda: encode(compute(), kind))

    def _name(self, layer: int, name: str) -> str:
        return f"{self._traits.family.decoder}.layers.{layer}.{name}"


def _find_quantisation(base: BaseModel, stored: StoredModel | None) -> Quantisation:
    """Return what a model's own matrices are stored as; q8_0 where they are quantised."""
    formats: dict[Any, Quantisation] = {Format.F32: "f32", Format.F16: "f16", Format.BF16: "bf16"}
    if stored is not None:
        return formats.get(stored.most_common_format, "q8_0")
    dtypes: dict[Any, Quantisation] = {torch.float16: "f16", torch.bfloat16: "bf16"}
    return dtypes.get(base.dtype, "f32")
