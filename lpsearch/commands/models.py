"""``lpsearch models``: the aliases that ``--model`` takes."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table

from lpsearch.commands.console import Answer
from lpsearch.models import list_aliases

__all__ = ["models"]


def models() -> Answer:
    """List the aliases that --model takes."""
    table = Table()
    table.add_column("alias")
    table.add_column("layers", justify="right")
    table.add_column("parameters", justify="right")
    table.add_column("from")
    for alias in list_aliases():
        origin = alias.id if alias.kind == "hub" else f"package {alias.id} {alias.revision}, no hub needed"
        table.add_row(alias.name, str(alias.num_layers), f"{alias.num_parameters / 1e9:.2f} B", origin)
    return Answer({"models": [asdict(alias) for alias in list_aliases()]}, table)
