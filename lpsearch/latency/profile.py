"""Latency profiles: what was measured on a device, as a file that the searching machine reads.

This module imports no torch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lpsearch.errors import ConfigError
from lpsearch.json_file import load_json
from lpsearch.models.traits import read_traits
from lpsearch.plan import write_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "LatencyProfile",
    "MeasuredPoint",
    "ProfileGeometry",
    "WorkloadProfile",
    "check_profile_geometry",
    "load_profile",
    "parse_recorded_profile",
    "save_profile",
]

logger = logging.getLogger(__name__)

PROFILE_SCHEMA_VERSION = 2
"""Version of the profile file's form; raised when a reader of the old form could misread the new one."""


class _FileModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ProfileGeometry(_FileModel):
    """The shape of a model as far as its speed depends on it; a profile holds for models of the same shape.

    Attributes:
        layer_kinds: for each layer what its time depends on: how far it attends, and whether its MLP is a mixture of
            experts, e.g. ``full``, ``sliding`` or ``full moe``.
    """

    model_type: str
    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    layer_kinds: tuple[str, ...]

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> ProfileGeometry:
        """Read the shape from a transformers configuration."""
        traits = read_traits(config)
        return cls(
            model_type=traits.config.model_type,
            num_layers=traits.num_layers,
            hidden_size=traits.hidden_size,
            intermediate_size=traits.intermediate_size,
            num_attention_heads=traits.num_heads,
            num_key_value_heads=traits.num_kv_heads,
            head_dim=traits.head_dim,
            vocab_size=traits.vocab_size,
            layer_kinds=tuple(
                f"{kind.name} moe" if has_experts else kind.name
                for kind, has_experts in zip(traits.kinds, traits.has_experts, strict=True)
            ),
        )

    def describe_group(self, group: Sequence[int]) -> str:
        """Name a group by what its time depends on, e.g. ``2 full`` or ``1 full + 1 sliding``."""
        kinds = [self.layer_kinds[layer_idx] for layer_idx in group]
        return " + ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))


class MeasuredPoint(_FileModel):
    """Times of one depth, decode steps or prefills.

    Attributes:
        num_groups: number of groups of each kind, e.g. ``{"1 full": 18, "2 full": 7}``.
        use: whether the costs were fitted to it, or only checked on it.
        median_ms: median over blocks.
        p10_ms: 10th percentile.
        p90_ms: 90th percentile.
        num_samples: blocks timed.
    """

    num_groups: dict[str, int]
    use: Literal["fit", "check"]
    median_ms: float = Field(gt=0)
    p10_ms: float = Field(gt=0)
    p90_ms: float = Field(gt=0)
    num_samples: int = Field(gt=0)


class WorkloadProfile(_FileModel):
    """One workload's measurements and the additive costs fitted to them.

    Attributes:
        kind: ``decode``: one step of every sequence (TPOT); ``prefill``: whole prompts (TTFT).
        batch_size: sequences together.
        context_len: cached tokens of each sequence, or the tokens of its prompt.
        num_layers_measured: layers that were built; fewer than the model's where memory was short.
        all_reduce: how sums over ranks were made, ``none`` on one.
        all_reduce_us: time of one sum, of each kind that was tried.
        points: the measurements.
        overhead_ms: fitted time of embedding, head and everything else that no layer causes.
        cost_ms: fitted time of one group, by its kind.
        check_error: largest relative error on points that were not fitted to; None without such a point.
        check_mean_error: their mean relative error.
        unmodified_ms: time of the unmodified model by how it is run: ``eager``, ``graph`` (captured) and ``compiled``
            (fused and captured, which the costs are of); on a CPU ``eager`` alone.
        achieved_gb_per_s: bytes that the unmodified model's step must read on one GPU over its time; None for prefill.
    """

    kind: Literal["decode", "prefill"] = "decode"
    batch_size: int = Field(gt=0)
    context_len: int = Field(ge=0)
    num_layers_measured: int = Field(gt=0)
    all_reduce: str = "none"
    all_reduce_us: dict[str, float] = Field(default_factory=dict)
    points: tuple[MeasuredPoint, ...] = Field(min_length=1)
    overhead_ms: float = Field(ge=0)
    cost_ms: dict[str, float] = Field(min_length=1)
    check_error: float | None = Field(default=None, ge=0)
    check_mean_error: float | None = Field(default=None, ge=0)
    unmodified_ms: dict[str, float] = Field(default_factory=dict)
    achieved_gb_per_s: float | None = Field(default=None, gt=0)


