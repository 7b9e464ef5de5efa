"""Tiny random decoder-only models of every supported family, made from configurations alone.

Initialisation makes every layer matter: matrices keep the scale of their input, norm weights and biases are random
too, so that a wrong norm, a missing bias or a swapped branch moves the output visibly. Sliding windows are
:data:`SLIDING_WINDOW` tokens, shorter than any sensible test sequence; heads are grouped (4 query, 2 key/value).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lpsearch.models.traits import read_traits

__all__ = [
    "FAMILIES",
    "FUSED_FAMILIES",
    "RUNTIME_FAMILIES",
    "SLIDING_WINDOW",
    "TINY_FAMILIES",
    "VOCAB_SIZE",
    "TinyFamily",
    "build_left_padded_batch",
    "build_tiny_config",
    "build_tiny_model",
]

VOCAB_SIZE = 97
SLIDING_WINDOW = 5

_HIDDEN_SIZE = 32


@dataclass(frozen=True)
class TinyFamily:
    """A family's tiny configuration, and what the reference in ``tests/transform`` must know of it.

    Attributes:
        options: configuration values that turn on what makes the family special.
        model_type: of transformers; None for the family's own name.
        has_head_dim: whether its configuration takes a ``head_dim``; elsewhere it follows from the hidden size.
        branches: whose branches its layers have, by the reference's names.
        parallel: whether attention and MLP read the same input.
        sliding: those of six layers that attend to :data:`SLIDING_WINDOW` tokens.
        embedding_scale: what the model multiplies its embeddings by.
        residual_scale: what the model multiplies its branches by.
    """

    options: dict[str, Any] = field(default_factory=dict)
    model_type: str | None = None
    has_head_dim: bool = True
    branches: str = "pre-norm"
    parallel: bool = False
    sliding: tuple[int, ...] = ()
    embedding_scale: float = 1.0
    residual_scale: float = 1.0


_ALL = (0, 1, 2, 3, 4, 5)
_WINDOW = {"sliding_window": SLIDING_WINDOW}
_LAST_LAYERS_SLIDE = {**_WINDOW, "use_sliding_window": True, "max_window_layers": 3}

TINY_FAMILIES = {
    "llama": TinyFamily(),
    "mistral": TinyFamily(_WINDOW, has_head_dim=False, sliding=_ALL),
    "qwen2": TinyFamily(_LAST_LAYERS_SLIDE, has_head_dim=False, sliding=(3, 4, 5)),
    "qwen3": TinyFamily(_LAST_LAYERS_SLIDE, sliding=(3, 4, 5)),
    "gemma": TinyFamily({"hidden_activation": "gelu_pytorch_tanh"}, embedding_scale=_HIDDEN_SIZE**0.5),
    "gemma2": TinyFamily(
        {**_WINDOW, "query_pre_attn_scalar": 8},
        branches="sandwich",
        sliding=(0, 2, 4),
        embedding_scale=_HIDDEN_SIZE**0.5,
    ),
    "gemma3_text": TinyFamily(
        {**_WINDOW, "sliding_window_pattern": 3, "query_pre_attn_scalar": 8},
        branches="sandwich",
        sliding=(0, 1, 3, 4),
        embedding_scale=_HIDDEN_SIZE**0.5,
    ),
    "phi3": TinyFamily(_WINDOW, has_head_dim=False, sliding=_ALL),
    "olmo2": TinyFamily(branches="post-norm"),
    "olmo3": TinyFamily(_WINDOW, branches="post-norm", sliding=(0, 1, 2, 4, 5)),
    "granite": TinyFamily(
        {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.6, "logits_scaling": 2.0},
        embedding_scale=3.0,
        residual_scale=0.6,
    ),
    "seed_oss": TinyFamily({"attention_bias": True, "residual_dropout": 0.0}),  # which some tests train
    "smollm3": TinyFamily({**_WINDOW, "no_rope_layer_interval": 2, "use_sliding_window": True}, sliding=(1, 3, 5)),
    "starcoder2": TinyFamily(_WINDOW, has_head_dim=False, sliding=_ALL),
    "glm4": TinyFamily({"attention_bias": True}, branches="glm4"),
    "phi": TinyFamily(has_head_dim=False, branches="one norm", parallel=True),
    "gpt_neox": TinyFamily({"use_parallel_residual": True}, has_head_dim=False, branches="gpt_neox", parallel=True),
    "gpt_neox_sequential": TinyFamily(
        {"use_parallel_residual": False}, model_type="gpt_neox", has_head_dim=False, branches="gpt_neox"
    ),
    "cohere": TinyFamily({"use_qk_norm": False}, branches="one norm", parallel=True),
    "mixtral": TinyFamily({"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": TinyFamily(
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1]}
    ),
}

FAMILIES: tuple[str, ...] = tuple(TINY_FAMILIES)
"""Names that :func:`build_tiny_model` takes: the transformers model type, but for ``gpt_neox_sequential``."""


def build_tiny_config(family: str, *, num_layers: int = 6, **overrides: Any) -> PretrainedConfig:
    """Build the configuration of a tiny model; the arguments are those of :func:`build_tiny_model`."""
    tiny = TINY_FAMILIES[family]
    options: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": _HIDDEN_SIZE,
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
    options |= tiny.options | overrides
    if not tiny.has_head_dim:
        del options["head_dim"]
    if family.startswith("gpt_neox"):
        del options["num_key_value_heads"]
    config: PretrainedConfig = CONFIG_MAPPING[tiny.model_type or family](**options)
    return config


FUSED_FAMILIES = tuple(f for f in FAMILIES if read_traits(build_tiny_config(f)).fusing_obstacle is None)
"""Those whose groups can be fused; a test names the others, with the reason of each."""

RUNTIME_FAMILIES = tuple(f for f in FAMILIES if read_traits(build_tiny_config(f)).runtime_obstacle is None)
"""Those that the latency runtime computes; a test names the others, with the reason of each."""


def build_tiny_model(family: str, *, num_layers: int = 6, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Build a random float32 model of a family, in eval mode.

    Args:
        family: one of :data:`FAMILIES`; ``gpt_neox_sequential`` is GPT-NeoX without parallel residual.
        num_layers: number of decoder layers.
        seed: seed of every weight; the global random state is left as it was.
        overrides: configuration values that replace the family's.
    """
    config = build_tiny_config(family, num_layers=num_layers, **overrides)
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
