"""Layer parallelism written out by hand, per family, as the slow and obvious reference.

Nothing here comes from ``lpsearch``: masks are built from the definition of causal and sliding-window attention, and
each family's branches are spelled out from its submodules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.tiny_models import SLIDING_WINDOW

Branch = Callable[..., Tensor]


def _pre_norm_attention(layer: Any, x: Tensor, **kwargs: Any) -> Tensor:
    return layer.self_attn(layer.input_layernorm(x), **kwargs)[0]


def _pre_norm_mlp(layer: Any, x: Tensor) -> Tensor:
    return layer.mlp(layer.post_attention_layernorm(x))


def _gemma2_attention(layer: Any, x: Tensor, **kwargs: Any) -> Tensor:
    return layer.post_attention_layernorm(layer.self_attn(layer.input_layernorm(x), **kwargs)[0])


def _gemma2_mlp(layer: Any, x: Tensor) -> Tensor:
    return layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x)))


def _olmo2_attention(layer: Any, x: Tensor, **kwargs: Any) -> Tensor:
    return layer.post_attention_layernorm(layer.self_attn(x, **kwargs)[0])


def _olmo2_mlp(layer: Any, x: Tensor) -> Tensor:
    return layer.post_feedforward_layernorm(layer.mlp(x))


def _glm4_attention(layer: Any, x: Tensor, **kwargs: Any) -> Tensor:
    return layer.post_self_attn_layernorm(layer.self_attn(layer.input_layernorm(x), **kwargs)[0])


def _glm4_mlp(layer: Any, x: Tensor) -> Tensor:
    return layer.post_mlp_layernorm(layer.mlp(layer.post_attention_layernorm(x)))


def _granite_attention(layer: Any, x: Tensor, **kwargs: Any) -> Tensor:
    return 0.6 * _pre_norm_attention(layer, x, **kwargs)


def _granite_mlp(layer: Any, x: Tensor) -> Tensor:
    return 0.6 * _pre_norm_mlp(layer, x)


def _one_norm_mlp(layer: Any, x: Tensor) -> Tensor:
    return layer.mlp(layer.input_layernorm(x))


def _gpt_neox_attention(layer: Any, x: Tensor, **kwargs: Any) -> Tensor:
    return layer.attention(layer.input_layernorm(x), **kwargs)[0]


_PRE_NORM = (_pre_norm_attention, _pre_norm_mlp)
_BRANCHES: dict[str, tuple[Branch, Branch]] = {
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "gemma": _PRE_NORM,
    "phi3": _PRE_NORM,
    "smollm3": _PRE_NORM,
    "starcoder2": _PRE_NORM,
    "mixtral": _PRE_NORM,
    "qwen3_moe": _PRE_NORM,
    "gemma2": (_gemma2_attention, _gemma2_mlp),
    "gemma3_text": (_gemma2_attention, _gemma2_mlp),
    "olmo2": (_olmo2_attention, _olmo2_mlp),
    "glm4": (_glm4_attention, _glm4_mlp),
    "granite": (_granite_attention, _granite_mlp),
    "phi": (_pre_norm_attention, _one_norm_mlp),
    "cohere": (_pre_norm_attention, _one_norm_mlp),
    "gpt_neox": (_gpt_neox_attention, _pre_norm_mlp),
    "gpt_neox_sequential": (_gpt_neox_attention, _pre_norm_mlp),
}
_PARALLEL = ("phi", "cohere", "gpt_neox")
_SLIDES: dict[str, Callable[[int], bool]] = {
    "mistral": lambda layer_idx: True,
    "phi3": lambda layer_idx: True,
    "starcoder2": lambda layer_idx: True,
    "qwen2": lambda layer_idx: layer_idx >= 3,
    "qwen3": lambda layer_idx: layer_idx >= 3,
    "gemma2": lambda layer_idx: layer_idx % 2 == 0,
    "gemma3_text": lambda layer_idx: layer_idx % 3 != 2,
    "smollm3": lambda layer_idx: layer_idx % 2 == 1,
}
_EMBEDDING_SCALE = {"gemma": math.sqrt(32), "gemma2": math.sqrt(32), "gemma3_text": math.sqrt(32), "granite": 3.0}


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
    input_ids: Tensor,
    attention_mask: Tensor,
) -> Tensor:
    """Run the decoder by the paper's equations and return the normed last hidden states, (batch, seq, hidden)."""
    decoder: Any = model.gpt_neox if family.startswith("gpt_neox") else model.model
    embeddings = decoder.embed_in if family.startswith("gpt_neox") else decoder.embed_tokens
    x = nn.functional.embedding(input_ids, embeddings.weight) * _EMBEDDING_SCALE.get(family, 1.0)
    position_ids = torch.arange(input_ids.shape[1])[None]
    full, sliding = (build_mask(attention_mask, window=window) for window in (None, SLIDING_WINDOW))
    attention_branch, mlp_branch = _BRANCHES[family]

    def attend(layer_idx: int, x: Tensor) -> Tensor:
        slides = _SLIDES.get(family, lambda layer_idx: False)(layer_idx)
        if family == "gemma3_text":
            rotary = decoder.rotary_emb(x, position_ids, "sliding_attention" if slides else "full_attention")
        else:
            rotary = decoder.rotary_emb(x, position_ids)
        return attention_branch(
            decoder.layers[layer_idx], x, attention_mask=sliding if slides else full, position_embeddings=rotary
        )

    for group in groups:
        if family in _PARALLEL:
            attended = sum(attend(layer_idx, x) for layer_idx in group)
            x = x + attended + sum(mlp_branch(decoder.layers[layer_idx], x) for layer_idx in group)
        else:
            x = x + sum(attend(layer_idx, x) for layer_idx in group)
            x = x + sum(mlp_branch(decoder.layers[layer_idx], x) for layer_idx in group)
    if family.startswith("gpt_neox"):
        return decoder.final_layer_norm(x)
    return decoder.final_layernorm(x) if family == "phi" else decoder.norm(x)
