"""The plan file: the JSON document of a plan, of the model it was made for and of what was measured.

Its published JSON Schema is the package file ``plan.schema.json``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, StrictFloat, StrictInt, ValidationError

from lpsearch.errors import PlanError, shorten
from lpsearch.json_file import describe_findings, load_json, shorten_value
from lpsearch.plan.groups import Plan
from lpsearch.plan.metadata import FileModel, ModelIdentity, PlanMetadata, PlanMetrics, Provenance

__all__ = [
    "PLAN_SCHEMA_VERSION",
    "RECOVERED_PLAN_NAME",
    "RECOVERED_WEIGHTS_NAME",
    "build_plan_document",
    "build_plan_schema",
    "find_recovered_weights",
    "load_plan",
    "parse_plan",
    "save_plan",
    "write_json",
]

PLAN_SCHEMA_VERSION = 2
"""Version of the plan file's form that is written; raised when a reader of the old form could misread the new one.

Version 1 has no ``dropped``, and is read for ever.
"""

MAX_LAYERS = 4096
"""Layers of a plan file at most; models have some hundred. What is done with a plan may take the square of them."""

_LONGEST_MESSAGE = 2000
"""Characters of what is wrong with the groups of a file."""

RECOVERED_PLAN_NAME = "plan.json"
"""Name of the plan file inside a directory that ``recover`` or ``export`` wrote."""

RECOVERED_WEIGHTS_NAME = "recovered.safetensors"
"""Name of the weights beside the plan file that ``recover`` wrote: those that differ from the unmodified model's."""


class DroppedBranches(FileModel):
    """Branches that a plan leaves out.

    Attributes:
        attention: layers without their attention.
        mlp: layers without their MLP.
    """

    attention: tuple[StrictInt, ...] = ()
    mlp: tuple[StrictInt, ...] = ()


class _PlanFile(FileModel):
    """The plan file; :func:`parse_plan` checks what a schema cannot say."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        title="lpsearch plan",
        json_schema_extra={"$schema": "https://json-schema.org/draft/2020-12/schema"},
    )

    schema_version: Literal[1, 2]
    model: ModelIdentity
    groups: tuple[tuple[StrictInt, ...], ...] = Field(min_length=1)
    dropped: DroppedBranches = DroppedBranches()
    depth: StrictFloat = Field(gt=0)
    depth_reduction: float = Field(ge=0, lt=1)
    metrics: PlanMetrics = PlanMetrics()
    provenance: Provenance = Provenance()


def build_plan_schema() -> dict[str, Any]:
    """Return the JSON Schema of the plan file; the checked-in ``plan.schema.json`` is this, and a test says so."""
    return _PlanFile.model_json_schema()


def parse_plan(document: Any, *, where: str = "plan") -> Plan:
    """Validate the content of a plan file.

    Args:
        document: the decoded JSON.
        where: name of its source, for messages.

    Raises:
        PlanError: for unknown or missing fields, another schema version, groups that are not an ordered partition, or
            a depth, depth reduction or layer count that contradicts the groups, or a plan that drops a branch.
    """
    if not isinstance(document, dict):
        raise PlanError(f"{where}: a plan file is one JSON object, got {type(document).__name__}")
    version = document.get("schema_version")
    if version not in (1, 2) or isinstance(version, bool):
        raise PlanError(
            f"{where}: schema_version is {shorten_value(version)}, this lpsearch reads 1 and 2; "
            "write the plan again with this version, or install the version that wrote it"
        )
    if version == 1 and "dropped" in document:
        raise PlanError(f"{where}: unknown field dropped in a plan of version 1; remove it, or set schema_version to 2")
    try:
        file = _PlanFile.model_validate(document)
    except ValidationError as error:
        raise PlanError(f"{where}: {describe_findings(error)}") from None
    num_named = sum(map(len, (*file.groups, file.dropped.attention, file.dropped.mlp)))
    if num_named > 3 * MAX_LAYERS:
        raise PlanError(f"{where}: its groups name {num_named} layers; a plan has {MAX_LAYERS} layers at most")
    metadata = PlanMetadata(model=file.model, metrics=file.metrics, provenance=file.provenance)
    try:
        plan = Plan.from_groups(file.groups, dropped=file.dropped.model_dump(), metadata=metadata)
    except PlanError as error:
        raise PlanError(f"{where}: {shorten(str(error), longest=_LONGEST_MESSAGE)}") from None
    if plan.num_layers != file.model.num_layers:
        raise PlanError(
            f"{where}: groups cover {plan.num_layers} layers but model.num_layers is {file.model.num_layers}; "
            "every layer of the model stands in exactly one group"
        )
    if plan.depth != file.depth:
        raise PlanError(
            f"{where}: depth is {file.depth} but {len(plan.groups)} groups have a depth of {plan.depth}; "
            f"set depth to {plan.depth}"
        )
    if abs(plan.depth_reduction - file.depth_reduction) > 1e-6:
        raise PlanError(
            f"{where}: depth_reduction is {file.depth_reduction} but 1 - depth / num_layers is "
            f"{plan.depth_reduction:.6f}; set it to that"
        )
    return plan


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan file, or the plan inside a directory that ``recover`` or ``export`` wrote.

    Args:
        path: the plan file, or a directory that holds ``plan.json``.

    Raises:
        PlanError: if there is no such file, it is not JSON, or it is not a valid plan.
    """
    file = Path(path)
    if file.is_dir():
        file = file / RECOVERED_PLAN_NAME
    try:
        document = load_json(file)
    except FileNotFoundError:
        raise PlanError(f"{file}: no such plan file; a study keeps its plans under OUT/plans/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{file}: cannot be read: {error}") from None
    except ValueError as error:
        raise PlanError(f"{file}: not JSON: {error}") from None
    return parse_plan(document, where=str(file))


