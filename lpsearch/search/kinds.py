"""The kinds of text of a study, as its settings record them; a study of one kind records none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lpsearch.config import Split
from lpsearch.kinds import TextKind, dump_kinds, parse_dumped_kinds

__all__ = ["read_kinds", "write_kinds"]


def read_kinds(settings: Mapping[str, Any], split: Split) -> tuple[TextKind, ...]:
    """Return the kinds of the windows of a split; empty where there is only one."""
    return parse_dumped_kinds(settings.get("kinds", {}).get(split, ()))


def write_kinds(kinds: Mapping[Split, Sequence[TextKind]]) -> dict[str, Any]:
    """Return the settings that record the kinds of each split; empty where each has only one."""
    several = {split: dump_kinds(of_split) for split, of_split in kinds.items() if len(of_split) > 1}
    return {"kinds": several} if several else {}
