"""Aliases: short names, each of exactly one model artefact, with the model's bundled geometry. Imports no torch."""

from __future__ import annotations

import difflib
import json
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from lpsearch.errors import ModelError

__all__ = ["Alias", "find_alias", "list_aliases", "read_geometry", "suggest_aliases"]


@dataclass(frozen=True)
class Alias:
    """A short name of one model artefact.

    Attributes:
        name: what the user types, e.g. ``llama2-7b``.
        kind: ``hub`` for a Hugging Face repository, ``package`` for a model inside Python packages.
        id: hub id, or name of the package.
        revision: commit or branch on the hub, or version of the package.
        num_layers: number of decoder layers.
        num_parameters: number of parameters, tied ones once.
    """

    name: str
    kind: Literal["hub", "package"]
    id: str
    revision: str
    num_layers: int
    num_parameters: int


def list_aliases() -> tuple[Alias, ...]:
    """Return every alias, in the order of ``aliases.toml``: by family, then by size."""
    return tuple(_read_aliases().values())


def find_alias(name: str) -> Alias | None:
    """Return the alias of that name, or the one of a packaged model whose package has it; else None."""
    aliases = _read_aliases()
    packaged = (alias for alias in aliases.values() if alias.kind == "package" and alias.id == name)
    return aliases.get(name) or next(packaged, None)


def suggest_aliases(name: str) -> list[str]:
    """Return up to three aliases that look like a name, the most alike first."""
    return difflib.get_close_matches(name.lower(), _read_aliases(), n=3, cutoff=0.6)


def read_geometry(name: str) -> dict[str, Any]:
    """Return the values of ``config.json`` that are bundled for an alias.

    Raises:
        ModelError: if there is no such alias.
    """
    try:
        return dict(_read_geometries()[name])
    except KeyError:
        raise ModelError(f"no geometry is bundled for {name!r}; `lpsearch models` lists the aliases") from None


@cache
def _read_aliases() -> dict[str, Alias]:
    """Read ``aliases.toml``, once."""
    text = resources.files(__package__).joinpath("aliases.toml").read_text(encoding="utf-8")
    return {
        name: Alias(name=name, num_layers=_read_geometries()[name]["num_hidden_layers"], **fields)
        for name, fields in tomllib.loads(text).items()
    }


@cache
def _read_geometries() -> dict[str, dict[str, Any]]:
    """Read ``geometry.json``, once."""
    text = resources.files(__package__).joinpath("geometry.json").read_text(encoding="utf-8")
    geometries: dict[str, dict[str, Any]] = json.loads(text)
    return geometries
