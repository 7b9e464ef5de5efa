"""Layer parallelism written out by hand, per family, as the slow and obvious reference.

Nothing here comes from ``lpsearch``: masks are built from the definition of causal and sliding-window attention, and
each family's branches are spelled out from its submodules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.tiny_models import SLIDING_WINDOW, TINY_FAMILIES

Branch = Callable[..., Tensor]


def _pre_norm_attention(layer: Any, x: Tensor, **kwargs: Any) -> Tensor:
    return layer.self_attn(layer.input_layernorm(x), **kwargs)[0]


def _pre_norm_mlp(layer: Any, x: Tensor) -> Tensor:
    return layer.mlp(layer.post_attention_layernorm(x))


def _sandwich_attention(layer: Any, x: Tensor, **kwargs: Any) -> Tensor:
    return layer.post_attention_layernorm(layer.self_attn(layer.input_layernorm(x), **kwargs)[0])


def _sandwich_mlp(layer: Any, x: Tensor) -> Tensor:
    return layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x)))


def _post_norm_attention(layer: Any, x: Tensor, **kwargs: Any) -> Tensor:
    return layer.post_attention_layernorm(layer.self_attn(x, **kwargs)[0])


def _post_norm_mlp(layer: Any, x: Tensor) -> Tensor:
    return layer.post_feedforward_layernorm(layer.mlp(x))


def _glm4_attention(layer: Any, x: Tensor, **kwargs: Any) -> Tensor:
    return layer.post_self_attn_layernorm(layer.self_attn(layer.input_layernorm(x), **kwargs)[0])


def _glm4_mlp(layer: Any, x: Tensor) -> Tensor:
    return layer.post_mlp_layernorm(layer.mlp(layer.post_attention_layernorm(x)))


def _one_norm_mlp(layer: Any, x: Tensor) -> Tensor:
    return layer.mlp(layer.input_layernorm(x))


def _gpt_neox_attention(layer: Any, x: Tensor, **kwargs: Any) -> Tensor:
    return layer.attention(layer.input_layernorm(x), **kwargs)[0]


_BRANCHES: dict[str, tuple[Branch, Branch]] = {
    "pre-norm": (_pre_norm_attention, _pre_norm_mlp),
    "sandwich": (_sandwich_attention, _sandwich_mlp),
    "post-norm": (_post_norm_attention, _post_norm_mlp),
    "glm4": (_glm4_attention, _glm4_mlp),
    "one norm": (_pre_norm_attention, _one_norm_mlp),
    "gpt_neox": (_gpt_neox_attention, _pre_norm_mlp),
}
"""Attention and MLP branch, by the names that :class:`tests.tiny_models.TinyFamily` uses."""


def build_mask(attention_mask: Tensor, *, window: int | None) -> Tensor:
    """Build the additive mask (batch, 1, query, key) of causal attention, within a window if one is given.

    A padded query sees itself, so that its row is finite; nothing else sees it.
    """
    seq = attention_mask.shape[1]
    query, key = torch.arange(seq)[:, None], torch.arange(seq)[None, :]
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    allowed = (seen[None] & attention_mask.bool()[:, None, :]) | torch.eye(seq, dtype=torch.bool)
    return torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf)[:, None]


def run_reference(
    model: PreTrainedModel,
    *,
    family: str,
    groups: Sequence[Sequence[int]],
    dropped: Mapping[str, Sequence[int]] | None = None,
    input_ids: Tensor,
    attention_mask: Tensor,
) -> Tensor:
    """Run the decoder by the paper's equations and return the normed last hidden states, (batch, seq, hidden).

    The branches of ``dropped`` are in no sum; a sum of none is 0.
    """
    tiny = TINY_FAMILIES[family]
    decoder: Any = model.gpt_neox if family.startswith("gpt_neox") else model.model
    embeddings = decoder.embed_in if family.startswith("gpt_neox") else decoder.embed_tokens
    x = nn.functional.embedding(input_ids, embeddings.weight) * tiny.embedding_scale
    position_ids = torch.arange(input_ids.shape[1])[None]
    full, sliding = (build_mask(attention_mask, window=window) for window in (None, SLIDING_WINDOW))
    attention_branch, mlp_branch = _BRANCHES[tiny.branches]

    def attend(layer_idx: int, x: Tensor) -> Tensor:
        slides = layer_idx in tiny.sliding
        layer_type = "sliding_attention" if slides else "full_attention"
        of_type = (layer_type,) if layer_type in model.config.rope_parameters else ()
        return tiny.residual_scale * attention_branch(
            decoder.layers[layer_idx],
            x,
            attention_mask=sliding if slides else full,
            position_embeddings=decoder.rotary_emb(x, position_ids, *of_type),
        )

    def transform(layer_idx: int, x: Tensor) -> Tensor:
        return tiny.residual_scale * mlp_branch(decoder.layers[layer_idx], x)

    without = dropped or {"attention": (), "mlp": ()}
    for group in groups:
        attending = [layer_idx for layer_idx in group if layer_idx not in without["attention"]]
        transforming = [layer_idx for layer_idx in group if layer_idx not in without["mlp"]]
        if tiny.parallel:
            attended = sum(attend(layer_idx, x) for layer_idx in attending)
            x = x + attended + sum(transform(layer_idx, x) for layer_idx in transforming)
        else:
            x = x + sum(attend(layer_idx, x) for layer_idx in attending)
            x = x + sum(transform(layer_idx, x) for layer_idx in transforming)
    if family.startswith("gpt_neox"):
        return decoder.final_layer_norm(x)
    return decoder.final_layernorm(x) if family == "phi" else decoder.norm(x)
