"""GGUF files of a model's shape under a plan, with random weights: what llama.cpp is timed on.

What ``lpsearch export`` writes for real weights has the same tensors (:mod:`lpsearch.transform.deci`), but for the
divisors of a scaled rotary embedding, and a time depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from lpsearch.models.traits import FamilyTraits
from lpsearch.plan import Plan
from lpsearch.transform.deci import ARCHITECTURE, DeciBlock, add_model_keys, lay_out_blocks, list_block_shapes

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["write_timing_file"]

_TILE = 1 << 20  # random values that a tensor repeats
_MAX_POSITIONS = 1 << 20  # of the file, so that the engine never cuts a context
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


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

    blocks = lay_out_blocks(traits, plan)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    add_model_keys(writer, traits, blocks, context_len=_MAX_POSITIONS)
    _add_vocabulary(writer, traits.vocab_size)
    tile = np.random.default_rng(0).standard_normal(_TILE, dtype=np.float32) * np.float32(0.02)
    for name, shape in _list_tensors(traits, blocks):
        kind = getattr(gguf.GGMLQuantizationType, _DTYPES[dtype] if len(shape) > 1 else "F32")
        writer.add_tensor(name, gguf.quants.quantize(_repeat(tile, shape), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: GGUFWriter, vocab_size: int) -> None:
    """Write so many tokens that mean nothing, since llama.cpp runs no model without some."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{token}>" for token in range(vocab_size)])
    writer.add_token_scores([-float(token) for token in range(vocab_size)])
    writer.add_token_types([2] + [1] * (vocab_size - 1))  # unknown, then ordinary ones
    for name in ("bos", "eos", "unk"):
        getattr(writer, f"add_{name}_token_id")(0)


def _list_tensors(traits: FamilyTraits, blocks: Sequence[DeciBlock]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and the shape of every tensor, rows first."""
    hidden = traits.hidden_size
    yield "token_embd.weight", (traits.vocab_size, hidden)
    yield "output_norm.weight", (hidden,)
    if not getattr(traits.config, "tie_word_embeddings", False):
        yield "output.weight", (traits.vocab_size, hidden)
    for index, block in enumerate(blocks):
        for name, shape in list_block_shapes(traits, block).items():
            yield f"blk.{index}.{name}", shape


def _repeat(tile: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return an array of a shape that repeats a tile."""
    return np.resize(tile, shape)
