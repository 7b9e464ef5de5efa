"""Aliases: short names, each of one model artefact, with the model's bundled geometry. Imports no torch."""

from __future__ import annotations

import difflib
import json
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from lpsearch.errors import ModelError

__all__ = [
    "Alias",
    "describe_artefact",
    "describe_weights",
    "find_alias",
    "find_base",
    "find_title",
    "list_aliases",
    "name_model",
    "read_geometry",
    "suggest_aliases",
]


@dataclass(frozen=True)
class Alias:
    """A short name of one model artefact.

    Attributes:
        name: what the user types, e.g. ``llama2-7b``.
        kind: ``hub`` for a Hugging Face repository, ``package`` for a model inside Python packages.
        id: hub id, or name of the package.
        num_layers: number of decoder layers.
        num_parameters: number of parameters, tied ones once.
        revision: commit on the hub, or version of the package; None where the commit is not known here, see
            :mod:`lpsearch.models.commits`.
        title: what the artefact is, where its id does not say so.
        base: hub id of the model that a quantised artefact was made of.
    """

    name: str
    kind: Literal["hub", "package"]
    id: str
    num_layers: int
    num_parameters: int
    revision: str | None = None
    title: str | None = None
    base: str | None = None


def list_aliases() -> tuple[Alias, ...]:
    """Return every alias, in the order of ``aliases.toml``: by family, then by size."""
    return tuple(_read_aliases().values())


def find_alias(name: str) -> Alias | None:
    """Return the alias of that name, or the one of a packaged model whose package has it; else None."""
    aliases = _read_aliases()
    packaged = (alias for alias in aliases.values() if alias.kind == "package" and alias.id == name)
    return aliases.get(name) or next(packaged, None)


def find_title(model_id: str) -> str | None:
    """Return what an artefact is, where its id does not say so: that of a packaged model is the package's name."""
    alias = _find_artefact(model_id)
    return None if alias is None else alias.title


def name_model(model_id: str) -> str:
    """Return what people call an artefact: its title where it has one, else its id."""
    return find_title(model_id) or model_id


def describe_artefact(model_id: str, revision: str | None) -> str:
    """Say what people call an artefact, and what exactly it is, e.g. ``MODEL (4-bit), package NAME 1.0``."""
    title = find_title(model_id)
    if title is not None:
        return f"{title}, package {' '.join(filter(None, (model_id, revision)))}"
    return " at ".join(filter(None, (model_id, revision)))


def find_base(model_id: str) -> str | None:
    """Return the hub id of the model that a quantised artefact was made of; None for any other."""
    alias = _find_artefact(model_id)
    return None if alias is None else alias.base


def describe_weights(model_id: str) -> str | None:
    """Say of a quantised artefact what its losses are measured against; None for any other."""
    base = find_base(model_id)
    if base is None:
        return None
    return (
        f"The unmodified model is {name_model(model_id)}: {base} with quantised weights. Losses are measured against "
        "it, so they leave out what the quantisation costs."
    )


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


def _find_artefact(model_id: str) -> Alias | None:
    """Return the alias of the artefact with that id."""
    return next((alias for alias in _read_aliases().values() if alias.id == model_id), None)


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
