"""``lpsearch cache``: packaged models, sampled windows and latencies that were kept for next time."""

from __future__ import annotations

import shutil
import sys
from typing import Annotated

import typer

from lpsearch.commands.console import Answer, get_output
from lpsearch.commands.facts import Facts, Row
from lpsearch.models.cache import CACHE_PARTS, cache_directory

__all__ = ["clear", "show"]


def show() -> Answer:
    """Show where the cache is and how many bytes it holds. The environment variable LPSEARCH_CACHE moves it."""
    sizes = _measure_parts()
    document = {"directory": str(cache_directory()), "bytes": sizes}
    return Answer(document, Facts([("directory", cache_directory()), *_list_rows(sizes)]))


def clear(
    yes: Annotated[bool, typer.Option("--yes", help="do not ask, where a terminal would be asked")] = False,
) -> Answer:
    """Delete the cache; everything in it can be made again. On a terminal it asks first."""
    sizes = _measure_parts()
    directory = cache_directory()
    output = get_output()
    if sizes and not yes and output.tables is not None and sys.stdin.isatty():
        output.tables.print(Facts([("directory", directory), *_list_rows(sizes)]), soft_wrap=True)
        if not typer.confirm("Delete all of it?"):
            return Answer({"directory": str(directory), "cleared_bytes": 0}, Facts([("deleted", "nothing")]))
    for name in CACHE_PARTS:
        if (directory / name).exists():
            shutil.rmtree(directory / name)
    num_bytes = sum(sizes.values())
    rows: list[Row] = [("directory", directory), ("deleted", _describe_size(num_bytes)), *_list_rows(sizes)]
    return Answer({"directory": str(directory), "cleared_bytes": num_bytes}, Facts(rows))


def _measure_parts() -> dict[str, int]:
    """Return the bytes of every part of the cache that is there."""
    parts = [cache_directory() / name for name in CACHE_PARTS if (cache_directory() / name).is_dir()]
    return {part.name: sum(file.stat().st_size for file in part.rglob("*") if file.is_file()) for part in parts}


def _list_rows(sizes: dict[str, int]) -> list[Row]:
    return [(name, _describe_size(num_bytes)) for name, num_bytes in sizes.items()] or [("holds", "nothing")]


def _describe_size(num_bytes: int) -> str:
    return f"{num_bytes:,} bytes" if num_bytes < 1_000_000 else f"{num_bytes / 1e6:,.1f} MB"
