"""``lpsearch cache``: packaged models and sampled windows that were kept for next time."""

from __future__ import annotations

import shutil
from typing import Any

from lpsearch.models.cache import CACHE_PARTS, cache_directory

__all__ = ["clear_cache", "show_cache"]


def show_cache() -> dict[str, Any]:
    """Return where the cache is and how many bytes each part of it takes."""
    directory = cache_directory()
    parts = [directory / name for name in CACHE_PARTS if (directory / name).is_dir()]
    return {
        "directory": str(directory),
        "bytes": {part.name: sum(file.stat().st_size for file in part.rglob("*") if file.is_file()) for part in parts},
    }


def clear_cache() -> dict[str, Any]:
    """Delete the cache; what is needed again is made again."""
    cleared = show_cache()
    for name in CACHE_PARTS:
        if (cache_directory() / name).exists():
            shutil.rmtree(cache_directory() / name)
    return {"directory": cleared["directory"], "cleared_bytes": sum(cleared["bytes"].values())}
