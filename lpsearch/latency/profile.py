"""Latency profiles: what was measured on a device, as a file that the searching machine reads.

This module imports no torch.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lpsearch.errors import ConfigError
from lpsearch.json_file import describe_first_finding, load_json, shorten_value
from lpsearch.models.traits import read_traits
from lpsearch.plan import Group, Plan, write_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "Engine",
    "LatencyProfile",
    "MeasuredPoint",
    "ProfileGeometry",
    "WorkloadProfile",
    "check_profile_geometry",
    "count_sums",
    "describe_estimate",
    "describe_profile_error",
    "load_profile",
    "parse_recorded_profile",
    "save_profile",
]

logger = logging.getLogger(__name__)

PROFILE_SCHEMA_VERSION = 2
"""Version of the profile file's form; raised when a reader of the old form could misread the new one."""

Engine = Literal["runtime", "transformers", "llama.cpp", "vllm"]
"""What runs a plan: this package's own runtime, or one of the engines that people serve with."""


LARGEST_QUIET_ERROR = 0.05
"""Mean error of a profile's estimates above which everything that uses them says so. Well-run GPUs stay below 0.002."""

_SHORTEST_MS, _LONGEST_MS = 1e-9, 1e12
"""Times that no step of any model takes."""

_TimeMs = Annotated[float, Field(gt=0)]
_CostMs = Annotated[float, Field(ge=0)]


