"""Measuring a model's shape at a few depths, and fitting what each kind of group costs.

TPOT(b, c) is the time of one decode step of b sequences with c cached tokens, embedding to argmax; TTFT(b, p) that of a
prefill of p tokens with the last token's logits. All depths run interleaved in one process.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch

from lpsearch.errors import LpsearchError
from lpsearch.latency.allow import DROPS, JOINS
from lpsearch.latency.depths import Depth, choose_depths, find_group_kinds
from lpsearch.latency.engines import build_engine_steps, check_engine, read_engine_versions
from lpsearch.latency.fallback import TransformersSteps
from lpsearch.latency.model import GroupCosts, fit_group_costs
from lpsearch.latency.profile import Engine, LatencyProfile, MeasuredPoint, ProfileGeometry, WorkloadProfile
from lpsearch.latency.runtime.steps import RuntimeSteps
from lpsearch.latency.sums import OneRank, Ranks
from lpsearch.latency.timing import MIN_BLOCKS, StepTiming, measure_interleaved
from lpsearch.latency.workload import StepBuilder, Workload, check_workloads, limit_context
from lpsearch.models.traits import read_traits
from lpsearch.plan import Group, Plan
from lpsearch.versions import read_versions

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["measure_profile", "name_device"]

logger = logging.getLogger(__name__)

_MEMORY_SHARE = 0.8
_MAX_CPU_BYTES = 4 << 30  # beyond, a step on a CPU takes seconds; the costs a layer are the same with fewer layers
_UNMODIFIED_SHARE = 0.3  # of the time goes to the other ways of running the unmodified model
_MIN_CPU_BLOCKS = 3
_MIN_UNMODIFIED_BLOCKS = 10


def measure_profile(
    config: PretrainedConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    engine: Engine = "runtime",
    workloads: Sequence[Workload] | None = None,
    batch_size: int = 1,
    context_len: int = 1024,
    max_group: int = 2,
    budget_s: float = 15.0,
    allow: Collection[str] = JOINS,
    usable_bytes: int | None = None,
    choose_ranks: Callable[[int], tuple[Ranks, Mapping[str, float]]] | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> LatencyProfile:
    """Measure a model's shape with groups fused into wide layers, and fit the cost of each kind of group.

    Weights are random and need no download. A family that the runtime does not compute is measured by transformers'
    own eager execution, decode steps only, and ``runtime`` says so; other engines refuse such families. Where memory is
    short we build fewer layers; the model is additive, so the costs carry over to all of them.

    Args:
        config: the model's configuration.
        device: device to measure.
        dtype: dtype of weights and cache.
        engine: what to measure.
        workloads: what to measure; None for decoding ``batch_size`` sequences with ``context_len`` tokens.
        batch_size: sequences decoded together.
        context_len: cached tokens of each, or as many as the model reads if these are fewer.
        max_group: largest group to measure.
        budget_s: about how long the timed part of each workload takes.
        allow: what plans may do, as in :data:`lpsearch.config.Allowed`: which kinds of group are measured.
        usable_bytes: memory to use on each rank; None for most of what is free.
        choose_ranks: given the elements of a step's sums, returns the ranks that share the model and the time in us of
            one sum of each kind that was tried; None for one rank. Every rank calls this function alike.
        on_progress: called with the share done.

    Raises:
        FamilyError: if transformers cannot build the model from its configuration, or for prompts of a family that the
            runtime does not compute, or for a family that another engine does not run.
        ConfigError: if the ranks do not divide the model, for more tokens than it reads, or for what another engine
            cannot time (:func:`lpsearch.latency.engines.check_engine`).
        LpsearchError: if not even a few layers fit into memory.
    """
    device = torch.device(device)
    traits = read_traits(config)
    geometry = ProfileGeometry.from_config(config)
    workloads = workloads or [Workload("decode", batch_size, limit_context(config, context_len))]
    check_workloads(config, workloads)
    if engine != "runtime":
        check_engine(engine, traits, device=device, workloads=workloads)
    measured = []
    for index, workload in enumerate(workloads):

        def report(share: float, done: int = index) -> None:
            if on_progress is not None:
                on_progress((done + share) / len(workloads))

        builder: StepBuilder
        sum_us: Mapping[str, float] = {}
        if engine != "runtime":
            builder = build_engine_steps(engine, traits, workload, device=device, dtype=dtype)
        elif traits.runtime_obstacle is None or workload.kind == "prefill":
            ranks: Ranks = OneRank()
            if choose_ranks is not None:
                ranks, sum_us = choose_ranks(workload.batch_size * traits.hidden_size)
            builder = RuntimeSteps(traits, workload, device=device, dtype=dtype, ranks=ranks)
        else:
            builder = TransformersSteps(traits, workload, device=device, dtype=dtype)
        try:
            measured.append(
                _measure_workload(
                    builder,
                    geometry,
                    workload,
                    device=device,
                    dtype=dtype,
                    max_group=min(max_group, geometry.num_layers),
                    budget_s=budget_s,
                    allow=allow,
                    usable_bytes=usable_bytes,
                    all_reduce_us=sum_us,
                    on_progress=report,
                )
            )
        finally:
            builder.close()
    profile = LatencyProfile(
        device=name_device(device),
        num_ranks=builder.ranks.num_ranks,
        num_threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        versions=read_versions() | read_engine_versions(engine),
        geometry=geometry,
        engine=engine,
        runtime=builder.runtime,
        workloads=tuple(measured),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    _log_profile(profile)
    return profile


@torch.inference_mode()
def _measure_workload(
    builder: StepBuilder,
    geometry: ProfileGeometry,
    workload: Workload,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_group: int,
    budget_s: float,
    allow: Collection[str],
    usable_bytes: int | None,
    all_reduce_us: Mapping[str, float],
    on_progress: Callable[[float], None],
) -> WorkloadProfile:
    """Measure one workload at a few depths and fit it."""
    options: dict[str, Any] = {"max_group": max_group if builder.fuses else 1, "allow": allow}
    if usable_bytes is None:
        num_models = (
            1 if builder.shares_memory else len(choose_depths(geometry, num_layers=geometry.num_layers, **options))
        )
        usable_bytes = _find_usable_bytes(device, num_models)
    num_layers = _count_fitting_layers(
        builder, geometry, workload, dtype=dtype, usable_bytes=usable_bytes, least=2 * max_group
    )
    if num_layers < geometry.num_layers:
        logger.warning("latency is measured on %d of %d layers, which fit", num_layers, geometry.num_layers)
    depths = choose_depths(geometry, num_layers=num_layers, **options)
    builder.reserve(num_layers)
    mode, *other_modes = builder.modes
    steps = [builder.build(depth.plan, depth.layers, mode) for depth in depths]
    timings = measure_interleaved(
        [step.run for step in steps],
        device=device,
        ranks=builder.ranks,
        budget_s=budget_s * (1 - _UNMODIFIED_SHARE if other_modes else 1),
        min_blocks=MIN_BLOCKS if device.type == "cuda" else _MIN_CPU_BLOCKS,
        are_clocked=steps[0].is_clocked,
        on_progress=on_progress,
    )
    points = [_build_point(d.count_groups(geometry), d.use, t) for d, t in zip(depths, timings, strict=True)]
    kinds = find_group_kinds(geometry, max_group=max_group, allow=allow)
    costs = _fit_costs(geometry, depths, points, kinds, by_stage=not DROPS.isdisjoint(allow), fuses=builder.fuses)
    errors = [abs(costs.estimate_latency_ms(p.num_groups) / p.median_ms - 1) for p in points if p.use == "check"]
    if num_layers < geometry.num_layers:  # what ran is shallower than the model
        unmodified_ms = {
            mode: costs.estimate_latency_ms(geometry.count_groups(Plan.baseline(geometry.num_layers).groups))
        }
    else:
        unmodified_ms = {mode: timings[0].median_ms}
    if other_modes and num_layers == geometry.num_layers:
        others = measure_interleaved(
            [builder.build(depths[0].plan, depths[0].layers, other).run for other in other_modes],
            device=device,
            ranks=builder.ranks,
            budget_s=budget_s * _UNMODIFIED_SHARE,
            min_blocks=_MIN_UNMODIFIED_BLOCKS,
            are_clocked=steps[0].is_clocked,
        )
        unmodified_ms |= {other: timing.median_ms for other, timing in zip(other_modes, others, strict=True)}
    read_bytes = steps[0].read_bytes
    return WorkloadProfile(
        kind=workload.kind,
        batch_size=workload.batch_size,
        context_len=workload.context_len,
        num_layers_measured=num_layers,
        all_reduce=builder.ranks.kind,
        all_reduce_us=dict(all_reduce_us),
        points=tuple(points),
        overhead_ms=costs.overhead_ms,
        cost_ms=dict(costs.cost_ms),
        check_error=max(errors, default=None),
        check_mean_error=sum(errors) / len(errors) if errors else None,
        unmodified_ms=unmodified_ms,
        achieved_gb_per_s=None if read_bytes is None else read_bytes / timings[0].median_ms / 1e6,
    )


def _fit_costs(
    geometry: ProfileGeometry,
    depths: Sequence[Depth],
    points: Sequence[MeasuredPoint],
    kinds: Mapping[str, Group],
    *,
    by_stage: bool,
    fuses: bool,
) -> GroupCosts:
    """Fit the cost of every kind of group.

    Args:
        geometry: shape of the model.
        depths: what was measured.
        points: their times.
        kinds: every kind of group that a plan may have, with such a group.
        by_stage: whether costs of stages are fitted, of which those of groups are sums.
        fuses: whether a group runs as one wide layer; if not, it costs what its layers cost.
    """
    fitted = [(depth, point) for depth, point in zip(depths, points, strict=True) if point.use == "fit"]
    count = geometry.count_stages if by_stage else geometry.count_groups
    found = fit_group_costs([count(depth.groups) for depth, _ in fitted], [point.median_ms for _, point in fitted])
    measured = {geometry.describe_group(group): group for depth in depths for group in depth.groups}
    cost_ms = {}
    for kind, group in {**measured, **kinds}.items():
        num_parts = count([group] if fuses else _split_members(group))
        if kind:
            cost_ms[kind] = sum(number * found.cost_ms[part] for part, number in num_parts.items())
    order = dict.fromkeys([*kinds, *cost_ms])
    return GroupCosts(found.overhead_ms, {kind: cost_ms[kind] for kind in order})


def _split_members(group: Group) -> list[Group]:
    """Return what a group's layers run, one by one."""
    return [
        Group(
            (layer_idx,),
            (layer_idx,) if layer_idx in group.attention_layers else (),
            (layer_idx,) if layer_idx in group.mlp_layers else (),
        )
        for layer_idx in group
    ]


