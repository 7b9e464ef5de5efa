"""Layers that run compiled while a model is trained."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from lpsearch.models.families import get_decoder_layers

__all__ = ["compiled_layers"]

_RECOMPILE_LIMIT = 64
"""Variants of one module's code: models, batch sizes, with gradients or without. Beyond it modules run uncompiled."""


@contextmanager
def compiled_layers(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Run the norms, attentions and MLPs of every layer compiled (``torch.compile``) within a ``with`` block.

    They are compiled one by one and not as layers, since a group under a plan runs them in an order of its own. All
    layers share the code of the first, so that the time to compile does not grow with their number.

    Args:
        models: with or without a plan; a module that is compiled already stays as it is.
    """
    modules: list[nn.Module] = [
        module
        for model in models
        for layer in get_decoder_layers(model)
        for module in layer.children()
        if module._compiled_call_impl is None
    ]
    for module in modules:
        module.compile()
    try:
        with torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT), warnings.catch_warnings():
            # Dynamo looks at the gradients of its inputs, also of those that have none.
            warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
            yield
    finally:
        for module in modules:
            module._compiled_call_impl = None
