"""Where lpsearch keeps what it can fetch or compute again."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["CACHE_PARTS", "cache_directory"]

CACHE_PARTS = ("converted", "latency", "packages", "windows")
"""Folders that lpsearch makes in its cache; whatever else is there is not its own."""


def cache_directory() -> Path:
    """Return the user's cache directory of lpsearch, which need not exist yet.

    It is ``$LPSEARCH_CACHE`` if that is set, else ``$XDG_CACHE_HOME/lpsearch``, else ``~/.cache/lpsearch``. The
    environment is read here and nowhere else.
    """
    chosen = os.environ.get("LPSEARCH_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    root = Path(base).expanduser() if base else Path.home() / ".cache"
    return (root / "lpsearch").absolute()
