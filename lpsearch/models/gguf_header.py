"""The header of a GGUF file: its metadata, and the names, shapes and places of its tensors.

The reader of the ``gguf`` package makes an array of every entry of the vocabulary, which takes 20 seconds for Gemma's
262,144 tokens. This one steps over them. The form is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lpsearch.errors import ModelError

__all__ = ["GgufHeader", "GgufTensor", "read_gguf_header", "read_gguf_vector"]

_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 8
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_DEFAULT_ALIGNMENT = 32
_FLOAT32 = 0


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file.

    Attributes:
        shape: its shape in the order of torch: the last dimension is contiguous.
        type: number of its quantisation, a value of ``gguf.GGMLQuantizationType``; 0 is float32.
        start: offset of its first byte in the file.
    """

    shape: tuple[int, ...]
    type: int
    start: int

    @property
    def num_bytes(self) -> int:
        """Size of its data in the file."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # which imports much, and most models are no GGUF file

        block_elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(self.type)]
        return math.prod(self.shape) // block_elements * block_bytes


@dataclass(frozen=True)
class GgufHeader:
    """What stands before the data of a GGUF file.

    Attributes:
        metadata: scalars, strings and arrays of scalars by key; an array of strings is None.
        tensors: every tensor by name.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """``general.architecture``, which also begins the keys of the model's own metadata."""
        return str(self.metadata.get("general.architecture"))


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises:
        ModelError: if the file is no GGUF file, is damaged, has tensors in a form that the installed ``gguf`` package
            does not know, or ends before its data does.
    """
    from gguf import GGMLQuantizationType

    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Reader(data).read()
            num_bytes = len(data)
    except (ValueError, struct.error) as error:
        raise ModelError(f"{path}: not a GGUF file, or a damaged one: {error}; fetch it again") from error
    unknown = {tensor.type for tensor in header.tensors.values()} - {int(kind) for kind in GGMLQuantizationType}
    if unknown:
        raise ModelError(f"{path}: the installed gguf package does not know quantisation {min(unknown)}; update gguf")
    needed = max((tensor.start + tensor.num_bytes for tensor in header.tensors.values()), default=0)
    if needed > num_bytes:
        raise ModelError(f"{path}: the file is cut short: it has {num_bytes} bytes of {needed}; fetch it again")
    return header


def read_gguf_vector(path: Path, tensor: GgufTensor) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """Read a tensor of one dimension that is stored in float32; None for any other."""
    if tensor.type != _FLOAT32 or len(tensor.shape) != 1:
        return None
    with path.open("rb") as stream:
        stream.seek(tensor.start)
        return np.frombuffer(stream.read(tensor.num_bytes), dtype="<f4")


class _Reader:
    """A position in the bytes of a GGUF file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def read(self) -> GgufHeader:
        """Read everything before the tensors' data."""
        if self._data[:4] != b"GGUF":
            raise ValueError(f"it begins with {self._data[:4]!r}, expected b'GGUF'")
        self._at = 4
        version, num_tensors, num_keys = self._take("IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}, expected one of {_VERSIONS}, little-endian")
        metadata = {}
        for _ in range(num_keys):
            key = self._take_string()
            metadata[key] = self._take_value(*self._take("I"))
        entries = [self._take_tensor() for _ in range(num_tensors)]
        alignment = int(metadata.get("general.alignment") or _DEFAULT_ALIGNMENT)
        start = -(-self._at // alignment) * alignment
        tensors = {name: GgufTensor(shape, kind, start + offset) for name, shape, kind, offset in entries}
        return GgufHeader(metadata, tensors)

    def _take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self._data, self._at)
        self._at += struct.calcsize(f"<{form}")
        return values

    def _take_string(self) -> str:
        return self._data[self._skip_string()].decode()

    def _skip_string(self) -> slice:
        """Step over a string and return where it stands."""
        (length,) = self._take("Q")
        if length > len(self._data) - self._at:
            raise ValueError("it ends within a string")
        self._at += length
        return slice(self._at - length, self._at)

    def _take_value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._take_string()
        if kind in _SCALARS:
            return self._take(_SCALARS[kind])[0]
        item_kind, count = self._take("IQ") if kind == _ARRAY else (None, 0)
        if item_kind in _SCALARS:
            return self._take(f"{count}{_SCALARS[item_kind]}")
        if item_kind != _STRING:
            raise ValueError(f"its metadata has a value of the unknown kind {kind if item_kind is None else item_kind}")
        for _ in range(count):
            self._skip_string()
        return None

    def _take_tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._take_string()
        (num_dimensions,) = self._take("I")
        if num_dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {num_dimensions} dimensions")
        shape = self._take(f"{num_dimensions}Q")[::-1]
        kind, offset = self._take("IQ")
        return name, shape, kind, offset
