"""Sources: which artefact a ``--model`` means. Imports no torch and touches no network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lpsearch.errors import ModelError
from lpsearch.models.aliases import find_alias, suggest_aliases

__all__ = ["ModelSource", "SourceKind", "resolve_source"]

SourceKind = Literal["hub", "directory", "gguf", "package"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PATH_PREFIXES = ("./", "../", "/", "~")


@dataclass(frozen=True)
class ModelSource:
    """One model artefact, as a study records it.

    Attributes:
        kind: where it comes from.
        id: hub id, name of the package, or absolute path.
        revision: commit or branch on the hub, or version of the package; None for a local path.
        path: the directory or the ``.gguf`` file; None unless the artefact is local.
        gguf_file: name of the ``.gguf`` file within its directory; None unless ``kind`` is ``gguf``.
    """

    kind: SourceKind
    id: str
    revision: str | None = None
    path: Path | None = None
    gguf_file: str | None = None

    def to_dict(self) -> dict[str, str | None]:
        """Return the source as a JSON object."""
        return {**asdict(self), "path": None if self.path is None else str(self.path)}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> ModelSource:
        """Rebuild a source from what :meth:`to_dict` returned.

        Raises:
            ModelError: if a field is missing, unknown or of the wrong kind.
        """
        fields = dict(document)
        kind = fields.get("kind")
        if kind not in get_args(SourceKind):
            raise ModelError(f"model source has kind {kind!r}, expected one of {', '.join(get_args(SourceKind))}")
        path = fields.pop("path", None)
        try:
            return cls(path=None if path is None else Path(path), **fields)
        except TypeError as error:
            raise ModelError(f"model source {dict(document)!r} is malformed: {error}") from None


def resolve_source(spec: str, *, revision: str | None = None) -> ModelSource:
    """Find out which artefact a specification means, without any network.

    A specification is, in this order: an alias; a path, if it exists, ends in ``.gguf`` or begins with ``./``, ``../``,
    ``/`` or ``~``; a hub id ``owner/name``.

    Args:
        spec: what the user gave as ``--model``.
        revision: commit, branch or tag of a hub repository, instead of the alias's own or ``main``.

    Raises:
        ModelError: if it is none of these, a path does not exist or holds no model, or a revision is given for
            something that has none.
    """
    alias = find_alias(spec)
    if alias is not None:
        if alias.kind == "package" and revision not in (None, alias.revision):
            raise ModelError(
                f"--model {spec} is the package {alias.id} {alias.revision}; revision {revision!r} of it is not known, "
                "leave the revision out"
            )
        return ModelSource(kind=alias.kind, id=alias.id, revision=revision or alias.revision)
    if _looks_like_path(spec):
        if revision is not None:
            raise ModelError(f"--model {spec} is a local path, which has no revision {revision!r}; leave it out")
        return _resolve_path(spec)
    if _HUB_ID.fullmatch(spec):
        return ModelSource(kind="hub", id=spec, revision=revision or "main")
    matches = suggest_aliases(spec)
    hint = f" (did you mean {' or '.join(matches)}?)" if matches else ""
    raise ModelError(
        f"unknown model {spec!r}{hint}; give an alias (`lpsearch models` lists them), a hub id owner/name, a directory "
        "or a .gguf file"
    )


def _looks_like_path(spec: str) -> bool:
    """Say whether a specification must be a path, or is one that exists."""
    return spec.endswith(".gguf") or spec.startswith(_PATH_PREFIXES) or (spec != "" and Path(spec).exists())


def _resolve_path(spec: str) -> ModelSource:
    """Make the source of a local path.

    Raises:
        ModelError: if it does not exist, or is neither a model directory nor a ``.gguf`` file.
    """
    path = Path(spec).expanduser().absolute()
    if not path.exists():
        raise ModelError(f"{path}: no such model directory or .gguf file")
    if path.is_dir():
        if not (path / "config.json").is_file():
            held = sorted(path.glob("*.gguf"))
            hint = f"; give its file {held[0]} instead" if held else ""
            raise ModelError(f"{path}: a model directory holds config.json, this one does not{hint}")
        return ModelSource(kind="directory", id=str(path), path=path)
    if path.suffix != ".gguf":
        raise ModelError(f"{path}: a model is a directory with config.json, or a .gguf file")
    return ModelSource(kind="gguf", id=str(path), path=path, gguf_file=path.name)
