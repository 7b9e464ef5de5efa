"""Checkpoint directories with fused layers, which other software loads without lpsearch."""

from __future__ import annotations

from lpsearch.export.checkpoint import export_checkpoint, export_source

__all__ = ["export_checkpoint", "export_source"]