class _FileModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ProfileGeometry(_FileModel):
    """The shape of a model as far as its speed depends on it; a profile holds for models of the same shape.

    Attributes:
        layer_kinds: for each layer what its time depends on: how far it attends, and whether its MLP is a mixture of
            experts, e.g. ``full``, ``sliding`` or ``full moe``.
        attention_windows: tokens that a kind of attention reaches back at most, e.g. ``{"sliding": 4096}``; a kind that
            is not named reaches all. Files that were written before this was noted name none.
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
    attention_windows: dict[str, Annotated[int, Field(gt=0)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_layer_kinds(self) -> Self:
        """Refuse a list that does not name the kind of every layer."""
        if len(self.layer_kinds) != self.num_layers:
            raise ValueError(f"layer_kinds names {len(self.layer_kinds)} layers, num_layers is {self.num_layers}")
        return self

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
            attention_windows={kind.name: kind.window for kind in traits.kinds if kind.window is not None},
        )

    def describe_group(self, group: Sequence[int]) -> str:
        """Name a group by what its time depends on: what it keeps.

        A group that keeps as many MLPs as attentions is named by layers, e.g. ``2 full`` or ``1 full + 1 sliding``: a
        pair with one of each is as fast as a single layer. Others are named by branches, e.g. ``1 full, 2 MLPs`` or
        ``no attention, 1 MLP``.

        Args:
            group: its layers; what a :class:`~lpsearch.plan.Group` drops does not count.
        """
        group = group if isinstance(group, Group) else Group.whole(group)
        if group.attention_layers == group.mlp_layers:
            return _join_counts([self.layer_kinds[layer_idx] for layer_idx in group.attention_layers])
        attentions = sorted(self._attention_kind(layer_idx) for layer_idx in group.attention_layers)
        mlps = sorted(self._mlp_suffix(layer_idx) for layer_idx in group.mlp_layers)
        is_alike = len(set(attentions)) == 1 or len(set(mlps)) == 1  # so that it is clear which go together
        if len(attentions) == len(mlps) and is_alike:
            return _join_counts([f"{kind}{suffix}" for kind, suffix in zip(attentions, mlps, strict=True)])
        named = [f"{count}{suffix} MLP{'s' if count > 1 else ''}" for suffix, count in sorted(Counter(mlps).items())]
        return f"{_join_counts(attentions) or 'no attention'}, {' + '.join(named) or 'no MLP'}"

    def describe_stages(self, group: Sequence[int]) -> tuple[str, ...]:
        """Name what a group runs one after the other, e.g. ``attention: 2 full`` and ``MLP: 2 dense``.

        Where a family's attention and MLP read the same input, they are timed one after the other too.

        Args:
            group: as in :meth:`describe_group`.
        """
        group = group if isinstance(group, Group) else Group.whole(group)
        attentions = _join_counts([self._attention_kind(layer_idx) for layer_idx in group.attention_layers])
        mlps = _join_counts([self._mlp_suffix(layer_idx).strip() or "dense" for layer_idx in group.mlp_layers])
        stages = (("attention", attentions), ("MLP", mlps))
        return tuple(f"{branch}: {members}" for branch, members in stages if members)

    def count_groups(self, groups: Iterable[Sequence[int]]) -> dict[str, int]:
        """Return the number of groups of each kind; a group of which nothing is left is of none."""
        return dict(Counter(kind for group in groups if (kind := self.describe_group(group))))

    def count_stages(self, groups: Iterable[Sequence[int]]) -> dict[str, int]:
        """Return the number of stages of each kind."""
        return dict(Counter(stage for group in groups for stage in self.describe_stages(group)))

    def count_cached_elements(self, plan: Plan, *, num_tokens: int) -> int | None:
        """Return the elements of the KV cache of one sequence under a plan, over all GPUs.

        Every attention that the plan keeps caches the tokens that it reaches.

        Args:
            plan: of the model.
            num_tokens: length of the sequence.

        Returns:
            None where the file does not say how far a kind of attention reaches.
        """
        held = 0
        for group in plan.groups:
            for layer_idx in group.attention_layers:
                kind = self._attention_kind(layer_idx)
                if kind != "full" and kind not in self.attention_windows:
                    return None
                held += min(num_tokens, self.attention_windows.get(kind, num_tokens))
        return held * 2 * self.num_key_value_heads * self.head_dim

    def _attention_kind(self, layer_idx: int) -> str:
        return self.layer_kinds[layer_idx].removesuffix(_EXPERTS)

    def _mlp_suffix(self, layer_idx: int) -> str:
        return _EXPERTS if self.layer_kinds[layer_idx].endswith(_EXPERTS) else ""


_EXPERTS = " moe"


def _join_counts(kinds: Sequence[str]) -> str:
    """Write how many there are of each kind, e.g. ``1 full + 1 sliding``; empty for none."""
    return " + ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))


def count_sums(kind: str) -> int:
    """Return the sums over ranks that a kind of group takes: one for its attentions, one for its MLPs, if any."""
    return 2 - kind.startswith("no attention,") - kind.endswith(", no MLP")


class MeasuredPoint(_FileModel):
    """Times of one depth, decode steps or prefills.

    Attributes:
        num_groups: number of groups of each kind, e.g. ``{"1 full": 18, "2 full": 7}``; see
            :meth:`ProfileGeometry.describe_group`.
        use: whether the costs were fitted to it, or only checked on it.
        median_ms: median over blocks.
        p10_ms: 10th percentile.
        p90_ms: 90th percentile.
        num_samples: blocks timed.
    """

    num_groups: dict[str, Annotated[int, Field(ge=0)]] = Field(min_length=1)
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
        cost_ms: fitted time of one group, by its kind; 0 where it is lost in the noise.
        check_error: largest relative error on points that were not fitted to; None without such a point.
        check_mean_error: their mean relative error.
        unmodified_ms: time of the unmodified model by how it is run: ``eager``, ``graph`` (captured) and ``compiled``
            (fused and captured, which the costs are of); on a CPU ``eager`` alone. Where fewer layers were built, the
            one that the costs are of, by these costs.
        achieved_gb_per_s: bytes that the unmodified model's step must read on one GPU over its time; None for prefill.
    """

    kind: Literal["decode", "prefill"] = "decode"
    batch_size: int = Field(gt=0)
    context_len: int = Field(ge=0)
    num_layers_measured: int = Field(gt=0)
    all_reduce: str = "none"
    all_reduce_us: dict[str, _CostMs] = Field(default_factory=dict)
    points: tuple[MeasuredPoint, ...] = Field(min_length=1)
    overhead_ms: float = Field(ge=0)
    cost_ms: dict[str, _CostMs] = Field(min_length=1)
    check_error: float | None = Field(default=None, ge=0)
    check_mean_error: float | None = Field(default=None, ge=0)
    unmodified_ms: dict[str, _TimeMs] = Field(default_factory=dict)
    achieved_gb_per_s: float | None = Field(default=None, gt=0)

    @property
    def mean_error(self) -> float | None:
        """Mean relative error of the estimates on points that were not fitted to; None where it is not known."""
        return self.check_error if self.check_mean_error is None else self.check_mean_error

    @property
    def speedup_margin(self) -> float:
        """By what share a speed-up may be off: how far estimates were off where checked, or else what timing blurs.

        Timing blurs a ratio of two medians by twice its standard error. That of a median is 1.253 times that of the
        mean (Kendall and Stuart, "The Advanced Theory of Statistics", 10.11), and 2.563 standard deviations lie between
        the percentiles 10 and 90 of a normal distribution.
        """
        spreads = [(point.p90_ms - point.p10_ms) / 2.563 / point.median_ms for point in self.points]
        errors = [
            1.253 * spread / math.sqrt(point.num_samples) for spread, point in zip(spreads, self.points, strict=True)
        ]
        return max(self.mean_error or 0.0, 2 * math.sqrt(2) * statistics.median(errors))


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
        engine: what was timed; files that were written before there were several do not say, and are of the runtime.
        runtime: how the engine executed the step.
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
    engine: Engine = "runtime"
    runtime: str
    workloads: tuple[WorkloadProfile, ...] = Field(min_length=1)
    created_at: str

    @property
    def largest_error(self) -> float:
        """Of the workloads' mean relative errors the largest; 0 where none is known."""
        return max(workload.mean_error or 0.0 for workload in self.workloads)

    @model_validator(mode="after")
    def _check_unmodified(self) -> Self:
        """Refuse costs by which the unmodified model takes no time, since every speed-up is relative to it."""
        kinds = {self.geometry.describe_group([layer_idx]) for layer_idx in range(self.geometry.num_layers)}
        for index, workload in enumerate(self.workloads):
            missing = sorted(kinds - {*workload.cost_ms})
            if missing:
                raise ValueError(f"workloads.{index}.cost_ms has no cost of {missing[0]!r}, a layer of the model alone")
            total_ms = workload.overhead_ms + sum(workload.cost_ms[kind] for kind in kinds)
            if total_ms <= 0:
                raise ValueError(f"workloads.{index}: by its costs the unmodified model takes no time")
            slowest_ms = workload.overhead_ms + self.geometry.num_layers * max(workload.cost_ms.values())
            if not _SHORTEST_MS < total_ms <= slowest_ms < _LONGEST_MS:  # so that no ratio of times overflows
                raise ValueError(f"workloads.{index}: by its costs a step takes {total_ms} to {slowest_ms} ms")
        return self


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
            f"--latency {file}: schema_version is {shorten_value(version)}, this lpsearch reads "
            f"{PROFILE_SCHEMA_VERSION}; measure again with this version"
        )
    try:
        return LatencyProfile.model_validate(document)
    except ValidationError as error:
        raise ConfigError(
            f"--latency {file}: not a latency profile: {describe_first_finding(error)}; measure again"
        ) from None


