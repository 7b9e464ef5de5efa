"""Evaluation windows: from a hub dataset, from a local file, or sampled from the model itself."""

from __future__ import annotations

from lpsearch.data.building import build_mixed_windows, build_text_windows, build_windows, check_seq_len
from lpsearch.data.texts import check_text_kinds, check_text_source, is_same_text, name_text, name_texts
from lpsearch.data.windows import Windows

__all__ = [
    "Windows",
    "build_mixed_windows",
    "build_text_windows",
    "build_windows",
    "check_seq_len",
    "check_text_kinds",
    "check_text_source",
    "is_same_text",
    "name_text",
    "name_texts",
]
