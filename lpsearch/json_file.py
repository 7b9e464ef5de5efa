"""Reading JSON that somebody else may have written: bounded, and refused where it can be read in two ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lpsearch.errors import shorten

__all__ = ["describe_findings", "describe_first_finding", "load_json", "parse_json", "shorten_value"]

MAX_BYTES = 64 << 20
"""Largest file that is read. A front of a thousand plans has about one MB."""


_SHOWN_FINDINGS = 8
_LONGEST_VALUE = 200
"""Characters of a value, or of the names that lead to it, in a message."""


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


def describe_findings(error: ValidationError) -> str:
    """Put what pydantic found into one line: where, what was found, what was expected.

    A file may be wrong in any number of places, and each value of any length, so only the first few are named in full.
    """
    items = error.errors(include_url=False, include_context=False)
    findings = []
    for item in items[:_SHOWN_FINDINGS]:
        place = _name_place(item["loc"]) or "document"
        if item["type"] == "extra_forbidden":
            findings.append(f"unknown field {place}; remove it")
        elif item["type"] == "missing":
            findings.append(f"field {place} is missing; add it")
        else:
            findings.append(f"field {place}: {item['msg']}, got {shorten_value(item['input'])}")
    if len(items) > _SHOWN_FINDINGS:
        findings.append(f"and {len(items) - _SHOWN_FINDINGS} more")
    return "; ".join(findings)


def describe_first_finding(error: ValidationError) -> str:
    """Say the first thing that pydantic found, and where."""
    first = error.errors(include_url=False, include_context=False)[0]
    said = shorten(first["msg"].removeprefix("Value error, "), longest=2 * _LONGEST_VALUE)
    place = _name_place(first["loc"])
    return f"{place}: {said}" if place else said


def _name_place(location: tuple[int | str, ...]) -> str:
    return shorten(".".join(map(str, location)), longest=_LONGEST_VALUE)


def shorten_value(value: Any) -> str:
    """Return a value as Python writes it, without its middle where that is long."""
    return shorten(repr(value), longest=_LONGEST_VALUE)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shorten_value(twice)} is given twice")
    return found
