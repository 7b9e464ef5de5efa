"""Checkpoint directories with fused layers, which other software loads without lpsearch."""

from __future__ import annotations

from lpsearch.export.checkpoint import check_target, export_checkpoint, export_source
from lpsearch.export.loading import is_exported, load_exported, read_dtype

__all__ = ["check_target", "export_checkpoint", "export_source", "is_exported", "load_exported", "read_dtype"]
