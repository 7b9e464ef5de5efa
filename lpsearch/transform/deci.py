"""A plan as blocks of llama.cpp's architecture ``deci``: what it computes exactly, and the sizes of its blocks.

``deci`` (llama.cpp's ``src/models/deci.cpp``, made for Llama-3.1-Nemotron) reads the number of heads, of key-value
heads and the feed-forward length for each block, so that a group is one wide block. A block is x' = x + A(N(x)),
y = x' + F(N'(x')) with rotary embeddings of neighbouring pairs, full attention, a SiLU gate and RMSNorms; without heads
it is y = x + F(N(x)). Two shapes would mislead the graph: a block with a feed-forward length of 0 skips its attention
too, without an error, so a block without an MLP gets one of zeros; and llama.cpp reads the size of a head off the first
block, so that one gets a head of zeros if it has no attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lpsearch.models.traits import OUTPUTS, FamilyTraits, Projection
from lpsearch.plan.stage_blocks import Block, arrange_blocks

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from lpsearch.plan import Plan

__all__ = [
    "ARCHITECTURE",
    "ATTENTION",
    "EMPTY_MLP_SIZE",
    "FIXED_SCALINGS",
    "MLP",
    "TENSOR_NAMES",
    "DeciBlock",
    "add_model_keys",
    "find_deci_obstacle",
    "lay_out_blocks",
    "list_block_shapes",
]

ARCHITECTURE = "deci"

ATTENTION: tuple[Projection, ...] = ("q", "k", "v", "o")
MLP: tuple[Projection, ...] = ("gate", "up", "down")

TENSOR_NAMES: dict[Projection, str] = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
"""What llama.cpp calls the projections of a block."""

EMPTY_MLP_SIZE = 32
"""Width of the MLP of zeros of a block without one: a block of llama.cpp's quantisations."""

FIXED_SCALINGS = ("default", "linear", "llama3", "yarn")
"""Scalings of the rotary embedding, by transformers' names, whose frequencies do not depend on the text's length."""

_NORMED_HEADS = {"head": "by head", "full": "over their full width"}


@dataclass(frozen=True)
class DeciBlock:
    """A block of the file.

    Attributes:
        attention: layers whose attentions it sums; none of them may be.
        mlp: layers whose MLPs it sums; none of them may be.
        num_heads: of its attention; 0 for no attention, 1 without layers for one that adds nothing.
        num_kv_heads: likewise.
        feed_forward_length: width of its MLP, never 0.
    """

    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    feed_forward_length: int


def find_deci_obstacle(traits: FamilyTraits) -> str | None:
    """Say what of a model ``deci`` does not compute; None if it computes all of it."""
    if traits.fusing_obstacle is not None:
        return traits.fusing_obstacle
    if any(traits.has_experts):
        return "its MLP is a mixture of experts"
    if traits.family.norm_kind != "rms":
        return "its norms are LayerNorms with a bias, not RMSNorms"
    if traits.has_post_norms or not traits.has_pre_norms:
        return "it norms what its attention and MLP put out (post-norms)"
    if traits.qk_norm != "none":
        return f"its queries and keys are normed {_NORMED_HEADS[traits.qk_norm]}"
    context = getattr(traits.config, "max_position_embeddings", None) or 0
    windows = {kind.window for kind in traits.kinds if kind.window is not None and kind.window < context}
    if windows:
        return f"its attention slides over a window of {min(windows)} tokens"
    if not all(kind.rotates for kind in traits.kinds):
        return "some of its layers have no rotary embedding (NoPE)"
    if not any("gate" in parts for parts in traits.family.projections.values()):
        return "its MLP has no gate"
    if traits.hidden_act not in ("silu", "swish"):
        return f"its MLP has activation {traits.hidden_act!r}, not SiLU"
    if traits.attention_softcap is not None or traits.logits_softcap is not None:
        return "its attention scores or logits are bounded by a tanh (soft cap)"
    if traits.family.interleaves_rope:
        return "its rotary embedding turns neighbours"
    return _find_rotary_obstacle(traits)


def _find_rotary_obstacle(traits: FamilyTraits) -> str | None:
    """Say why a rotary embedding has no fixed frequencies; None if it has."""
    parameters: dict[str, Any] = getattr(traits.config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type", "default")
    if "rope_theta" not in parameters:
        return "its layers have rotary embeddings of several kinds"
    if kind not in FIXED_SCALINGS:
        return f"the frequencies of its rotary embedding ({kind}) depend on the length of the text"
    if traits.head_dim % 2:
        return f"its heads have an odd size, {traits.head_dim}"
    return None


def lay_out_blocks(traits: FamilyTraits, plan: Plan) -> list[DeciBlock]:
    """Lay what a plan keeps into blocks: an attention, and the MLPs that follow it. There is always one.

    Args:
        traits: of the model.
        plan: for it.
    """
    blocks = []
    for index, block in enumerate(arrange_blocks(plan) or (Block((), ()),)):
        least = int(index == 0)
        blocks.append(
            DeciBlock(
                attention=block.attention,
                mlp=block.mlp,
                num_heads=len(block.attention) * traits.num_heads or least,
                num_kv_heads=len(block.attention) * traits.num_kv_heads or least,
                feed_forward_length=len(block.mlp) * traits.intermediate_size or EMPTY_MLP_SIZE,
            )
        )
    return blocks


def list_block_shapes(traits: FamilyTraits, block: DeciBlock) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a block, by its name within the block, in the order of the file.

    Stand-ins for an attention or an MLP have no biases.
    """
    hidden = traits.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    heads, kv_heads = block.num_heads * traits.head_dim, block.num_kv_heads * traits.head_dim
    inner = block.feed_forward_length
    sizes = {"q": heads, "k": kv_heads, "v": kv_heads, "o": heads, "gate": inner, "up": inner, "down": inner}
    for norm, projections, layers in (("attn_norm", ATTENTION, block.attention), ("ffn_norm", MLP, block.mlp)):
        if projections is ATTENTION and not block.num_heads:
            continue
        shapes[f"{norm}.weight"] = (hidden,)
        for part in projections:
            shape = (hidden, sizes[part]) if part in OUTPUTS else (sizes[part], hidden)
            shapes[f"{TENSOR_NAMES[part]}.weight"] = shape
            if layers and traits.has_bias(part):
                shapes[f"{TENSOR_NAMES[part]}.bias"] = shape[:1]
    return shapes


def add_model_keys(
    writer: GGUFWriter,
    traits: FamilyTraits,
    blocks: Sequence[DeciBlock],
    *,
    context_len: int,
) -> None:
    """Add the keys of the architecture to a file.

    Args:
        writer: of the file, of this architecture.
        traits: of a model without an obstacle.
        blocks: from :func:`lay_out_blocks`.
        context_len: tokens that the model reads.
    """
    writer.add_block_count(len(blocks))
    writer.add_context_length(context_len)
    writer.add_embedding_length(traits.hidden_size)
    writer.add_feed_forward_length([block.feed_forward_length for block in blocks])
    writer.add_head_count([block.num_heads for block in blocks])
    writer.add_head_count_kv([block.num_kv_heads for block in blocks])
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(traits.head_dim)
    writer.add_rope_freq_base(float(traits.config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(traits.norm_eps)
    writer.add_vocab_size(traits.vocab_size)
