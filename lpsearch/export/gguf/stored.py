"""The GGUF file that a model comes from: its tensors as bytes, and the metadata that goes with any model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType
from torch import Tensor

from lpsearch.errors import FamilyError
from lpsearch.export.gguf.formats import Bytes, Format
from lpsearch.models.gguf_header import GgufHeader, read_gguf_header
from lpsearch.models.traits import Projection
from lpsearch.transform.deci import TENSOR_NAMES

__all__ = ["MetadataEntry", "StoredModel"]

_PACKED: dict[str, tuple[Projection, ...]] = {"attn_qkv": ("q", "k", "v"), "ffn_up": ("gate", "up")}
"""Tensors of Phi-3 in which projections are stacked."""

_REORDERED = {"llama": True, "qwen2": False, "phi3": False}
"""Architectures whose tensors are taken over, and whether their queries and keys have ``deci``'s order of rows."""

_OF_ITS_OWN = ("general.architecture", "general.file_type", "general.quantization_version", "general.alignment")


@dataclass(frozen=True)
class MetadataEntry:
    """A key of a GGUF file with its value, and the type of an array's items."""

    key: str
    value: Any
    type: GGUFValueType
    item_type: GGUFValueType | None


class StoredModel:
    """A GGUF file whose tensors can be copied byte for byte.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header: GgufHeader = read_gguf_header(path)
        self._data = np.memmap(path, mode="r", dtype=np.uint8)

    @property
    def file_type(self) -> int | None:
        """What its metadata says of its quantisation, a number of ``gguf.LlamaFileType``; None if it says nothing."""
        return self._header.metadata.get("general.file_type")

    def check_attention(self) -> None:
        """Refuse a window that the file names and transformers' GGUF reader leaves out.

        Raises:
            FamilyError: if the attention slides over a window that is shorter than the context.
        """
        prefix, metadata = self._header.architecture, self._header.metadata
        window, context = (metadata.get(f"{prefix}.{key}") for key in ("attention.sliding_window", "context_length"))
        if isinstance(window, int) and isinstance(context, int) and 0 < window < context:
            raise FamilyError(
                f"{self.path} cannot be written as a GGUF file with a plan: its attention slides over a window of "
                f"{window} tokens, and the one architecture of llama.cpp with blocks of unlike size (deci) has none"
            )

    @property
    def most_common_format(self) -> Format:
        """The format of most of its elements in matrices."""
        sizes: dict[int, int] = {}
        for tensor in self._header.tensors.values():
            if len(tensor.shape) > 1:
                sizes[tensor.type] = sizes.get(tensor.type, 0) + int(np.prod(tensor.shape))
        return Format(max(sizes, key=lambda kind: sizes[kind]))

    def list_metadata(self) -> list[MetadataEntry]:
        """Read the keys that stay true of a model whose layers are changed: those of its tokenizer and its origin."""
        entries = []
        for key, field in GGUFReader(self.path).fields.items():
            if key.startswith(("tokenizer.", "general.")) and key not in _OF_ITS_OWN:
                is_array = field.types[0] == GGUFValueType.ARRAY
                entries.append(
                    MetadataEntry(key, field.contents(), field.types[0], field.types[-1] if is_array else None)
                )
        return entries

    def find(self, name: str) -> Bytes | None:
        """Return a tensor by its name; None if there is none, or the architecture is not one of those known here."""
        tensor = self._header.tensors.get(name)
        if tensor is None or self._header.architecture not in _REORDERED:
            return None
        data = self._data[tensor.start : tensor.start + tensor.num_bytes]
        rows = data if len(tensor.shape) == 1 else data.reshape(tensor.shape[0], -1)
        return Bytes(rows, Format(tensor.type), tensor.shape)

    def find_projection(
        self, layer: int, projection: Projection, kind: str, *, sizes: dict[Projection, int], order: Tensor | None
    ) -> Bytes | None:
        """Return a projection's weight or bias in ``deci``'s order of rows; a row's blocks do not depend on others.

        Args:
            layer: whose.
            projection: which.
            kind: ``weight`` or ``bias``.
            sizes: rows of each projection.
            order: that transformers' rows have to be brought into; None if any order is the right one.
        """
        name = f"blk.{layer}.{TENSOR_NAMES[projection]}.{kind}"
        packed = self._find_packed(layer, projection, kind) if self._header.architecture == "phi3" else None
        if packed is None:
            found = self.find(name)
        else:
            stacked, parts = packed
            start = sum(sizes[part] for part in parts[: parts.index(projection)])
            found = _take_rows(stacked, slice(start, start + sizes[projection]))
        if found is None or order is None or _REORDERED[self._header.architecture]:
            return found
        return _take_rows(found, order.numpy())

    def _find_packed(self, layer: int, projection: Projection, kind: str) -> tuple[Bytes, Sequence[Projection]] | None:
        """Return the tensor in which a projection is stacked with others, and these; None if it stands alone."""
        for name, parts in _PACKED.items():
            if projection in parts and (tensor := self.find(f"blk.{layer}.{name}.{kind}")) is not None:
                return tensor, parts
        return None


def _take_rows(tensor: Bytes, rows: Any) -> Bytes:
    """Return some rows of a tensor, or some elements of a vector."""
    data = tensor.data if len(tensor.shape) > 1 else tensor.data.reshape(tensor.shape[0], -1)
    taken = data[rows]
    shape = (taken.shape[0], *tensor.shape[1:])
    return Bytes(taken if len(shape) > 1 else taken.reshape(-1), tensor.format, shape)
