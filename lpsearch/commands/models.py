"""``lpsearch models``: the aliases that ``--model`` takes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group

from lpsearch.commands.console import Answer
from lpsearch.commands.facts import Grid, wrap_line
from lpsearch.models import Alias, list_aliases
from lpsearch.models.commits import find_commit

__all__ = ["models"]

_SHOWN_DIGITS = 10
"""Of a commit, in the table; the JSON line has all."""


def models() -> Answer:
    """List the aliases that --model takes, and the artefact that each names."""
    rows = [
        (
            alias.name,
            str(alias.num_layers),
            f"{alias.num_parameters / 1e9:.2f} B",
            f"{alias.title}\npackage {alias.id}" if alias.title else alias.id,
            _describe_revision(alias),
        )
        for alias in list_aliases()
    ]
    table = Grid(
        ("alias", "layers", "size", "is", "commit"),
        rows,
        left=("alias", "is", "commit"),
        optional=("size", "layers"),
    )
    note = (
        "A packaged model needs no hub; it has a version instead of a commit. A commit with * was main when the alias "
        "was first used here, and is taken from then on. Where no commit is known, the first use records it."
    )
    return Answer({"models": [_describe(alias) for alias in list_aliases()]}, Group(table, "", wrap_line(note, "dim")))


def _describe(alias: Alias) -> dict[str, Any]:
    """Build the entry of an alias in the JSON line; ``revision_from`` says how the revision is known."""
    recorded = find_commit(alias.id) if alias.revision is None else None
    known = "lpsearch" if alias.revision is not None else None
    return {
        **asdict(alias),
        "revision": alias.revision or recorded,
        "revision_from": known if recorded is None else "first use",
    }


def _describe_revision(alias: Alias) -> str:
    if alias.revision is not None:
        return alias.revision[:_SHOWN_DIGITS]
    recorded = find_commit(alias.id)
    return "not known" if recorded is None else f"{recorded[:_SHOWN_DIGITS]}*"
