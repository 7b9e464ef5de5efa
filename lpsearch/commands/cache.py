"""``lpsearch cache``: packaged models and sampled windows that were kept for next time."""

from __future__ import annotations

import shutil
from typing import Any

from lpsearch.models.cache import CACHE_PARTS, cache_directory

__all__ = ["clear", "show"]


def show() -> dict[str, Any]:
    """Print where the cache is and how many bytes it holds."""
    directory = cache_directory()
    parts = [directory / name for name in CACHE_PARTS if (directory / name).is_dir()]
    return {
        "directory": str(directory),
        "bytes": {part.name: sum(file.stat().st_size for file in part.rglob("*") if file.is_file()) for part in parts},
    }


def clear() -> dict[str, Any]:
    """Delete the cache; everything in it can be made again."""
    cleared = show()
    for name in CACHE_PARTS:
        if (cache_directory() / name).exists():
            shutil.rmtree(cache_directory() / name)
    return {"directory": cleared["directory"], "cleared_bytes": sum(cleared["bytes"].values())}
