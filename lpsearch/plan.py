"""Plans: which consecutive layers of a model run in parallel, and the plan file that carries one.

A plan partitions the layers of a decoder into *groups* of consecutive layers, every layer once and in order. *Join i*
means that layers i and i + 1 are in the same group, so a plan is equally a set of joins. The plan file is the JSON
document of the plan, of the model it was made for and of what was measured; its published JSON Schema is the package
file ``plan.schema.json``.

This module imports neither torch nor optuna.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from lpsearch.errors import PlanError

__all__ = [
    "PLAN_SCHEMA_VERSION",
    "LatencyMetrics",
    "ModelIdentity",
    "Plan",
    "PlanMetadata",
    "PlanMetrics",
    "Provenance",
    "ProxyMetrics",
    "build_plan_schema",
    "load_plan",
    "parse_plan",
    "save_plan",
]

PLAN_SCHEMA_VERSION = 1
"""Version of the plan file's form; raised when a reader of the old form could misread the new one."""

RECOVERED_PLAN_NAME = "plan.json"
"""Name of the plan file inside a directory that ``recover`` or ``export`` wrote."""


class _FileModel(BaseModel):
    """Base of everything that comes in from a file: immutable, and unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelIdentity(_FileModel):
    """The model that a plan is for.

    Attributes:
        id: hub id, path or package of the artefact, e.g. ``meta-llama/Llama-2-7b-hf``.
        revision: commit or version of the artefact; None for a local path.
        num_layers: number of decoder layers.
        fingerprint: ``<geometry>-<weights>``, see :func:`lpsearch.models.fingerprint_model`.
    """

    id: str
    revision: str | None = None
    num_layers: int = Field(gt=0)
    fingerprint: str


class ProxyMetrics(_FileModel):
    """Loss of a plan over fixed windows, paired with the unmodified model on the same windows.

    Attributes:
        nll: mean negative log-likelihood in nats per token.
        delta_nll: ``nll`` minus the unmodified model's, in nats per token.
        delta_nll_se: standard error of ``delta_nll`` over windows, in nats per token; None for one window.
        perplexity: ``exp(nll)``.
        kl_nats_per_token: mean KL(base || plan) over the vocabulary; None unless it was measured.
        data: the data specification, e.g. ``wikitext2:validation``.
        windows: number of windows.
        seq_len: tokens in a window.
        num_tokens: tokens whose loss was counted.
        dtype: dtype of the weights, e.g. ``bfloat16``.
        device: device that ran it, e.g. ``cpu`` or ``NVIDIA H100 80GB HBM3``.
    """

    nll: float
    delta_nll: float
    delta_nll_se: float | None
    perplexity: float
    kl_nats_per_token: float | None = None
    data: str
    windows: int = Field(gt=0)
    seq_len: int = Field(gt=1)
    num_tokens: int = Field(gt=0)
    dtype: str
    device: str


class LatencyMetrics(_FileModel):
    """Time of one decode step of a plan, and how it is known.

    Attributes:
        kind: ``measured`` on this very plan, or ``estimated`` by the fitted latency model.
        latency_ms: TPOT in milliseconds.
        baseline_latency_ms: TPOT of the unmodified model under the same runtime.
        speedup: ``baseline_latency_ms / latency_ms``.
        batch_size: sequences decoded together.
        context_len: cached tokens of each sequence.
        dtype: dtype of the weights.
        device: device that was measured.
        runtime: what executed the step, e.g. ``transformers eager, fused layers``.
        versions: package versions at the measurement.
    """

    kind: Literal["measured", "estimated"]
    latency_ms: float = Field(gt=0)
    baseline_latency_ms: float = Field(gt=0)
    speedup: float = Field(gt=0)
    batch_size: int = Field(gt=0)
    context_len: int = Field(ge=0)
    dtype: str
    device: str
    runtime: str
    versions: dict[str, str]


class PlanMetrics(_FileModel):
    """What was measured for a plan; None where nothing was."""

    proxy: ProxyMetrics | None = None
    heldout: ProxyMetrics | None = None
    latency: LatencyMetrics | None = None


class Provenance(_FileModel):
    """Where a plan comes from.

    Attributes:
        study: name of the Optuna study.
        trial: number of the trial within it.
        seed: seed of the study.
        versions: package versions that produced it.
        created_at: ISO 8601 time, UTC.
    """

    study: str | None = None
    trial: int | None = None
    seed: int | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    created_at: str | None = None


class PlanMetadata(_FileModel):
    """Everything in a plan file besides the groups."""

    model: ModelIdentity
    metrics: PlanMetrics = PlanMetrics()
    provenance: Provenance = Provenance()


@dataclass(frozen=True)
class Plan:
    """An ordered partition of a model's layers into groups that run in parallel.

    Two plans are equal when their groups are; metadata does not count. Build one with :meth:`from_groups` or
    :meth:`from_joins`, which validate; the bare constructor validates too.

    Attributes:
        groups: every layer once, in order, e.g. ``((0,), (1, 2), (3,))``.
        metadata: the model it is for and what was measured; None for a plan made by hand.
    """

    groups: tuple[tuple[int, ...], ...]
    metadata: PlanMetadata | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse anything but an ordered partition of ``range(num_layers)``.

        Raises:
            PlanError: naming the first layer that is out of place.
        """
        _check_groups(self.groups)

    @classmethod
    def from_groups(cls, groups: Iterable[Iterable[int]], *, metadata: PlanMetadata | None = None) -> Plan:
        """Build a plan from its groups.

        Args:
            groups: every layer once, in order, e.g. ``[[0], [1, 2], [3]]``.
            metadata: the model it is for and what was measured.

        Raises:
            PlanError: on overlaps, gaps, wrong order, empty groups or anything that is not a layer number.
        """
        try:
            frozen = tuple(tuple(group) for group in groups)
        except TypeError as error:
            raise PlanError(
                f"groups must be a list of lists of layer numbers, e.g. [[0], [1, 2], [3]]: {error}"
            ) from None
        return cls(frozen, metadata)

    @classmethod
    def from_joins(cls, num_layers: int, joins: Iterable[int]) -> Plan:
        """Build a plan from its joins.

        Args:
            num_layers: number of decoder layers.
            joins: layer numbers i such that layers i and i + 1 share a group, in any order.

        Raises:
            PlanError: for fewer than one layer or a join outside ``[0, num_layers - 1)``.
        """
        if num_layers < 1:
            raise PlanError(f"a plan needs at least one layer, got num_layers = {num_layers}")
        joined = set(joins)
        for join in sorted(joined):
            if not 0 <= join < num_layers - 1:
                raise PlanError(f"join {join} is outside [0, {num_layers - 1}): a join i ties layers i and i + 1")
        groups: list[list[int]] = [[0]]
        for layer_idx in range(1, num_layers):
            if layer_idx - 1 in joined:
                groups[-1].append(layer_idx)
            else:
                groups.append([layer_idx])
        return cls(tuple(tuple(group) for group in groups))

    @classmethod
    def baseline(cls, num_layers: int) -> Plan:
        """Build the plan that changes nothing: every layer alone."""
        return cls.from_joins(num_layers, ())

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.groups[-1][-1] + 1

    @property
    def depth(self) -> int:
        """Number of groups: the sequential steps that remain."""
        return len(self.groups)

    @property
    def depth_reduction(self) -> float:
        """Share of the depth that the plan removes: ``1 - depth / num_layers``."""
        return 1 - self.depth / self.num_layers

    @cached_property
    def joins(self) -> tuple[int, ...]:
        """Every i whose layers i and i + 1 share a group, ascending."""
        return tuple(layer_idx for group in self.groups for layer_idx in group[:-1])

    @property
    def num_joins(self) -> int:
        """Number of joins: ``num_layers - depth``."""
        return self.num_layers - self.depth

    @property
    def max_group(self) -> int:
        """Layers in the largest group."""
        return max(len(group) for group in self.groups)

    def to_groups_json(self) -> str:
        """Return the groups as one compact JSON string, e.g. ``[[0],[1,2],[3]]``: the key of a plan in a study."""
        return json.dumps(self.groups, separators=(",", ":"))

    def to_file_dict(self) -> dict[str, Any]:
        """Return the content of the plan file.

        Raises:
            PlanError: for a plan without metadata, since a plan file names its model.
        """
        if self.metadata is None:
            raise PlanError("a plan without metadata cannot be saved: a plan file names the model that it is for")
        document = {
            "schema_version": PLAN_SCHEMA_VERSION,
            "model": self.metadata.model,
            "groups": self.groups,
            "depth": self.depth,
            "depth_reduction": self.depth_reduction,
            "metrics": self.metadata.metrics,
            "provenance": self.metadata.provenance,
        }
        return _PlanFile.model_validate(document).model_dump(mode="json")


