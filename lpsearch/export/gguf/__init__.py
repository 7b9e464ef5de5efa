"""Plans as one GGUF file that stock llama.cpp runs."""

from __future__ import annotations

from lpsearch.export.gguf.checks import check_gguf, check_gguf_target
from lpsearch.export.gguf.file import export_gguf, export_gguf_source, read_file_type
from lpsearch.export.gguf.formats import QUANTISATIONS, Quantisation

__all__ = [
    "QUANTISATIONS",
    "Quantisation",
    "check_gguf",
    "check_gguf_target",
    "export_gguf",
    "export_gguf_source",
    "read_file_type",
]
