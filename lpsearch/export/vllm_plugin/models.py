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
from lpsearch.transform import modeling_lpsearch as modeling

_STOCK_MODELS = {
    "gemma": ("gemma", "GemmaForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3_text": ("gemma3", "Gemma3ForCausalLM"),
    "granite": ("granite", "GraniteForCausalLM"),
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    # Llama's model takes biases of queries, keys and values and a head size of its own; Qwen 2's takes no head size.
    "qwen2": ("llama", "LlamaForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    # vLLM has no SmolLM3 of its own; it is a Llama some of whose layers have no rotary embedding.
    "smollm3": ("llama", "LlamaForCausalLM"),
}
"""For each family: the module of vLLM's model and its class. A family that is not here has none."""


def __getattr__(name: str) -> type[nn.Module]:
    """Build or find the model class of a family by its architecture's name."""
    for family in modeling.FAMILIES:
        if name == modeling.class_name(family, "ForCausalLM"):
            return _build_model_class(family, name) if family in _STOCK_MODELS else _find_backend_class(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _build_model_class(family: str, name: str) -> type[nn.Module]:
    """Subclass vLLM's model of a family."""
    module_name, stock_name = _STOCK_MODELS[family]
    stock_class = getattr(import_module(f"vllm.model_executor.models.{module_name}"), stock_name)

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
                self.logits_processor.scale = config.logit_scale

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


def _find_backend_class(family: str) -> type[nn.Module]:
    """Return vLLM's Transformers backend, having told transformers of the decoder that it shall run."""
    config_class, decoder_class = (getattr(modeling, modeling.class_name(family, kind)) for kind in ("Config", "Model"))
    AutoModel.register(config_class, decoder_class, exist_ok=True)
    backend: type[nn.Module] = TransformersForCausalLM
    return backend
