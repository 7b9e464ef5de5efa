"""What the runtime needs to know of a model: its shapes, and where its family departs from Llama.

Read from a transformers configuration alone. A family is understood by name, since a configuration does not say how its
numbers are used; others are refused and measured by :mod:`lpsearch.latency.fallback` instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lpsearch.errors import ConfigError, FamilyError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "RUNTIME_FAMILIES",
    "Architecture",
    "AttentionKind",
    "Segment",
    "build_rope_table",
    "read_architecture",
    "rope_partner",
]

RUNTIME_FAMILIES = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
)
"""Model types that the runtime computes; a test compares each with transformers."""


@dataclass(frozen=True)
class AttentionKind:
    """How a layer attends; members of a group whose kinds differ keep separate attentions.

    Attributes:
        name: ``full`` or ``sliding``.
        window: tokens attended to at most, the current one included; None for all.
        rope_key: key of its rotary parameters where the configuration has several, else None.
    """

    name: str
    window: int | None = None
    rope_key: str | None = None


@dataclass(frozen=True)
class Segment:
    """Members of a group that attend alike: one wide attention.

    Attributes:
        kind: how they attend.
        layers: their indices, ascending.
    """

    kind: AttentionKind
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Architecture:
    """Shape and arithmetic of a decoder. Heads and sizes are those of the whole model, not of one rank.

    Attributes:
        config: the text configuration that it was read from.
        kinds: how each layer attends.
        norm_form: ``pre`` (Llama), ``post`` (OLMo 2) or ``sandwich`` (Gemma 2 and 3): which norms a branch has.
        norm_offset: added to every norm weight: 1 for Gemma, whose norms multiply by 1 + w.
        qk_norm: norm of queries and keys: by ``head`` (Qwen3, Gemma 3), over the ``full`` width (OLMo 2) or ``none``.
        activation: of the gate, ``silu`` or ``gelu_tanh``.
        qkv_bias: whether query, key and value projections have a bias; likewise ``o_bias`` and ``mlp_bias``.
        attention_scale: factor of the attention scores.
        attention_softcap: tanh bound of the scores; likewise ``logits_softcap`` of the logits.
        embedding_scale: factor of the embeddings.
        residual_scale: factor of each branch (Granite); folded into the output projections.
        logits_scale: factor of the logits.
    """

    config: PretrainedConfig
    kinds: tuple[AttentionKind, ...]
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    norm_form: Literal["pre", "post", "sandwich"] = "pre"
    norm_offset: float = 0.0
    qk_norm: Literal["none", "head", "full"] = "none"
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float = 1.0
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.kinds)

    @property
    def has_post_norms(self) -> bool:
        """Whether each layer norms its branches' outputs, so that members' outputs cannot be summed inside a GEMM."""
        return self.norm_form != "pre"

    def split_group(self, group: Sequence[int]) -> tuple[Segment, ...]:
        """Split a group into the wide attentions that compute it, in order of first appearance."""
        kinds = dict.fromkeys(self.kinds[layer_idx] for layer_idx in group)
        return tuple(Segment(kind, tuple(i for i in group if self.kinds[i] == kind)) for kind in kinds)

    def describe_group(self, group: Sequence[int]) -> str:
        """Name a group by what its time depends on, e.g. ``2 full`` or ``1 full + 1 sliding``."""
        counts = Counter(self.kinds[layer_idx].name for layer_idx in group)
        return " + ".join(f"{counts[name]} {name}" for name in sorted(counts))

    def check_ranks(self, num_ranks: int) -> None:
        """Refuse a tensor-parallel size that does not divide the model.

        Raises:
            ConfigError: naming what cannot be divided.
        """
        sizes = {
            "attention heads": self.num_heads,
            "key-value heads": self.num_kv_heads,
            "intermediate size": self.intermediate_size,
        }
        wrong = [f"{size} {name}" for name, size in sizes.items() if size % num_ranks]
        if wrong:
            fitting = [n for n in range(1, 65) if not any(size % n for size in sizes.values())]
            raise ConfigError(
                f"{self.config.model_type}: {' and '.join(wrong)} cannot be divided over {num_ranks} ranks; "
                f"choose one of {', '.join(map(str, fitting))}"
            )


def read_architecture(config: PretrainedConfig) -> Architecture:
    """Read an architecture from a configuration.

    Args:
        config: a transformers configuration of one of :data:`RUNTIME_FAMILIES`, text or with a text part.

    Raises:
        FamilyError: for another family, or an option of a family that the runtime does not compute.
    """
    config = config.get_text_config()
    family = config.model_type
    if family not in RUNTIME_FAMILIES:
        raise FamilyError(
            f"model type {family}: the runtime computes {', '.join(RUNTIME_FAMILIES)}; others are measured by "
            "transformers' own execution"
        )
    num_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    gemma = family.startswith("gemma")
    bias = bool(getattr(config, "attention_bias", False))
    query_scale = config.query_pre_attn_scalar if family in ("gemma2", "gemma3_text") else head_dim
    return Architecture(
        config=config,
        kinds=_read_kinds(config),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=num_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        norm_eps=config.rms_norm_eps,
        norm_form={"olmo2": "post", "gemma2": "sandwich", "gemma3_text": "sandwich"}.get(family, "pre"),  # type: ignore[arg-type]
        norm_offset=1.0 if gemma else 0.0,
        qk_norm={"olmo2": "full", "qwen3": "head", "gemma3_text": "head"}.get(family, "none"),  # type: ignore[arg-type]
        activation=_read_activation(config),
        qkv_bias=family == "qwen2" or (bias and family != "phi3"),
        o_bias=bias and family not in ("qwen2", "phi3"),
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        attention_scale=config.attention_multiplier if family == "granite" else query_scale**-0.5,
        attention_softcap=getattr(config, "attn_logit_softcapping", None),
        logits_softcap=getattr(config, "final_logit_softcapping", None),
        embedding_scale=config.hidden_size**0.5 if gemma else getattr(config, "embedding_multiplier", 1.0),
        residual_scale=getattr(config, "residual_multiplier", 1.0),
        logits_scale=1 / getattr(config, "logits_scaling", 1.0),
    )


def build_rope_table(architecture: Architecture, kind: AttentionKind, *, num_positions: int) -> torch.Tensor:
    """Build cosines and signed sines of the rotary embedding, so that rotating is ``x * cos + x[partner] * sin``.

    ``partner`` is the other half of the rotated part; behind it (partial rotation) cos is 1 and sin 0. Scaled
    embeddings that depend on the length take that of ``num_positions``.

    Returns:
        (2, num_positions, head_dim), float32, on the CPU.

    Raises:
        FamilyError: for rotary parameters that transformers does not know.
    """
    config: Any = architecture.config
    parameters = config.rope_parameters if kind.rope_key is None else config.rope_parameters[kind.rope_key]
    rope_type = parameters["rope_type"]
    if rope_type == "default":
        dim = int(architecture.head_dim * parameters.get("partial_rotary_factor", 1.0))
        frequencies = 1.0 / parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        factor = 1.0
    elif rope_type in ROPE_INIT_FUNCTIONS:
        options = {} if kind.rope_key is None else {"layer_type": kind.rope_key}
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](
            config, torch.device("cpu"), seq_len=num_positions, **options
        )
    else:
        raise FamilyError(f"rotary embedding of type {rope_type!r} is unknown to the installed transformers")
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)  # (num_positions, dim / 2)
    table = torch.zeros(2, num_positions, architecture.head_dim)
    table[0] = 1
    half, dim = angles.shape[1], 2 * angles.shape[1]
    table[0, :, :dim] = (angles.cos() * factor).repeat(1, 2)
    table[1, :, :half] = -angles.sin() * factor
    table[1, :, half:dim] = angles.sin() * factor
    return table


def rope_partner(architecture: Architecture, kind: AttentionKind) -> torch.Tensor:
    """Return the index of each element's partner in the rotation, ``(head_dim,)``."""
    config: Any = architecture.config
    parameters = config.rope_parameters if kind.rope_key is None else config.rope_parameters[kind.rope_key]
    half = int(architecture.head_dim * parameters.get("partial_rotary_factor", 1.0)) // 2
    rest = torch.arange(2 * half, architecture.head_dim)
    return torch.cat([torch.arange(half, 2 * half), torch.arange(half), rest])


def _read_kinds(config: Any) -> tuple[AttentionKind, ...]:
    """Return how each layer attends, as transformers builds the masks of the family."""
    family, window = config.model_type, getattr(config, "sliding_window", None)
    num_layers: int = config.num_hidden_layers
    full = AttentionKind("full", None, "full_attention" if family == "gemma3_text" else None)
    if window is None:
        return (full,) * num_layers
    sliding = AttentionKind("sliding", int(window), "sliding_attention" if family == "gemma3_text" else None)
    if family in ("mistral", "phi3"):
        return (sliding,) * num_layers
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * num_layers
    return tuple(sliding if layer_type == "sliding_attention" else full for layer_type in layer_types)


def _read_activation(config: Any) -> Literal["silu", "gelu_tanh"]:
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    if name == "silu":
        return "silu"
    if name in ("gelu_pytorch_tanh", "gelu_new"):
        return "gelu_tanh"
    raise FamilyError(f"{config.model_type} with activation {name!r}: the runtime computes silu and gelu_pytorch_tanh")
