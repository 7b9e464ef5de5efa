"""Tiny random decoder-only models of every supported family, made from configurations alone.

Initialisation makes every layer matter: matrices keep the scale of their input, norm weights and biases are random
too, so that a wrong norm, a missing bias or a swapped branch moves the output visibly. Sliding windows are
:data:`SLIDING_WINDOW` tokens, shorter than any sensible test sequence; heads are grouped (4 query, 2 key/value).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

__all__ = ["FAMILIES", "SLIDING_WINDOW", "VOCAB_SIZE", "build_left_padded_batch", "build_tiny_model"]

VOCAB_SIZE = 97
SLIDING_WINDOW = 5

_FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": SLIDING_WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": SLIDING_WINDOW, "max_window_layers": 3},
    "qwen3": {"use_sliding_window": True, "sliding_window": SLIDING_WINDOW, "max_window_layers": 3},
    "gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": {"sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": SLIDING_WINDOW, "sliding_window_pattern": 3, "query_pre_attn_scalar": 8},
    "phi3": {"sliding_window": SLIDING_WINDOW},
    "olmo2": {},
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.0,
    },
    "smollm3": {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": SLIDING_WINDOW},
    "starcoder2": {"sliding_window": SLIDING_WINDOW},
    "glm4": {"attention_bias": True},
    "phi": {},
    "gpt_neox": {"use_parallel_residual": True},
    "gpt_neox_sequential": {"use_parallel_residual": False},
    "cohere": {"use_qk_norm": False},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
}

_MODEL_TYPES = {"gpt_neox_sequential": "gpt_neox"}

FAMILIES: tuple[str, ...] = tuple(_FAMILY_OPTIONS)
"""Names that :func:`build_tiny_model` takes: the transformers model type, but for ``gpt_neox_sequential``."""


def build_tiny_model(family: str, *, num_layers: int = 6, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Build a random float32 model of a family, in eval mode.

    Args:
        family: one of :data:`FAMILIES`; ``gpt_neox_sequential`` is GPT-NeoX without parallel residual.
        num_layers: number of decoder layers.
        seed: seed of every weight; the global random state is left as it was.
        overrides: configuration values that replace the family's.
    """
    options: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family.startswith(("phi", "gpt_neox", "starcoder2", "mistral", "qwen2")):
        del options["head_dim"]  # derived from the hidden size, or unknown to the family
    if family.startswith("gpt_neox"):
        del options["num_key_value_heads"]
    config = CONFIG_MAPPING[_MODEL_TYPES.get(family, family)](**(options | _FAMILY_OPTIONS[family] | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, seed=seed)
    # A generation configuration without an end token lets tests generate a known number of tokens.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def build_left_padded_batch(*, lengths: tuple[int, ...] = (14, 9), seed: int = 0) -> dict[str, torch.Tensor]:
    """Build ``input_ids`` and ``attention_mask``, each (batch, max(lengths)), padded on the left with token 0."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    input_ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        input_ids[row, longest - length :] = torch.randint(3, VOCAB_SIZE, (length,), generator=generator)
        attention_mask[row, longest - length :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@torch.no_grad()
def _randomise(model: PreTrainedModel, *, seed: int) -> None:
    """Give every parameter a random value of a scale at which it matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.add_(0.3 * noise)  # norm weights stay around their neutral value (0 for Gemma, 1 elsewhere)
        else:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    if not model.config.model_type.startswith("gemma"):  # which scales its embeddings itself
        model.get_input_embeddings().weight.mul_(model.config.hidden_size**0.5)