def find_recovered_weights(plan: Plan, path: str | os.PathLike[str]) -> Path | None:
    """Return the repaired weights that belong to a plan file; None for a plan of the unmodified weights.

    Args:
        plan: what :func:`load_plan` read.
        path: where from.

    Raises:
        PlanError: if the plan was repaired and the weights are not beside it.
    """
    if plan.metadata is None or plan.metadata.provenance.recovery is None:
        return None
    file = Path(path)
    directory = file if file.is_dir() else file.parent
    weights = directory / RECOVERED_WEIGHTS_NAME
    if not weights.is_file():
        raise PlanError(
            f"{file}: the plan's weights were repaired ({plan.metadata.provenance.recovery.method}), and there is no "
            f"{RECOVERED_WEIGHTS_NAME} beside it; name the directory that `lpsearch recover` wrote"
        )
    return weights


def build_plan_document(plan: Plan) -> dict[str, Any]:
    """Return the content of the plan file.

    Raises:
        PlanError: for a plan without metadata, since a plan file names its model.
    """
    if plan.metadata is None:
        raise PlanError("a plan without metadata cannot be saved: a plan file names the model that it is for")
    document = {
        "schema_version": PLAN_SCHEMA_VERSION,
        "model": plan.metadata.model,
        "groups": plan.to_lists(),
        "dropped": plan.dropped,
        "depth": plan.depth,
        "depth_reduction": plan.depth_reduction,
        "metrics": plan.metadata.metrics,
        "provenance": plan.metadata.provenance,
    }
    # pydantic writes every number of layers as a float
    return _PlanFile.model_validate(document).model_dump(mode="json") | {"depth": plan.depth}


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a plan file whole or not at all: a temporary file beside it is renamed over it.

    Args:
        plan: a plan with metadata.
        path: the file to write; its directory exists.

    Raises:
        PlanError: for a plan without metadata.
        OSError: if the file cannot be written.
    """
    write_json(build_plan_document(plan), path)


def write_json(document: Any, path: str | os.PathLike[str]) -> None:
    """Write a JSON file whole or not at all.

    Raises:
        OSError: if the file cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump(document, stream, indent=2, allow_nan=False)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
