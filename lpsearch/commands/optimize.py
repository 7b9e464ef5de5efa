"""``lpsearch optimize``: from a model's name to the front of plans, resumable at any point."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lpsearch.commands.console import Answer
from lpsearch.commands.options import with_config_options
from lpsearch.config import resolve_config

__all__ = ["optimize"]


@with_config_options
def optimize(
    given: Mapping[str, Any],
    fresh: Annotated[bool, typer.Option("--fresh", help="move an existing study aside and begin a new one")] = False,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with the names of these options", metavar="FILE.toml")
    ] = None,
) -> Answer:
    """Search a model's plans and write the front of depth reduction against accuracy."""
    resolved = resolve_config(command_line=given, config_file=config)
    from lpsearch.commands.search import search

    return search(resolved, fresh=fresh)