def describe_profile_error(mean_error: float | None, *, name: str) -> str | None:
    """Say that a profile's estimates are far off; None where they are not, or where nobody knows.

    Args:
        mean_error: mean relative error of the estimates on depths that they were not fitted to.
        name: of the profile, or of what its estimates stand in.
    """
    if mean_error is None or mean_error <= LARGEST_QUIET_ERROR:
        return None
    return (
        f"{name}: estimates of latency were {mean_error:.0%} off on depths that they were not fitted to, so a speed-up "
        "may be as far off; measure again where nothing else runs and for longer (`lpsearch profile --seconds`)"
    )


def describe_estimate(mean_error: float | None) -> str:
    """Say beside a time or a speed-up that it is estimated, and how far off that may be where it is far off."""
    is_quiet = mean_error is None or mean_error <= LARGEST_QUIET_ERROR
    return "estimated" if is_quiet else f"estimated, {mean_error:.0%} off where it was checked"


def parse_recorded_profile(document: Mapping[str, Any] | None) -> LatencyProfile | None:
    """Read the profile that a study keeps; None, with a warning, if another version wrote it or it is damaged."""
    if document is None:
        return None
    try:
        return LatencyProfile.model_validate(document)
    except ValidationError as error:
        logger.warning(
            "the study's latency profile is damaged or of another version, and is left aside: %s",
            describe_first_finding(error),
        )
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
    if not found["attention_windows"]:  # of an older file
        del found["attention_windows"]
    different = [name for name in found if found[name] != expected[name]]
    if len(different) > 1 and "layer_kinds" in different and "num_layers" in different:
        different.remove("layer_kinds")  # the number says it
    if different:
        differences = [f"{name} {found[name]} (the model: {expected[name]})" for name in different]
        raise ConfigError(
            f"the latency profile is of another geometry: {', '.join(differences)}; measure this model, or drop "
            "--latency to measure here"
        )