class LatencyProfile(_FileModel):
    """Measured times of a model's shape on a device, and the additive costs fitted to them.

    Attributes:
        schema_version: version of this form.
        device: name of the device, e.g. ``NVIDIA H100 80GB HBM3``.
        num_ranks: GPUs that share the model.
        emulated: whether one GPU stood for all of them, and the sums' time was added: an estimate.
        num_threads: CPU threads of the run.
        dtype: dtype of weights and cache, e.g. ``bfloat16``.
        versions: package versions.
        geometry: shape of the model.
        runtime: what executed the step.
        workloads: what was measured; a search uses the first.
        created_at: ISO 8601 time, UTC.
    """

    schema_version: Literal[2] = 2
    device: str
    num_ranks: int = Field(default=1, gt=0)
    emulated: bool = False
    num_threads: int = Field(gt=0)
    dtype: str
    versions: dict[str, str]
    geometry: ProfileGeometry
    runtime: str
    workloads: tuple[WorkloadProfile, ...] = Field(min_length=1)
    created_at: str


def load_profile(path: str | os.PathLike[str]) -> LatencyProfile:
    """Read a profile file.

    Raises:
        ConfigError: if there is no such file, or it is not a profile of this version.
    """
    file = Path(path)
    try:
        document: Any = load_json(file)
    except FileNotFoundError:
        raise ConfigError(
            f"--latency {file}: no such file; give auto, off or a profile that was saved before"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--latency {file}: not a readable JSON file: {error}") from None
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != PROFILE_SCHEMA_VERSION:
        raise ConfigError(
            f"--latency {file}: schema_version is {version!r}, this lpsearch reads {PROFILE_SCHEMA_VERSION}; "
            "measure again with this version"
        )
    try:
        return LatencyProfile.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"--latency {file}: not a latency profile: {place}: {first['msg']}; measure again") from None


def parse_recorded_profile(document: Mapping[str, Any] | None) -> LatencyProfile | None:
    """Read the profile that a study keeps; None, with a warning, if another version wrote it."""
    if document is None:
        return None
    try:
        return LatencyProfile.model_validate(document)
    except ValidationError:
        logger.warning("the study's latency profile is of another version and is left aside")
        return None


def save_profile(profile: LatencyProfile, path: str | os.PathLike[str]) -> None:
    """Write a profile file whole or not at all.

    Raises:
        OSError: if the file cannot be written.
    """
    write_json(profile.model_dump(mode="json"), path)


def check_profile_geometry(profile: LatencyProfile, config: PretrainedConfig) -> None:
    """Refuse a profile of a model of another shape.

    Args:
        profile: the profile.
        config: configuration of the model that it is to be used for.

    Raises:
        ConfigError: naming every difference.
    """
    found = profile.geometry.model_dump()
    expected = ProfileGeometry.from_config(config).model_dump()
    different = [name for name in found if found[name] != expected[name]]
    if len(different) > 1 and "layer_kinds" in different and "num_layers" in different:
        different.remove("layer_kinds")  # the number says it
    if different:
        differences = [f"{name} {found[name]} (the model: {expected[name]})" for name in different]
        raise ConfigError(
            f"the latency profile is of another geometry: {', '.join(differences)}; measure this model, or drop "
            "--latency to measure here"
        )