class _PlanFile(_FileModel):
    """The plan file; :func:`parse_plan` checks what a schema cannot say."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        title="lpsearch plan",
        json_schema_extra={"$schema": "https://json-schema.org/draft/2020-12/schema"},
    )

    schema_version: Literal[1]
    model: ModelIdentity
    groups: tuple[tuple[StrictInt, ...], ...] = Field(min_length=1)
    depth: StrictInt = Field(gt=0)
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
            a depth, depth reduction or layer count that contradicts the groups.
    """
    if not isinstance(document, dict):
        raise PlanError(f"{where}: a plan file is one JSON object, got {type(document).__name__}")
    version = document.get("schema_version")
    if version != PLAN_SCHEMA_VERSION:
        raise PlanError(
            f"{where}: schema_version is {version!r}, this lpsearch reads {PLAN_SCHEMA_VERSION}; "
            "write the plan again with this version, or install the version that wrote it"
        )
    try:
        file = _PlanFile.model_validate(document)
    except ValidationError as error:
        raise PlanError(f"{where}: {_describe(error)}") from None
    metadata = PlanMetadata(model=file.model, metrics=file.metrics, provenance=file.provenance)
    try:
        plan = Plan(file.groups, metadata)
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from None
    if plan.num_layers != file.model.num_layers:
        raise PlanError(
            f"{where}: groups cover {plan.num_layers} layers but model.num_layers is {file.model.num_layers}; "
            "every layer of the model stands in exactly one group"
        )
    if plan.depth != file.depth:
        raise PlanError(f"{where}: depth is {file.depth} but there are {plan.depth} groups; set depth to {plan.depth}")
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
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(f"{file}: no such plan file; a study keeps its plans under OUT/plans/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{file}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise PlanError(f"{file}: not JSON: {error}") from None
    return parse_plan(document, where=str(file))


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a plan file whole or not at all: a temporary file beside it is renamed over it.

    Args:
        plan: a plan with metadata.
        path: the file to write; its directory exists.

    Raises:
        PlanError: for a plan without metadata.
        OSError: if the file cannot be written.
    """
    write_json(plan.to_file_dict(), path)


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


def _check_groups(groups: Sequence[Sequence[int]]) -> None:
    """Refuse groups that are not an ordered partition of the layers, naming the first one out of place."""
    if not groups:
        raise PlanError("groups is empty; list every layer once, e.g. [[0], [1, 2], [3]]")
    expected = 0
    group_of: dict[int, Sequence[int]] = {}
    for group in groups:
        if not group:
            raise PlanError(f"an empty group stands before layer {expected}; remove it")
        for layer_idx in group:
            if isinstance(layer_idx, bool) or not isinstance(layer_idx, int):
                raise PlanError(f"group {list(group)} holds {layer_idx!r}; layers are whole numbers from 0")
            if layer_idx in group_of:
                raise PlanError(
                    f"layer {layer_idx} is in groups {list(group_of[layer_idx])} and {list(group)}; "
                    "each layer appears once"
                )
            if layer_idx != expected:
                raise PlanError(
                    f"layer {layer_idx} in group {list(group)} stands where layer {expected} belongs; "
                    "list every layer from 0 once, in order, without gaps"
                )
            group_of[layer_idx] = group
            expected += 1


def _describe(error: ValidationError) -> str:
    """Put pydantic's findings into one line: where, what was found, what was expected."""
    findings = []
    for item in error.errors(include_url=False):
        place = ".".join(str(part) for part in item["loc"]) or "document"
        if item["type"] == "extra_forbidden":
            findings.append(f"unknown field {place}; remove it")
        elif item["type"] == "missing":
            findings.append(f"field {place} is missing; add it")
        else:
            findings.append(f"field {place}: {item['msg']}, got {item['input']!r}")
    return "; ".join(findings)
