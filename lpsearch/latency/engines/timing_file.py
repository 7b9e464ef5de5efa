"""GGUF files of a model's shape under a plan, with random weights: what llama.cpp is timed on.

llama.cpp's architecture ``deci`` reads the number of heads, of key-value heads and the feed-forward length of each
block, so that a group is one block. What ``lpsearch export`` writes for real weights has the same shapes, and a time
depends on nothing else. Two shapes would mislead the graph: a block with a feed-forward length of 0 skips its attention
too, so such a block gets a feed-forward network 32 wide; and the first block must attend, so it gets one head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lpsearch.errors import FamilyError
from lpsearch.models.traits import FamilyTraits
from lpsearch.plan import Plan
from lpsearch.plan.stage_blocks import arrange_blocks

__all__ = ["Block", "check_llama_cpp_family", "list_blocks", "write_timing_file"]

_LEAST_FEED_FORWARD = 32
_TILE = 1 << 20  # random values that a tensor repeats
_MAX_POSITIONS = 1 << 20  # of the file, so that the engine never cuts a context
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_KNOWN_FAMILIES = ("llama", "mistral", "qwen2", "granite", "phi3")


@dataclass(frozen=True)
class Block:
    """A block of the file.

    Attributes:
        num_heads: of its attention; 0 for none.
        num_kv_heads: likewise.
        feed_forward: length of its MLP.
    """

    num_heads: int
    num_kv_heads: int
    feed_forward: int


def check_llama_cpp_family(traits: FamilyTraits) -> None:
    """Refuse a model whose groups llama.cpp's ``deci`` blocks do not compute.

    Raises:
        FamilyError: with the reason.
    """
    obstacle = traits.fusing_obstacle or _find_obstacle(traits)
    if obstacle is not None:
        raise FamilyError(
            f"--engine llama.cpp: model type {traits.config.model_type} is not timed there: {obstacle}; timed are "
            f"{', '.join(_KNOWN_FAMILIES)} without sliding windows. Give --engine runtime, transformers or vllm"
        )


def _find_obstacle(traits: FamilyTraits) -> str | None:
    """Say what of a model the blocks have no place for; None if nothing is."""
    if any(traits.has_experts):
        return "its MLP is a mixture of experts"
    if traits.has_post_norms or not traits.has_pre_norms:
        return "its blocks norm what their branches return"
    if traits.qk_norm != "none":
        return "it norms queries and keys"
    if traits.family.norm_kind != "rms" or traits.norm_offset:
        return "its norms are not plain RMSNorms"
    if any(kind.window is not None for kind in traits.kinds):
        return "its attention slides"
    if not all(kind.rotates for kind in traits.kinds):
        return "some of its layers have no rotary embedding"
    if traits.hidden_act != "silu" or not any("gate" in parts for parts in traits.family.projections.values()):
        return "its MLP is no gated SiLU"
    if traits.attention_softcap is not None or traits.logits_softcap is not None:
        return "it bounds its scores"
    return None if traits.config.model_type in _KNOWN_FAMILIES else "nobody has tried it"


def list_blocks(traits: FamilyTraits, plan: Plan) -> list[Block]:
    """Lay what a plan keeps into blocks: an attention, and the MLPs that follow it.

    Args:
        traits: of the model.
        plan: for it.
    """
    found = [
        Block(
            len(block.attention) * traits.num_heads,
            len(block.attention) * traits.num_kv_heads,
            len(block.mlp) * traits.intermediate_size or _LEAST_FEED_FORWARD,
        )
        for block in arrange_blocks(plan)
    ] or [Block(0, 0, _LEAST_FEED_FORWARD)]
    return found if found[0].num_heads else [Block(1, 1, found[0].feed_forward), *found[1:]]


def write_timing_file(traits: FamilyTraits, plan: Plan, path: Path, *, dtype: torch.dtype) -> None:
    """Write a GGUF file of a model's shape under a plan.

    Args:
        traits: of the model.
        plan: for it.
        path: file to write.
        dtype: of the matrices; norms and biases are float32, as llama.cpp wants them.

    Raises:
        OSError: if it cannot be written.
    """
    import gguf

    blocks = list_blocks(traits, plan)
    writer = gguf.GGUFWriter(path, "deci")
    writer.add_block_count(len(blocks))
    writer.add_context_length(_MAX_POSITIONS)
    writer.add_embedding_length(traits.hidden_size)
    writer.add_feed_forward_length([block.feed_forward for block in blocks])
    writer.add_head_count([block.num_heads for block in blocks])
    writer.add_head_count_kv([block.num_kv_heads for block in blocks])
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(traits.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(traits.vocab_size)
    _add_vocabulary(writer, traits.vocab_size)
    tile = np.random.default_rng(0).standard_normal(_TILE, dtype=np.float32) * np.float32(0.02)
    for name, shape in _list_tensors(traits, blocks):
        kind = getattr(gguf.GGMLQuantizationType, _DTYPES[dtype] if len(shape) > 1 else "F32")
        writer.add_tensor(name, gguf.quants.quantize(_repeat(tile, shape), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: object, vocab_size: int) -> None:
    """Write so many tokens that mean nothing, since llama.cpp runs no model without some."""
    add = writer
    add.add_tokenizer_model("llama")  # type: ignore[attr-defined]
    add.add_token_list([f"<{token}>" for token in range(vocab_size)])  # type: ignore[attr-defined]
    add.add_token_scores([-float(token) for token in range(vocab_size)])  # type: ignore[attr-defined]
    add.add_token_types([2] + [1] * (vocab_size - 1))  # type: ignore[attr-defined]  # unknown, then ordinary ones
    for name in ("bos", "eos", "unk"):
        getattr(add, f"add_{name}_token_id")(0)


def _list_tensors(traits: FamilyTraits, blocks: list[Block]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and the shape of every tensor, rows first."""
    hidden = traits.hidden_size
    yield "token_embd.weight", (traits.vocab_size, hidden)
    yield "output_norm.weight", (hidden,)
    if not getattr(traits.config, "tie_word_embeddings", False):
        yield "output.weight", (traits.vocab_size, hidden)
    for index, block in enumerate(blocks):
        prefix = f"blk.{index}."
        queries, keys = block.num_heads * traits.head_dim, block.num_kv_heads * traits.head_dim
        if block.num_heads:
            yield f"{prefix}attn_norm.weight", (hidden,)
            for part, rows in (("q", queries), ("k", keys), ("v", keys)):
                yield f"{prefix}attn_{part}.weight", (rows, hidden)
                if traits.has_bias("q"):
                    yield f"{prefix}attn_{part}.bias", (rows,)
            yield f"{prefix}attn_output.weight", (hidden, queries)
            if traits.has_bias("o"):
                yield f"{prefix}attn_output.bias", (hidden,)
        yield f"{prefix}ffn_norm.weight", (hidden,)
        for part in ("gate", "up"):
            yield f"{prefix}ffn_{part}.weight", (block.feed_forward, hidden)
        yield f"{prefix}ffn_down.weight", (hidden, block.feed_forward)


def _repeat(tile: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return an array of a shape that repeats a tile."""
    return np.resize(tile, shape)
