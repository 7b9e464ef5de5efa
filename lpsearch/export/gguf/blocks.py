"""How the groups of a plan become blocks of llama.cpp's architecture ``deci``, and which models it computes exactly.

``deci`` (llama.cpp's ``src/models/deci.cpp``, made for Llama-3.1-Nemotron) reads the number of heads, of key-value
heads and the feed-forward length for each block. A block is x' = x + A(N(x)), y = x' + F(N'(x')) with rotary embeddings
of neighbouring pairs, full attention, a SiLU gate and RMSNorms; without heads it is y = x + F(N(x)). A feed-forward
length of 0 is no way to leave an MLP out: the graph then skips the attention of the block too, without an error.
"""

from __future__ import annotations

from typing import Any

from lpsearch.errors import FamilyError
from lpsearch.export.gguf.rotary import find_rotary_obstacle
from lpsearch.models.traits import FamilyTraits, read_traits
from lpsearch.plan.stage_blocks import Block, arrange_blocks

__all__ = ["Block", "arrange_blocks", "check_gguf"]

_NORMED_HEADS = {"head": "by head", "full": "over their full width"}


def check_gguf(config: Any) -> None:
    """Refuse a model that llama.cpp's ``deci`` would compute otherwise.

    Args:
        config: a transformers configuration.

    Raises:
        FamilyError: with the reason.
    """
    traits = read_traits(config)
    obstacle = _find_obstacle(traits)
    if obstacle is not None:
        raise FamilyError(
            f"model type {traits.config.model_type} cannot be written as a GGUF file: {obstacle}. The one "
            "architecture of llama.cpp whose blocks may differ in size (deci) computes Llama's layer; for transformers "
            "and vLLM, `lpsearch export PLAN DIR` writes a directory"
        )


def _find_obstacle(traits: FamilyTraits) -> str | None:
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
    return find_rotary_obstacle(traits)
