"""Latency profiles: what was measured on a device, as a file that the searching machine reads.

This module imports no torch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lpsearch.errors import ConfigError
from lpsearch.plan import write_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "LatencyProfile",
    "MeasuredPoint",
    "ProfileGeometry",
    "check_profile_geometry",
    "load_profile",
    "save_profile",
]

PROFILE_SCHEMA_VERSION = 1
"""Version of the profile file's form; raised when a reader of the old form could misread the new one."""


class _FileModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ProfileGeometry(_FileModel):
    """The shape of a model as far as its speed depends on it; a profile holds for models of the same shape."""

    model_type: str
    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    vocab_size: int = Field(gt=0)

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> ProfileGeometry:
        """Read the shape from a transformers configuration."""
        config = config.get_text_config()
        num_heads = config.num_attention_heads
        return cls(
            model_type=config.model_type,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=num_heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or num_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
            vocab_size=config.vocab_size,
        )


class MeasuredPoint(_FileModel):
    """Decode steps of one depth.

    Attributes:
        num_groups: number of groups of each size.
        use: whether the costs were fitted to it, or only checked on it.
        median_ms: median time of a step.
        p10_ms: 10th percentile.
        p90_ms: 90th percentile.
        num_samples: steps timed.
    """

    num_groups: dict[int, int]
    use: Literal["fit", "check"]
    median_ms: float = Field(gt=0)
    p10_ms: float = Field(gt=0)
    p90_ms: float = Field(gt=0)
    num_samples: int = Field(gt=0)


class LatencyProfile(_FileModel):
    """Measured decode times of a model's shape on a device, and the additive costs fitted to them.

    Attributes:
        schema_version: version of this form.
        device: name of the device, e.g. ``NVIDIA H100 80GB HBM3``.
        num_threads: CPU threads of the run.
        dtype: dtype of weights and cache, e.g. ``bfloat16``.
        versions: package versions.
        geometry: shape of the model.
        num_layers_measured: layers that were built; fewer than the model's where memory was short.
        batch_size: sequences decoded together.
        context_len: cached tokens of each sequence.
        runtime: what executed the step.
        points: the measurements.
        overhead_ms: fitted time of embedding, head and everything else that no layer causes.
        cost_ms: fitted time of one group, by its number of layers.
        check_error: largest relative error on points that were not fitted to; None without such a point.
        created_at: ISO 8601 time, UTC.
    """

    schema_version: Literal[1] = 1
    device: str
    num_threads: int = Field(gt=0)
    dtype: str
    versions: dict[str, str]
    geometry: ProfileGeometry
    num_layers_measured: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    context_len: int = Field(ge=0)
    runtime: str
    points: tuple[MeasuredPoint, ...] = Field(min_length=1)
    overhead_ms: float = Field(ge=0)
    cost_ms: dict[int, float] = Field(min_length=1)
    check_error: float | None = Field(default=None, ge=0)
    created_at: str


def load_profile(path: str | os.PathLike[str]) -> LatencyProfile:
    """Read a profile file.

    Raises:
        ConfigError: if there is no such file, or it is not a profile of this version.
    """
    file = Path(path)
    try:
        document: Any = json.loads(file.read_text(encoding="utf-8"))
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
    differences = [
        f"{name} {found[name]} (the model: {expected[name]})" for name in found if found[name] != expected[name]
    ]
    if differences:
        raise ConfigError(
            f"the latency profile is of another geometry: {', '.join(differences)}; measure this model, or drop "
            "--latency to measure here"
        )
