"""Walking through a model layer by layer, on many windows at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lpsearch.models.families import get_decoder, get_decoder_layers
from lpsearch.models.forwards import replaced_forwards

__all__ = ["Entry", "enter_decoder"]


@dataclass(frozen=True)
class Entry:
    """What a decoder makes of tokens before its first layer.

    Attributes:
        hidden_states: (batch, seq, hidden), the first layer's input.
        layer_kwargs: for each layer the keyword arguments that the model passes to it: mask, rotary embedding.
    """

    hidden_states: Tensor
    layer_kwargs: tuple[Mapping[str, Any], ...]


@torch.no_grad()
def enter_decoder(model: PreTrainedModel, input_ids: Tensor) -> Entry:
    """Run a decoder on tokens without its layers; each layer's own arguments are those that the model made for it.

    Args:
        model: a model without a plan.
        input_ids: (batch, seq).
    """
    layers = get_decoder_layers(model)
    seen: dict[int, Mapping[str, Any]] = {}
    entered: list[Tensor] = []

    def visit(layer_idx: int, hidden_states: Tensor, **layer_kwargs: Any) -> Tensor:
        if layer_idx == 0:
            entered.append(hidden_states)
        seen[layer_idx] = layer_kwargs
        return hidden_states

    with replaced_forwards(list(layers), [partial(visit, layer_idx) for layer_idx in range(len(layers))]):
        get_decoder(model)(input_ids=input_ids, use_cache=False)
    return Entry(entered[0], tuple(seen[layer_idx] for layer_idx in range(len(layers))))
