"""Writing safetensors files tensor by tensor, and reading them likewise.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: for each tensor its dtype,
shape and offsets) and the tensors' bytes. Since the header needs no values, each tensor is computed, written and
dropped before the next one: the memory needed is that of one tensor, whatever the size of a file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lpsearch.errors import ModelError, describe_error
from lpsearch.models.stored_weights import list_weight_files

__all__ = ["DTYPES", "INDEX_NAME", "SafetensorsReader", "Shard", "TensorSpec", "list_shards", "write_shard"]

INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""Dtypes of unquantised weights, by safetensors' names."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is to be written.

    Attributes:
        name: in the checkpoint.
        shape: of the tensor.
        dtype: that it is stored in.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One safetensors file of a checkpoint: its name and the tensors in it, in order."""

    file_name: str
    tensors: tuple[TensorSpec, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the tensors, without the header."""
        return sum(tensor.num_bytes for tensor in self.tensors)


def list_shards(tensors: Sequence[TensorSpec], *, max_shard_bytes: int) -> list[Shard]:
    """Divide tensors into files of at most so many bytes, in order; a larger tensor gets a file of its own."""
    parts: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        if parts[-1] and size + tensor.num_bytes > max_shard_bytes:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.num_bytes
    if len(parts) == 1:
        return [Shard(_SINGLE_NAME, tuple(parts[0]))]
    return [
        Shard(f"model-{number:05}-of-{len(parts):05}.safetensors", tuple(part))
        for number, part in enumerate(parts, start=1)
    ]


def write_shard(
    directory: Path, shard: Shard, compute: Callable[[str, torch.dtype], Tensor], on_tensor: Callable[[], None]
) -> None:
    """Write one file, holding one tensor at a time.

    Args:
        directory: where to.
        shard: what to write.
        compute: returns a tensor by its name, in the dtype given, on any device.
        on_tensor: called after each tensor.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in shard.tensors:
        header[spec.name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        offset += spec.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (directory / shard.file_name).open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        for spec in shard.tensors:
            tensor = compute(spec.name, spec.dtype)
            assert tuple(tensor.shape) == spec.shape, (spec, tensor.shape)
            # Flat pieces, so that what must be converted or made contiguous is never there twice as a whole.
            for piece in torch.split(tensor.detach().reshape(-1), _CHUNK_ELEMENTS):
                stream.write(piece.to("cpu", spec.dtype).contiguous().view(torch.uint8).numpy().data)
            del tensor
            on_tensor()


class SafetensorsReader:
    """The tensors of a model directory, each read from its file when it is asked for.

    A file is mapped while one of its tensors is in use and no longer, so that what was read does not stay in memory.
    """

    def __init__(self, directory: Path) -> None:
        """Find the tensors in the files that transformers reads; of a name in several, the last file's counts.

        Raises:
            ModelError: if the index or a file cannot be read.
        """
        self._file_of: dict[str, Path] = {}
        for file in list_weight_files(directory):
            try:
                with safe_open(file, framework="pt") as opened:
                    self._file_of |= dict.fromkeys(opened.keys(), file)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file} is damaged: {describe_error(error)}; fetch the model again") from error

    def read(self, name: str) -> Tensor | None:
        """Return a tensor by its name, None if there is none.

        Raises:
            ModelError: if its file is damaged or not there, or it is stored quantised.
        """
        file = self._file_of.get(name)
        if file is None:
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is damaged or gone: {describe_error(error)}; fetch the model again") from error
        if tensor.dtype not in _DTYPE_NAMES:
            raise ModelError(
                f"{file}: {name} is stored as {tensor.dtype}, so the weights are quantised; give the unquantised "
                "model, or a .gguf file, which is dequantised"
            )
        return tensor
