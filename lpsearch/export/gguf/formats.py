"""How tensors are stored in a GGUF file: which format each gets, and its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Format
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["QUANTISATIONS", "Bytes", "Format", "Quantisation", "choose_format", "count_bytes", "encode", "is_quantised"]

Quantisation = Literal["f32", "f16", "bf16", "q8_0"]
"""What the matrices of a file may be stored as."""

QUANTISATIONS: tuple[Quantisation, ...] = get_args(Quantisation)

_FORMATS = {"f32": Format.F32, "f16": Format.F16, "bf16": Format.BF16, "q8_0": Format.Q8_0}
_PLAIN = (Format.F32, Format.F16, Format.BF16, Format.F64)
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Bytes:
    """A tensor as a file holds it.

    Attributes:
        data: (rows, bytes of a row) or, of a vector, (bytes,).
        format: what it is stored as.
        shape: of the tensor, in the order of torch.
    """

    data: NDArray[np.uint8]
    format: Format
    shape: tuple[int, ...]


def is_quantised(kind: Format) -> bool:
    """Say whether a format stores blocks of values with a scale, rather than each value by itself."""
    return kind not in _PLAIN


def choose_format(shape: tuple[int, ...], quantisation: Quantisation) -> Format:
    """Return what a tensor is stored as: vectors in float32, as llama.cpp needs, and matrices as asked for.

    A matrix whose rows are no whole number of blocks is stored in float16, as llama.cpp's own converter does.
    """
    kind = _FORMATS[quantisation]
    if len(shape) == 1:
        return Format.F32
    return Format.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def count_bytes(shape: tuple[int, ...], kind: Format) -> int:
    """Return the size of a tensor in a format."""
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block_elements * block_bytes


def encode(tensor: Tensor, kind: Format) -> NDArray[np.uint8]:
    """Return the bytes of a tensor in a format, some rows at a time: a whole copy in float32 would be large.

    Returns:
        (rows, bytes of a row), or (bytes,) of a vector.
    """
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    num_rows = max(1, _CHUNK_ELEMENTS // rows.shape[1])
    encoded: NDArray[np.uint8] = np.empty((rows.shape[0], count_bytes((rows.shape[1],), kind)), dtype=np.uint8)
    for start in range(0, rows.shape[0], num_rows):
        part: NDArray[Any] = rows[start : start + num_rows].to("cpu", torch.float32).contiguous().numpy()
        encoded[start : start + num_rows] = gguf.quantize(part, kind).view(np.uint8).reshape(part.shape[0], -1)
    return encoded.reshape(-1) if tensor.dim() == 1 else encoded
