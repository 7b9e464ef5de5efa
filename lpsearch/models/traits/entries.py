"""The entries: what transformers' code of each family does and a configuration does not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["FAMILIES", "OUTPUTS", "UNKNOWN", "BlockForm", "Family", "Projection", "list_fusible_families"]

Projection = Literal["q", "k", "v", "o", "gate", "up", "down"]
"""A projection of a decoder layer, however transformers packs it."""

OUTPUTS: tuple[Projection, ...] = ("o", "down")
"""Those whose outputs are added to the residual stream."""

_Packing = Mapping[str, tuple[Projection, ...]]
_ATTENTION: _Packing = {f"self_attn.{part}_proj": (part,) for part in ("q", "k", "v", "o")}
_PACKED_ATTENTION: _Packing = {"self_attn.qkv_proj": ("q", "k", "v"), "self_attn.o_proj": ("o",)}
_GATED_MLP: _Packing = {f"mlp.{part}_proj": (part,) for part in ("gate", "up", "down")}
_PACKED_MLP: _Packing = {"mlp.gate_up_proj": ("gate", "up"), "mlp.down_proj": ("down",)}
_NEOX_ATTENTION: _Packing = {"attention.query_key_value": ("q", "k", "v"), "attention.dense": ("o",)}
_NEOX_MLP: _Packing = {"mlp.dense_h_to_4h": ("up",), "mlp.dense_4h_to_h": ("down",)}


@dataclass(frozen=True)
class BlockForm:
    """Which submodule of a decoder layer plays which part; None where a family has none.

    Attributes:
        attention: the attention module.
        attention_norm: the norm before it, N_k; without one it reads the residual stream itself.
        attention_post_norm: the norm of its output.
        attention_dropout: the dropout of its output.
        mlp_norm: the norm before the MLP, N'_k; without one it reads the residual stream itself.
        mlp_post_norm: the norm of the MLP's output.
        mlp_dropout: the dropout of the MLP's output.
        parallel: whether both branches read the layer's input; ``use_parallel_residual`` where the configuration's
            option of this name says so.
    """

    attention: str = "self_attn"
    attention_norm: str | None = "input_layernorm"
    attention_post_norm: str | None = None
    attention_dropout: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    mlp_dropout: str | None = None
    parallel: bool | Literal["use_parallel_residual"] = False

    @property
    def attention_post(self) -> tuple[str, ...]:
        """What the attention's output passes before it is added."""
        return tuple(name for name in (self.attention_post_norm, self.attention_dropout) if name is not None)

    @property
    def mlp_post(self) -> tuple[str, ...]:
        """What the MLP's output passes before it is added."""
        return tuple(name for name in (self.mlp_post_norm, self.mlp_dropout) if name is not None)

    @property
    def submodules(self) -> frozenset[str]:
        """Names of all submodules of a layer of this form, no more and no fewer."""
        norms = {name for name in (self.attention_norm, self.mlp_norm) if name is not None}
        return frozenset({self.attention, "mlp", *norms, *self.attention_post, *self.mlp_post})


@dataclass(frozen=True, kw_only=True)
class Family:
    """The entry of a family. The defaults are Llama's.

    A family whose groups cannot be fused needs no more than what says so: a parallel block, or an obstacle.

    Attributes:
        stem: what the names of its classes in transformers begin with, e.g. ``Llama`` for ``LlamaConfig``. A "Text" at
            its end is not in the names of the language model and the decoder layer.
        decoder: name of the decoder in the language model, with which the names of its tensors begin.
        layer: what the name of the decoder layer's class ends with.
        block: which submodule of a decoder layer plays which part.
        projections: for each linear module of a layer the projections whose rows it stacks. A plain MLP has no
            ``gate``.
        packs_by_head: whether a projection of queries, keys and values has those of the first head, then those of the
            second, rather than all queries first.
        splits_hidden_size: whether the heads share the hidden size, whatever head size the configuration says.
        norm_kind: ``rms``, or ``layer`` with a bias.
        norm_offset: added to every norm weight: 1 for Gemma, whose norms multiply by 1 + w.
        qk_norm_axis: axis of what the norms of queries and keys get that has the heads: -2 before the transpose, -3
            after it, -1 where a norm takes all heads at once; None without such norms.
        qkv_bias: whether queries, keys and values have a bias; a string is the configuration's option for it.
        o_bias: likewise for the attention's output.
        mlp_bias: likewise for the MLP.
        slides_everywhere: whether all layers slide where the configuration has a window and no ``layer_types``.
        interleaves_rope: whether the rotary embedding turns neighbours (0, 1), (2, 3) ... rather than halves.
        scales_embeddings: whether embeddings are multiplied by the root of the hidden size.
        vllm: module of vLLM's own model of the family and what its class names begin with; None if vLLM has no
            decoder layer for it, so that its Transformers backend serves it.
        obstacle: what else keeps its groups from being one wide layer; None if nothing does.
    """

    stem: str
    decoder: str = "model"
    layer: str = "DecoderLayer"
    block: BlockForm = BlockForm()
    projections: _Packing = field(default_factory=lambda: {**_ATTENTION, **_GATED_MLP}, hash=False)
    packs_by_head: bool = False
    splits_hidden_size: bool = False
    norm_kind: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    qk_norm_axis: Literal[-1, -2, -3] | None = None
    qkv_bias: bool | str = "attention_bias"
    o_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = "mlp_bias"
    slides_everywhere: bool = False
    interleaves_rope: bool = False
    scales_embeddings: bool = False
    vllm: tuple[str, str] | None = None
    obstacle: str | None = None

    @property
    def language_model(self) -> str:
        """Name of the language model's class in transformers, e.g. ``LlamaForCausalLM``."""
        return f"{self.stem.removesuffix('Text')}ForCausalLM"

    def packs_rows_by_head(self, module: str) -> bool:
        """Say whether a linear module has queries, keys and values of the first head, then those of the second."""
        return self.packs_by_head and self.projections[module][0] == "q"

    def find_fusing_obstacle(self, *, is_parallel: bool) -> str | None:
        """Say why a group of such layers cannot be one wide layer; None if it can."""
        if is_parallel:
            return "its attention and MLP read the same input"
        if self.norm_kind == "layer" and False in (self.qkv_bias, self.mlp_bias):
            return "its norms have a bias, and the projections behind them have none that could take it up"
        return self.obstacle


