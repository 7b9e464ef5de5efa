"""Several kinds of text: how they are named and weighted, and which windows belong to which.

Windows of several kinds are interleaved: of K kinds, windows k, k + K, k + 2K ... are those of kind k, and every kind
has as many. So any number of whole rounds of K windows holds as much of each kind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from lpsearch.errors import DataError

if TYPE_CHECKING:
    from lpsearch.plan import ProxyMetrics

__all__ = [
    "TextKind",
    "describe_kinds",
    "dump_kinds",
    "list_measured_kinds",
    "name_kinds",
    "normalise_weights",
    "parse_dumped_kinds",
    "parse_kinds",
    "write_kind",
]

_WEIGHT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class TextKind:
    """One kind of text.

    Attributes:
        spec: what the text is.
        weight: its weight in a mean over kinds, relative to those of the others.
    """

    spec: str
    weight: float = 1.0


def parse_kinds(texts: Sequence[str]) -> tuple[TextKind, ...]:
    """Parse specifications of text, each ``SPEC`` or ``SPEC@WEIGHT``.

    Only a number after the last ``@`` is a weight, and nothing is where a file of the whole name exists.

    Raises:
        DataError: for a weight that is not positive.
    """
    return tuple(map(_parse_kind, texts))


def _parse_kind(text: str) -> TextKind:
    spec, _, weight = text.rpartition("@")
    if not spec or not _WEIGHT.fullmatch(weight) or _is_file(text):
        return TextKind(text)
    value = float(weight)
    if not 0 < value < math.inf:
        raise DataError(f"{text}: the weight of {spec} is {weight}; give a positive number, or leave the text out")
    return TextKind(spec, value)


def _is_file(name: str) -> bool:
    try:
        return Path(name).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):  # too long, ~ of an unknown user, a null character
        return False


def write_kind(kind: TextKind) -> str:
    """Write a kind so that :func:`parse_kinds` reads the same, whatever files there are then."""
    _, at, rest = kind.spec.rpartition("@")
    if kind.weight == 1 and not (at and _WEIGHT.fullmatch(rest)):
        return kind.spec
    return f"{kind.spec}@{repr(kind.weight).removesuffix('.0')}"


def describe_kinds(kinds: Sequence[TextKind]) -> str:
    """Name the text that several kinds make together, e.g. ``wikitext2:validation@2 + code.py``."""
    return kinds[0].spec if len(kinds) == 1 else " + ".join(map(write_kind, kinds))


def name_kinds(specs: Sequence[str]) -> list[str]:
    """Return short names for the heads of columns: of a path as many of its last parts as tell it from the others."""
    names = []
    for spec in specs:
        path = PurePath(spec)
        parts = path.parts if path.is_absolute() or path.suffix else (spec,)
        others = [other for other in specs if other != spec]
        shown = (str(PurePath(*parts[-count:])) for count in range(1, len(parts) + 1))
        names.append(next((name for name in shown if not any(_ends_with(other, name) for other in others)), spec))
    return names


def _ends_with(spec: str, name: str) -> bool:
    return spec == name or spec.endswith(f"/{name}")


def normalise_weights(kinds: Sequence[TextKind]) -> tuple[float, ...]:
    """Return weights whose sum is one."""
    total = math.fsum(kind.weight for kind in kinds)
    return tuple(kind.weight / total for kind in kinds)


def dump_kinds(kinds: Iterable[TextKind]) -> list[dict[str, Any]]:
    """Return kinds as JSON values."""
    return [{"spec": kind.spec, "weight": kind.weight} for kind in kinds]


def list_measured_kinds(measured: ProxyMetrics) -> list[TextKind]:
    """Return the kinds of text that an entry of a plan file was measured on."""
    return [TextKind(part.data, part.weight) for part in measured.by_kind] or [TextKind(measured.data)]


def parse_dumped_kinds(document: Iterable[Mapping[str, Any]]) -> tuple[TextKind, ...]:
    """Read what :func:`dump_kinds` wrote."""
    return tuple(TextKind(str(item["spec"]), float(item["weight"])) for item in document)
