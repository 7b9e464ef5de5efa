"""Weights of a decoder under a plan: real ones from a Hugging Face model, or random ones that cost the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lpsearch.latency.runtime.memory import align_elements
from lpsearch.transform.fused_weights import StackedWeights, WideLayer, name_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lpsearch.latency.runtime.memory import Workspace
    from lpsearch.models.traits import FamilyTraits
    from lpsearch.plan import Group, Plan

__all__ = [
    "DecoderWeights",
    "count_cache_elements",
    "count_weight_elements",
    "fuse_model",
    "split_vocabulary",
    "take_random_weights",
]


@dataclass(frozen=True)
class DecoderWeights:
    """Weights of a whole decoder on one rank.

    Attributes:
        embedding: (vocab_size, hidden), whole on every rank.
        layers: one wide layer a group, but for groups of which nothing is left.
        head: (rows, hidden): this rank's part of the vocabulary, with the final norm folded in.
        head_start: first token of that part.
    """

    embedding: Tensor
    layers: tuple[WideLayer, ...]
    head: Tensor
    head_start: int


def take_random_weights(
    traits: FamilyTraits,
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
        traits: of the model.
        plan: its groups.
        workspace: where every plan's layers begin at the start.
        embedding: (vocab_size, hidden).
        head: (rows, hidden) of this rank.
        rank: this rank.
        num_ranks: ranks that share the model.
    """
    workspace.rewind()
    shapes = StackedWeights.from_shape(traits, num_ranks=num_ranks)
    layers = [
        shapes.compute(group).map_tensors(lambda tensor: workspace.take(tensor.shape)) for group in _list_kept(plan)
    ]
    return DecoderWeights(embedding, tuple(layers), head, rank * split_vocabulary(traits, num_ranks))


@torch.no_grad()
def fuse_model(
    model: PreTrainedModel, traits: FamilyTraits, plan: Plan, *, rank: int = 0, num_ranks: int = 1
) -> DecoderWeights:
    """Fuse a Hugging Face model's groups into wide layers, copying the weights in the model's dtype and device.

    Args:
        model: the unmodified model.
        traits: its traits.
        plan: its groups.
        rank: this rank.
        num_ranks: ranks that share the model.
    """
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
    tensors = name_tensors(decoder.layers, decoder=traits.family.decoder)
    stacked = StackedWeights(traits, tensors.get, rank=rank, num_ranks=num_ranks)
    layers = [
        stacked.compute(group).map_tensors(lambda tensor: tensor.to(model.dtype).contiguous())
        for group in _list_kept(plan)
    ]
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    norm = decoder.norm.weight.float() + traits.norm_offset
    rows = split_vocabulary(traits, num_ranks)
    part = head.weight[rank * rows : (rank + 1) * rows]
    folded = (part.float() * norm).to(model.dtype)
    return DecoderWeights(decoder.embed_tokens.weight, tuple(layers), folded, rank * rows)


def split_vocabulary(traits: FamilyTraits, num_ranks: int) -> int:
    """Return the rows of the head that a rank holds; the last may hold fewer."""
    return -(-traits.vocab_size // num_ranks)


def count_weight_elements(traits: FamilyTraits, plan: Plan, num_ranks: int) -> int:
    """Return the workspace elements of a plan's layers on one rank."""
    shapes = StackedWeights.from_shape(traits, num_ranks=num_ranks)
    sizes: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        sizes.append(align_elements(tensor.numel()))
        return tensor

    for group in _list_kept(plan):
        shapes.compute(group).map_tensors(count)
    return sum(sizes)


def _list_kept(plan: Plan) -> list[Group]:
    """Return the groups of which something is left."""
    return [group for group in plan.groups if group.num_stages]


def count_cache_elements(traits: FamilyTraits, *, batch_size: int, capacity: int, num_ranks: int) -> int:
    """Return the elements of one layer's keys and values on one rank."""
    return 2 * batch_size * traits.num_kv_heads // num_ranks * capacity * traits.head_dim
