"""``lpsearch optimize``: from a model's name to the front of plans, resumable at any point."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lpsearch.commands.console import Answer
from lpsearch.commands.options import with_config_options
from lpsearch.config import resolve_config
from lpsearch.errors import ConfigError

__all__ = ["optimize"]


@with_config_options
def optimize(
    given: Mapping[str, Any],
    fresh: Annotated[bool, typer.Option("--fresh", help="move an existing study aside and begin a new one")] = False,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with the names of these options", metavar="FILE.toml")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what memory, time and tokens the study would take, and begin none")
    ] = False,
    hardware: Annotated[
        str | None,
        typer.Option(help="GPUs that a dry run is for, by name, e.g. h100; default: this machine", metavar="[N]x[GPU]"),
    ] = None,
) -> Answer:
    """Search a model's plans and write the front of depth reduction against accuracy.

    What is not typed comes from the file of --config, then from the preset of the model, then from the default in
    parentheses. The study is resumed where it was begun before.
    """
    resolved = resolve_config(command_line=given, config_file=config)
    if hardware is not None and not dry_run:
        raise ConfigError("--hardware says what a dry run is for; add --dry-run, or leave it out")
    if dry_run:
        from lpsearch.commands.dry_run import forecast_study

        return forecast_study(resolved, hardware=hardware)
    from lpsearch.commands.search import search

    return search(resolved, fresh=fresh)
