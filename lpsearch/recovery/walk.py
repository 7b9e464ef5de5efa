"""Walking through a model layer by layer, on many windows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lpsearch.models.families import get_decoder, get_decoder_layers

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

    def visit(layer_idx: int, hidden_states: Tensor, layer_kwargs: Mapping[str, Any]) -> Tensor:
        if layer_idx == 0:
            entered.append(hidden_states)
        seen[layer_idx] = layer_kwargs
        return hidden_states

    with _visited_by(layers, visit):
        get_decoder(model)(input_ids=input_ids, use_cache=False)
    return Entry(entered[0], tuple(seen[layer_idx] for layer_idx in range(len(layers))))


@contextmanager
def _visited_by(layers: Sequence[nn.Module] | nn.ModuleList, visit: Any) -> Iterator[None]:
    """Let layers call ``visit`` in place of their forward."""
    replaced = [layer.__dict__.get("forward") for layer in layers]
    for layer_idx, layer in enumerate(layers):
        layer.__dict__["forward"] = lambda hidden_states, *, _layer_idx=layer_idx, **kwargs: visit(
            _layer_idx, hidden_states, kwargs
        )
    try:
        yield
    finally:
        for layer, forward in zip(layers, replaced, strict=True):
            if forward is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = forward