def _build_point(num_groups: dict[str, int], use: Literal["fit", "check"], timing: StepTiming) -> MeasuredPoint:
    return MeasuredPoint(
        num_groups=num_groups,
        use=use,
        median_ms=timing.median_ms,
        p10_ms=timing.p10_ms,
        p90_ms=timing.p90_ms,
        num_samples=len(timing.blocks_ms),
    )


def _count_fitting_layers(
    builder: StepBuilder,
    geometry: ProfileGeometry,
    workload: Workload,
    *,
    dtype: torch.dtype,
    usable_bytes: int,
    least: int,
) -> int:
    """Return how many layers fit into a rank's memory, at most those of the model.

    Args:
        builder: whose layers.
        geometry: shape of the model.
        workload: what is timed.
        dtype: of weights and cache.
        usable_bytes: memory of a rank.
        least: fewest layers that are of use, unless the model has fewer.

    Raises:
        LpsearchError: if fewer than that fit: how many sequences or tokens would.
    """
    least = min(least, geometry.num_layers)
    batch_size, capacity = workload.batch_size, workload.context_len + 1
    num_rows = batch_size * (workload.context_len if workload.kind == "prefill" else 1)
    layer, token = builder.layer_elements, builder.token_elements
    ends = 2 * geometry.vocab_size * geometry.hidden_size
    # What one group's activations take, gate and up the most of it, and float32 copies in plain attention.
    row = 8 * geometry.hidden_size + 8 * geometry.intermediate_size // builder.ranks.num_ranks
    working = batch_size * 2 * geometry.vocab_size + num_rows * row
    room = usable_bytes // dtype.itemsize - ends - working
    fitting = min(geometry.num_layers, room // (layer + batch_size * capacity * token))
    if fitting >= least:
        return fitting
    needed = (ends + working + least * (layer + batch_size * capacity * token)) * dtype.itemsize
    tokens = max(0, (room // least - layer) // token)
    mend = (
        f"what fits is {tokens} tokens over all sequences, e.g. batch {batch_size} with context {tokens // batch_size}"
        if tokens > batch_size
        else "not even the weights fit: use more GPUs (`lpsearch profile --tp`), or search without times "
        "(`lpsearch optimize --latency off`)"
    )
    raise LpsearchError(
        f"not enough memory to measure latency: {least} layers with batch {batch_size} and {capacity} tokens need "
        f"{needed / 1e9:.1f} GB a rank, {usable_bytes / 1e9:.1f} GB can be used; {mend}"
    )


def _find_usable_bytes(device: torch.device, num_models: int = 1) -> int:
    """Return the bytes that each of so many models may take."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]) // num_models
    return min(_MAX_CPU_BYTES, int(_MEMORY_SHARE * psutil.virtual_memory().available) // num_models)


def name_device(device: torch.device) -> str:
    """Return the name that a profile gives a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()})"


def _log_profile(profile: LatencyProfile) -> None:
    for workload in profile.workloads:
        costs = ", ".join(f"{cost:.3f} ms for {kind}" for kind, cost in workload.cost_ms.items())
        error = workload.check_error
        checked = "" if error is None else f"; {error:.1%} off on a depth that was not fitted"
        logger.info(
            "%s of %d x %d tokens on %d x %s: overhead %.3f ms, %s%s",
            workload.kind,
            workload.batch_size,
            workload.context_len,
            profile.num_ranks,
            profile.device,
            workload.overhead_ms,
            costs,
            checked,
        )
