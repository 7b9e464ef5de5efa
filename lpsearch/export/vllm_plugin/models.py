"""vLLM's models of each family, with one decoder layer a group.

The classes, e.g. ``LPLlamaForCausalLM``, are attributes of this module that are built when one is asked for, so that
only its family's code is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

from torch import nn
from transformers import AutoModel
from vllm.config import VllmConfig
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.utils import make_layers, maybe_prefix

from lpsearch.export.vllm_plugin.slots import build_slot
from lpsearch.models.traits import FAMILIES, Family
from lpsearch.transform import modeling_lpsearch as modeling


def __getattr__(name: str) -> type[nn.Module]:
    """Build or find the model class of a family by its architecture's name."""
    for family in FAMILIES.values():
        if name == modeling.class_name(family.stem, "ForCausalLM"):
            return _find_backend_class(family) if family.vllm is None else _build_model_class(family, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _build_model_class(family: Family, name: str) -> type[nn.Module]:
    """Subclass vLLM's model of a family."""
    assert family.vllm is not None
    module_name, stem = family.vllm
    stock_class = getattr(import_module(f"vllm.model_executor.models.{module_name}"), f"{stem}ForCausalLM")

    class ForCausalLM(stock_class):  # type: ignore[misc, valid-type]
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            config = vllm_config.model_config.hf_config
            with _without_layers(config):
                super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.model.start_layer, self.model.end_layer, self.model.layers = make_layers(
                config.num_hidden_layers,
                lambda prefix: build_slot(vllm_config, family=family, prefix=prefix),
                prefix=f"{maybe_prefix(prefix, 'model')}.layers",
            )
            if hasattr(config, "logits_scaling") and hasattr(self, "logits_processor"):
                # Granite's model would apply both this and the `logit_scale` that says the same to the backend.
                self.logits_processor.scale = 1.0 / config.logits_scaling

    ForCausalLM.__name__ = ForCausalLM.__qualname__ = name
    return ForCausalLM


@contextmanager
def _without_layers(config: Any) -> Iterator[None]:
    """Let a stock model build everything but its decoder layers, which would all be alike."""
    kept = {name: getattr(config, name) for name in ("num_hidden_layers", "layer_types") if hasattr(config, name)}
    config.num_hidden_layers = 0
    if kept.get("layer_types") is not None:
        config.layer_types = []
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(config, name, value)


def _find_backend_class(family: Family) -> type[nn.Module]:
    """Return vLLM's Transformers backend, having told transformers of the decoder that it shall run."""
    names = (modeling.class_name(family.stem, kind) for kind in ("Config", "Model"))
    config_class, decoder_class = (getattr(modeling, name) for name in names)
    AutoModel.register(config_class, decoder_class, exist_ok=True)
    backend: type[nn.Module] = TransformersForCausalLM
    return backend