_SANDWICH = BlockForm(
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
_POST_NORM = BlockForm(
    attention_norm=None,
    attention_post_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_post_norm="post_feedforward_layernorm",
)
_EXPERTS = "its MLP is a mixture of experts"

FAMILIES: dict[str, Family] = {
    "cohere": Family(stem="Cohere", block=BlockForm(mlp_norm="input_layernorm", parallel=True)),
    "gemma": Family(stem="Gemma", norm_offset=1.0, scales_embeddings=True, vllm=("gemma", "Gemma")),
    "gemma2": Family(
        stem="Gemma2", block=_SANDWICH, norm_offset=1.0, scales_embeddings=True, vllm=("gemma2", "Gemma2")
    ),
    "gemma3_text": Family(
        stem="Gemma3Text",
        block=_SANDWICH,
        norm_offset=1.0,
        qk_norm_axis=-3,
        scales_embeddings=True,
        vllm=("gemma3", "Gemma3"),
    ),
    "glm4": Family(
        stem="Glm4",
        block=BlockForm(attention_post_norm="post_self_attn_layernorm", mlp_post_norm="post_mlp_layernorm"),
        projections={**_ATTENTION, **_PACKED_MLP},
        o_bias=False,
        interleaves_rope=True,
        vllm=("glm4", "Glm4"),
    ),
    "gpt_neox": Family(
        stem="GPTNeoX",
        decoder="gpt_neox",
        layer="Layer",
        block=BlockForm(
            attention="attention",
            attention_dropout="post_attention_dropout",
            mlp_dropout="post_mlp_dropout",
            parallel="use_parallel_residual",
        ),
        projections={**_NEOX_ATTENTION, **_NEOX_MLP},
        packs_by_head=True,
        splits_hidden_size=True,
        norm_kind="layer",
        mlp_bias=True,
    ),
    "granite": Family(stem="Granite", vllm=("granite", "Granite")),
    "llama": Family(stem="Llama", vllm=("llama", "Llama")),
    "mistral": Family(stem="Mistral", slides_everywhere=True, vllm=("mistral", "Mistral")),
    "mixtral": Family(stem="Mixtral", slides_everywhere=True, obstacle=_EXPERTS),
    "olmo2": Family(stem="Olmo2", block=_POST_NORM, qk_norm_axis=-1),
    "olmo3": Family(stem="Olmo3", block=_POST_NORM, qk_norm_axis=-1),
    "phi": Family(
        stem="Phi",
        block=BlockForm(
            attention_dropout="resid_dropout", mlp_norm="input_layernorm", mlp_dropout="resid_dropout", parallel=True
        ),
    ),
    "phi3": Family(
        stem="Phi3",
        block=BlockForm(attention_dropout="resid_attn_dropout", mlp_dropout="resid_mlp_dropout"),
        projections={**_PACKED_ATTENTION, **_PACKED_MLP},
        qkv_bias=False,
        o_bias=False,
        slides_everywhere=True,
        vllm=("phi3", "Phi3"),
    ),
    # Llama's model in vLLM takes biases of queries, keys and values and a head size of its own; Qwen 2's no head size.
    "qwen2": Family(stem="Qwen2", qkv_bias=True, o_bias=False, vllm=("llama", "Llama")),
    "qwen3": Family(stem="Qwen3", qk_norm_axis=-2, vllm=("qwen3", "Qwen3")),
    "qwen3_moe": Family(stem="Qwen3Moe", obstacle=_EXPERTS),
    "seed_oss": Family(stem="SeedOss", o_bias="attention_out_bias", vllm=("llama", "Llama")),
    # vLLM has no SmolLM3 of its own; it is a Llama some of whose layers have no rotary embedding.
    "smollm3": Family(stem="SmolLM3", vllm=("llama", "Llama")),
    "starcoder2": Family(
        stem="Starcoder2",
        projections={**_ATTENTION, "mlp.c_fc": ("up",), "mlp.c_proj": ("down",)},
        norm_kind="layer",
        qkv_bias="use_bias",
        o_bias="use_bias",
        mlp_bias="use_bias",
        slides_everywhere=True,
    ),
}
"""The entries by transformers' model type. A family without one runs too if its layers have one of these forms."""

UNKNOWN = Family(
    stem="",
    projections={},
    slides_everywhere=True,  # as transformers' cache takes it
    obstacle="it has no entry in lpsearch/models/traits/entries.py",
)
"""What is taken of a family without an entry."""


def list_fusible_families() -> tuple[str, ...]:
    """Return the model types whose groups can be fused into wide layers, with some or all configurations."""
    return tuple(
        model_type
        for model_type, family in FAMILIES.items()
        if family.find_fusing_obstacle(is_parallel=family.block.parallel is True) is None
    )
