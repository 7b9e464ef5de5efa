"""Entry and configuration together: the traits of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lpsearch.errors import ConfigError, FamilyError
from lpsearch.models.traits.entries import FAMILIES, OUTPUTS, UNKNOWN, Family, Projection, list_fusible_families

__all__ = ["LAYER_LISTS", "AttentionKind", "AttentionPart", "FamilyTraits", "read_traits"]

LAYER_LISTS = ("layer_types", "no_rope_layers")
"""Attributes of a configuration with one entry a layer that say how the layer attends."""

_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""Activations of the gate that the latency runtime computes, by transformers' names."""


@dataclass(frozen=True)
class AttentionKind:
    """How a layer attends; members of a group whose kinds differ keep separate attentions.

    Attributes:
        name: ``full`` or ``sliding``.
        window: tokens attended to at most, the current one included; None for all.
        rope_key: key of its rotary parameters where the configuration has several, else None.
        rotates: whether queries and keys get a rotary embedding (False: NoPE).
    """

    name: str
    window: int | None = None
    rope_key: str | None = None
    rotates: bool = True


@dataclass(frozen=True)
class AttentionPart:
    """Members of a group that attend alike: one wide attention, with a cache slot of its own.

    Attributes:
        kind: how they attend.
        layers: their indices, ascending.
    """

    kind: AttentionKind
    layers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class FamilyTraits:
    """Shape and arithmetic of a decoder. Heads and sizes are those of the whole model, not of one rank.

    Attributes:
        family: the entry of its family.
        config: the text configuration that it was read from.
        kinds: how each layer attends.
        has_experts: for each layer whether its MLP is a mixture of experts.
        norm_eps: epsilon of the norms.
        is_parallel: whether attention and MLP read the same input.
        hidden_act: activation of the MLP, by transformers' name.
        attention_scale: factor of the attention scores.
        attention_softcap: tanh bound of the scores; likewise ``logits_softcap`` of the logits.
        embedding_scale: factor of the embeddings.
        residual_scale: factor of each branch (Granite).
        logits_scale: factor of the logits.
    """

    family: Family
    config: Any = field(repr=False, compare=False)
    kinds: tuple[AttentionKind, ...]
    has_experts: tuple[bool, ...]
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    is_parallel: bool
    hidden_act: str
    attention_scale: float
    attention_softcap: float | None
    logits_softcap: float | None
    embedding_scale: float
    residual_scale: float
    logits_scale: float

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.kinds)

    @property
    def norm_offset(self) -> float:
        """What is added to every norm weight."""
        return self.family.norm_offset

    @property
    def has_pre_norms(self) -> bool:
        """Whether each branch norms what it reads; those of OLMo 2 and 3 read the residual stream itself."""
        return self.family.block.attention_norm is not None

    @property
    def has_post_norms(self) -> bool:
        """Whether each layer norms its branches' outputs, so that members' outputs cannot be summed inside a GEMM."""
        return self.family.block.attention_post_norm is not None

    @property
    def qk_norm(self) -> Literal["none", "head", "full"]:
        """Norm of queries and keys: by head (Qwen3, Gemma 3), over the full width (OLMo 2) or none."""
        axis = self.family.qk_norm_axis
        return "none" if axis is None else "full" if axis == -1 else "head"

    @property
    def activation(self) -> Literal["silu", "gelu_tanh"]:
        """Activation of the gate, for a model that the latency runtime computes."""
        return _ACTIVATIONS[self.hidden_act]

    @property
    def projection_sizes(self) -> dict[Projection, int]:
        """Rows of each projection; of ``o`` and ``down``, whose rows are the hidden size, the columns."""
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        inner = self.intermediate_size
        return {"q": heads, "k": kv_heads, "v": kv_heads, "o": heads, "gate": inner, "up": inner, "down": inner}

    @property
    def fusing_obstacle(self) -> str | None:
        """Why a group cannot be one wide layer; None if it can."""
        return self.family.find_fusing_obstacle(is_parallel=self.is_parallel)

    @property
    def runtime_obstacle(self) -> str | None:
        """Why the latency runtime does not compute the model; None if it does."""
        if self.fusing_obstacle is not None:
            return self.fusing_obstacle
        if self.family.norm_kind != "rms":
            return "its norms are not RMSNorms"
        if not any("gate" in parts for parts in self.family.projections.values()):
            return "its MLP has no gate"
        if self.hidden_act not in _ACTIVATIONS:
            return f"its MLP has activation {self.hidden_act!r}"
        return None

    def split_group(self, group: Sequence[int]) -> tuple[AttentionPart, ...]:
        """Split a group into the wide attentions that compute it, in order of first appearance."""
        kinds = dict.fromkeys(self.kinds[layer_idx] for layer_idx in group)
        return tuple(AttentionPart(kind, tuple(i for i in group if self.kinds[i] == kind)) for kind in kinds)

    def check_fusing(self) -> None:
        """Refuse a model whose groups cannot be fused into wide layers.

        Raises:
            FamilyError: with the reason.
        """
        if self.fusing_obstacle is not None:
            options = {name: FAMILIES[name].block.parallel for name in list_fusible_families()}
            fused = [name + (f" (without {option})" if option else "") for name, option in options.items()]
            raise FamilyError(
                f"model type {self.config.model_type} cannot be fused into wide layers: {self.fusing_obstacle}; fused "
                f"are {', '.join(fused)}. A plan of any other family runs with `apply_plan`, which "
                "`lpsearch generate` and `lpsearch evaluate` use"
            )

    def check_runtime(self) -> None:
        """Refuse a model that the latency runtime does not compute.

        Raises:
            FamilyError: with the reason.
        """
        if self.runtime_obstacle is not None:
            raise FamilyError(
                f"model type {self.config.model_type}: the runtime computes dense sequential layers, and "
                f"{self.runtime_obstacle}; it is measured by transformers' own execution"
            )

    def has_bias(self, projection: Projection) -> bool:
        """Say whether a projection has a bias."""
        family = self.family
        in_attention = family.o_bias if projection == "o" else family.qkv_bias
        option = in_attention if projection in ("q", "k", "v", "o") else family.mlp_bias
        return bool(getattr(self.config, option, False)) if isinstance(option, str) else option

    def list_tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of a decoder layer, by its name within the layer."""
        block, hidden = self.family.block, self.hidden_size
        norms = {block.attention_norm, block.attention_post_norm, block.mlp_norm, block.mlp_post_norm} - {None}
        kinds = ("weight", "bias") if self.family.norm_kind == "layer" else ("weight",)
        shapes: dict[str, tuple[int, ...]] = {f"{norm}.{kind}": (hidden,) for norm in norms for kind in kinds}
        for module, packed in self.family.projections.items():
            size = sum(self.projection_sizes[projection] for projection in packed)
            shapes[f"{module}.weight"] = (hidden, size) if packed[0] in OUTPUTS else (size, hidden)
            if self.has_bias(packed[0]):
                shapes[f"{module}.bias"] = shapes[f"{module}.weight"][:1]
        if self.qk_norm != "none":
            heads, kv_heads = (1, 1) if self.qk_norm == "head" else (self.num_heads, self.num_kv_heads)
            shapes[f"{block.attention}.q_norm.weight"] = (heads * self.head_dim,)
            shapes[f"{block.attention}.k_norm.weight"] = (kv_heads * self.head_dim,)
        return shapes

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


def read_traits(config: Any, *, family: Family | None = None) -> FamilyTraits:
    """Read the traits of a model from its transformers configuration, or from the text part of that.

    What the configuration has no value for is neutral. A family without an entry gets the shape that its configuration
    says, and an obstacle to everything that needs more.

    Args:
        config: a transformers configuration.
        family: its entry; None for that of its model type.
    """
    config = config.get_text_config(decoder=True)
    family = family or FAMILIES.get(config.model_type, UNKNOWN)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def read(*names: str, default: Any) -> Any:
        found = (getattr(config, name, None) for name in names)
        return next((value for value in found if value is not None), default)

    return FamilyTraits(
        family=family,
        config=config,
        kinds=_read_kinds(config, family),
        has_experts=_find_experts(config),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        norm_eps=read("rms_norm_eps", "layer_norm_eps", "norm_epsilon", default=0.0),
        is_parallel=bool(read("use_parallel_residual", default=family.block.parallel)),
        hidden_act=str(read("hidden_activation", "hidden_act", default="")),
        attention_scale=read("attention_multiplier", default=read("query_pre_attn_scalar", default=head_dim) ** -0.5),
        attention_softcap=read("attn_logit_softcapping", default=None),
        logits_softcap=read("final_logit_softcapping", default=None),
        embedding_scale=(
            config.hidden_size**0.5 if family.scales_embeddings else read("embedding_multiplier", default=1.0)
        ),
        residual_scale=read("residual_multiplier", default=1.0),
        logits_scale=read("logit_scale", default=1 / read("logits_scaling", default=1.0)),
    )


def _read_kinds(config: Any, family: Family) -> tuple[AttentionKind, ...]:
    """Return how each layer attends, as transformers builds the masks of the family."""
    num_layers: int = config.num_hidden_layers
    window: int | None = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        layer_types = ["sliding_attention" if family.slides_everywhere else "full_attention"] * num_layers
    ropes = getattr(config, "rope_parameters", None) or {}
    rotates = getattr(config, "no_rope_layers", None) or [1] * num_layers  # 1 where a layer rotates, whatever its name
    kinds = []
    for layer_type, is_rotated in zip(layer_types[:num_layers], rotates[:num_layers], strict=True):
        reach = window if layer_type == "sliding_attention" else None
        kinds.append(
            AttentionKind(
                name="full" if reach is None else "sliding",
                window=reach,
                rope_key=layer_type if layer_type in ropes else None,
                rotates=bool(is_rotated),
            )
        )
    return tuple(kinds)


def _find_experts(config: Any) -> tuple[bool, ...]:
    """Return for each layer whether its MLP is a mixture of experts."""
    counts = (getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    routed = any((count or 0) > 1 for count in counts)
    dense = set(getattr(config, "mlp_only_layers", None) or ())
    return tuple(routed and layer_idx not in dense for layer_idx in range(config.num_hidden_layers))
