"""Sources: which artefact a ``--model`` means. Imports no torch and touches no network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lpsearch.errors import ModelError, shorten
from lpsearch.models.aliases import find_alias, suggest_aliases
from lpsearch.models.commits import find_commit

__all__ = ["ModelSource", "SourceKind", "check_model_directory", "normalise_id", "refuse_split_gguf", "resolve_source"]

SourceKind = Literal["hub", "directory", "gguf", "package"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PATH_PREFIXES = ("./", "../", "/", "~")

_GGUF_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_POINTER_START = b"version https://git-lfs.github.com/spec/"
_LONGEST_POINTER_BYTES = 1024
_MODEL_FILES = (".json", ".safetensors", ".gguf", ".model", ".txt", ".tiktoken", ".jinja", ".bin")


@dataclass(frozen=True)
class ModelSource:
    """One model artefact, as a study records it.

    Attributes:
        kind: where it comes from.
        id: hub id, name of the package, or absolute path without symbolic links.
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
        revision: commit, branch or tag of a hub repository, instead of the alias's own, the one recorded at its first
            use, or ``main``.

    Raises:
        ModelError: if it is none of these, a path does not exist or holds no model, or a revision is given for
            something that has none.
    """
    alias = find_alias(spec)
    if alias is not None:
        if alias.kind == "package" and revision not in (None, alias.revision):
            raise ModelError(
                f"{spec} is the package {alias.id} {alias.revision}; revision {revision!r} of it is not known, "
                "leave the revision out"
            )
        known = revision or alias.revision or find_commit(alias.id)
        return ModelSource(kind=alias.kind, id=alias.id, revision=known or "main")
    if _looks_like_path(spec):
        if revision is not None:
            raise ModelError(f"{spec} is a local path, which has no revision {revision!r}; leave it out")
        return _resolve_path(spec)
    if _HUB_ID.fullmatch(spec):
        return ModelSource(kind="hub", id=spec, revision=revision or "main")
    matches = suggest_aliases(spec)
    hint = f" (did you mean {' or '.join(matches)}?)" if matches else ""
    raise ModelError(
        f"unknown model {shorten(repr(spec), longest=200)}{hint}; give an alias (`lpsearch models` lists them), a hub "
        "id owner/name, a directory or a .gguf file"
    )


def _looks_like_path(spec: str) -> bool:
    """Say whether a specification must be a path, or is one that exists."""
    return spec.endswith(".gguf") or spec.startswith(_PATH_PREFIXES) or (spec != "" and _exists(Path(spec)))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long for the file system
        return False


def _resolve_path(spec: str) -> ModelSource:
    """Make the source of a local path.

    Raises:
        ModelError: if it does not exist, or is neither a model directory nor a ``.gguf`` file.
    """
    try:
        path = _resolve_links(Path(spec).expanduser())
        is_there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, ~ of an unknown user, a null character
        raise ModelError(f"{shorten(spec, longest=200)}: no such model directory or .gguf file: {error}") from None
    if not is_there:
        raise ModelError(f"{path}: no such model directory or .gguf file")
    if path.is_dir():
        check_model_directory(path)
        return ModelSource(kind="directory", id=str(path), path=path)
    if path.suffix != ".gguf":
        raise ModelError(f"{path}: a model is a directory with config.json, or a .gguf file")
    _refuse_pointer(path)
    refuse_split_gguf(path)
    return ModelSource(kind="gguf", id=str(path), path=path, gguf_file=path.name)


def normalise_id(model: str) -> str:
    """Return the id that a source has now, of one that was recorded before paths were resolved."""
    return str(_resolve_links(Path(model))) if Path(model).is_absolute() else model


def _resolve_links(path: Path) -> Path:
    """Return the one spelling of a path, without ``..`` and symbolic links; a link to a blob keeps its suffix."""
    resolved = path.resolve()
    return resolved if resolved.suffix == path.suffix else path.parent.resolve() / path.name


def check_model_directory(directory: Path) -> None:
    """Check that a directory holds one whole model, as far as its small files show.

    Raises:
        ModelError: if it has no ``config.json``, is an adapter, or a file of it is a git-lfs pointer.
    """
    if (directory / "adapter_config.json").is_file():
        raise ModelError(
            f"{directory}: it holds an adapter (adapter_config.json), which changes the weights of a model; merge it "
            "first, with PEFT's `merge_and_unload` and then `save_pretrained`, or take the adapter's files away"
        )
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"{directory}: a model directory holds config.json, this one does not{_hint_at_model(directory)}"
        )
    for file in sorted(directory.iterdir()):
        if file.suffix in _MODEL_FILES and file.is_file():
            _refuse_pointer(file)


def refuse_split_gguf(path: Path, num_parts: int | None = None) -> None:
    """Refuse one part of a GGUF file that was split.

    Args:
        path: the file.
        num_parts: number of parts as its metadata has it; None to go by its name.

    Raises:
        ModelError: naming the command that merges the parts.
    """
    named = _GGUF_PART.fullmatch(path.name)
    if num_parts is None:
        num_parts = int(named["count"]) if named else 1
    if num_parts <= 1:
        return
    first, merged = path.name, "MERGED.gguf"
    if named:
        first, merged = f"{named['stem']}-00001-of-{named['count']}.gguf", f"{named['stem']}.gguf"
    merge = f"llama-gguf-split --merge {path.with_name(first)} {path.with_name(merged)}"
    raise ModelError(
        f"{path}: it is one of {num_parts} parts of a split GGUF file; merge them with llama.cpp's `{merge}`, and give "
        "the merged file"
    )


def _refuse_pointer(file: Path) -> None:
    """Refuse a file that git-lfs has yet to fetch.

    Raises:
        ModelError: if it is such a pointer.
    """
    if file.stat().st_size > _LONGEST_POINTER_BYTES or not file.read_bytes().startswith(_POINTER_START):
        return
    raise ModelError(
        f"{file}: it is a git-lfs pointer to the file, not the file itself; run `git lfs pull` in {file.parent}, or "
        "download the file"
    )


def _hint_at_model(directory: Path) -> str:
    """Say what to do with a directory without ``config.json``, by what else it holds."""
    names = sorted(path.name for path in directory.iterdir())
    files = [name for name in names if name.endswith(".gguf")]
    if files:
        return f"; give its file {directory / files[0]} instead"
    inner = [name for name in names if (directory / name / "config.json").is_file()]
    if inner:
        return f"; give {directory / inner[-1]} instead"
    if any(name.endswith((".pth", ".pt")) or name.startswith("consolidated") for name in names):
        return "; it seems to be in its publisher's own form, give the model in that of transformers, e.g. from the hub"
    if any(name.endswith((".safetensors", ".bin")) for name in names):
        return "; copy it, and generation_config.json, from the model that these weights were made from"
    return ""
