"""Reading JSON that somebody else may have written: bounded, and refused where it can be read in two ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["load_json", "parse_json"]

MAX_BYTES = 64 << 20
"""Largest file that is read. A front of a thousand plans has about one MB."""


def load_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: if it cannot be read.
        ValueError: saying why it is not JSON that this project would write.
    """
    with path.open("rb") as stream:
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES >> 20} MiB")
    return parse_json(content.decode("utf-8"))


def parse_json(text: str) -> Any:
    """Parse a JSON document.

    Raises:
        ValueError: for anything but JSON, ``NaN`` and ``Infinity`` included, a key that is given twice in an object,
            numbers of thousands of digits, or lists that are nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_build_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("its lists or objects are nested too deeply") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return found
