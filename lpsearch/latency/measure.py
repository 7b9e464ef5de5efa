"""Measuring a model's shape at a few depths, and fitting what each kind of group costs.

TPOT(b, c) is the time of one decode step of b sequences with c cached tokens, embedding to argmax; TTFT(b, p) that of a
prefill of p tokens with the last token's logits. All depths run interleaved in one process.
"""

from __future__ import annotations

import logging
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch

from lpsearch.latency.architecture import RUNTIME_FAMILIES, Architecture, read_architecture
from lpsearch.latency.eager import measure_eager_workload
from lpsearch.latency.model import fit_group_costs
from lpsearch.latency.profile import LatencyProfile, MeasuredPoint, ProfileGeometry, WorkloadProfile
from lpsearch.latency.runtime.decoder import RunMode, default_mode
from lpsearch.latency.runtime.shaped import ShapedDecoders, count_fitting_layers
from lpsearch.latency.sums import OneRank, Ranks
from lpsearch.latency.timing import MIN_BLOCKS, StepTiming, measure_interleaved
from lpsearch.plan import Plan
from lpsearch.versions import read_versions

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Workload", "measure_profile", "measure_workload", "name_device"]

logger = logging.getLogger(__name__)

_MEMORY_SHARE = 0.8
_MAX_CPU_BYTES = 4 << 30  # beyond, a step on a CPU takes seconds; the costs a layer are the same with fewer layers
_UNMODIFIED_SHARE = 0.3  # of the time goes to the ways of running the unmodified model
_RUNTIMES: dict[str, str] = {
    "eager": "wide layers, eager",
    "graph": "wide layers, captured graph",
    "compiled": "wide layers, fused kernels, captured graph",
}


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes:
        kind: ``decode`` or ``prefill``.
        batch_size: sequences together.
        context_len: cached tokens of each sequence, or the tokens of its prompt.
    """

    kind: Literal["decode", "prefill"]
    batch_size: int
    context_len: int


@dataclass(frozen=True)
class _Depth:
    """A depth to measure: a plan over some of the model's layers, in any order."""

    layers: tuple[int, ...]
    plan: Plan
    use: Literal["fit", "check"]

    def count_groups(self, architecture: Architecture) -> dict[str, int]:
        groups = [[self.layers[slot] for slot in group] for group in self.plan.groups]
        return dict(Counter(architecture.describe_group(group) for group in groups))


def measure_profile(
    config: PretrainedConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    workloads: Sequence[Workload] | None = None,
    batch_size: int = 1,
    context_len: int = 1024,
    max_group: int = 2,
    budget_s: float = 15.0,
    min_blocks: int | None = None,
    choose: Callable[[int], tuple[Ranks, dict[str, float]]] | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> LatencyProfile:
    """Measure a model's shape with groups fused into wide layers, and fit the cost of each kind of group.

    Weights are random and need no download. A family that the runtime does not compute is measured by transformers'
    own eager execution, decode steps only, and ``runtime`` says so. Where memory is short fewer layers are built; the
    model is additive, so the costs carry over to all of them.

    Args:
        config: the model's configuration.
        device: device to measure.
        dtype: dtype of weights and cache.
        workloads: what to measure; None for decoding ``batch_size`` sequences with ``context_len`` tokens.
        batch_size: sequences decoded together.
        context_len: cached tokens of each; cut to what the model reads.
        max_group: largest group to measure.
        budget_s: about how long the timed part of each workload takes.
        min_blocks: least blocks of each depth; None for the usual number on a GPU and fewer on a CPU.
        choose: given the elements of a step's sums, returns the ranks that share the model and the time of one sum of
            each kind that was tried; None for one rank. Every rank calls this function alike.
        on_progress: called with the share done.

    Raises:
        FamilyError: if transformers cannot build the model from its configuration, or for prompts of a family that the
            runtime does not compute.
        ConfigError: if the ranks do not divide the model.
        LpsearchError: if not even a few layers fit into memory.
    """
    device = torch.device(device)
    config = config.get_text_config()
    geometry = ProfileGeometry.from_config(config)
    longest = getattr(config, "max_position_embeddings", None) or context_len + 1
    workloads = workloads or [Workload("decode", batch_size, min(context_len, longest - 1))]
    max_group = min(max_group, geometry.num_layers)
    measured = []
    num_ranks = 1
    for index, workload in enumerate(workloads):

        def report(share: float, done: int = index) -> None:
            if on_progress is not None:
                on_progress((done + share) / len(workloads))

        if config.model_type not in RUNTIME_FAMILIES:
            if workload.kind != "decode":
                read_architecture(config)  # which says which families prompts can be timed of
            runtime, result = measure_eager_workload(
                config, geometry, workload.batch_size, workload.context_len,
                device=device, dtype=dtype, max_group=max_group, budget_s=budget_s, on_progress=report,
                usable_bytes=_get_usable_bytes(device),
            )  # fmt: skip
            measured.append(result)
            continue
        ranks, sum_us = choose(workload.batch_size * config.hidden_size) if choose is not None else (OneRank(), {})
        num_ranks = ranks.num_ranks
        runtime = _RUNTIMES[default_mode(device)]
        measured.append(
            measure_workload(
                config, workload, device=device, dtype=dtype, ranks=ranks, all_reduce_us=sum_us, max_group=max_group,
                budget_s=budget_s, min_blocks=min_blocks, on_progress=report,
            )
        )  # fmt: skip
    profile = LatencyProfile(
        device=name_device(device),
        num_ranks=num_ranks,
        num_threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        versions=read_versions(),
        geometry=geometry,
        runtime=runtime,
        workloads=tuple(measured),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    _log_profile(profile)
    return profile


def measure_workload(
    config: PretrainedConfig,
    workload: Workload,
    *,
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks | None = None,
    all_reduce_us: Mapping[str, float] | None = None,
    max_group: int = 2,
    budget_s: float = 15.0,
    min_blocks: int | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> WorkloadProfile:
    """Measure one workload at a few depths and fit it; the arguments are those of :func:`measure_profile`."""
    ranks = ranks or OneRank()
    architecture = read_architecture(config)
    architecture.check_ranks(ranks.num_ranks)
    capacity = workload.context_len + 1
    num_layers = count_fitting_layers(
        architecture,
        batch_size=workload.batch_size,
        capacity=capacity,
        num_rows=workload.batch_size * (workload.context_len if workload.kind == "prefill" else 1),
        dtype=dtype,
        num_ranks=ranks.num_ranks,
        usable_bytes=_get_usable_bytes(device),
        least=min(architecture.num_layers, 2 * max_group),
    )
    if num_layers < architecture.num_layers:
        logger.warning("latency is measured on %d of %d layers, which fit", num_layers, architecture.num_layers)
    depths = _choose_depths(architecture, num_layers, max_group)
    with torch.inference_mode():
        shaped = ShapedDecoders(
            architecture,
            num_layers=num_layers,
            batch_size=workload.batch_size,
            capacity=capacity,
            device=device,
            dtype=dtype,
            ranks=ranks,
        )
        mode = default_mode(device)
        steps = [_build_step(shaped, depth, workload, mode) for depth in depths]
        blocks = min_blocks if min_blocks is not None else MIN_BLOCKS if device.type == "cuda" else 3
        timings = measure_interleaved(
            [step for step, _ in steps],
            device=device,
            ranks=ranks,
            budget_s=budget_s * (1 - _UNMODIFIED_SHARE),
            min_blocks=blocks,
            on_progress=on_progress,
        )
        unmodified = {mode: timings[0].median_ms}
        if mode != "eager" and num_layers == architecture.num_layers:
            modes: tuple[RunMode, ...] = ("eager", "graph")
            others = [_build_step(shaped, depths[0], workload, other)[0] for other in modes]
            found = measure_interleaved(
                others, device=device, ranks=ranks, budget_s=budget_s * _UNMODIFIED_SHARE, min_blocks=10
            )
            unmodified |= {name: timing.median_ms for name, timing in zip(modes, found, strict=True)}
    points = [_build_point(d, architecture, timing) for d, timing in zip(depths, timings, strict=True)]
    fitted = [point for point in points if point.use == "fit"]
    costs = fit_group_costs([point.num_groups for point in fitted], [point.median_ms for point in fitted])
    errors = [abs(costs.estimate_latency_ms(p.num_groups) / p.median_ms - 1) for p in points if p.use == "check"]
    step_bytes = steps[0][1] if workload.kind == "decode" else None
    return WorkloadProfile(
        kind=workload.kind,
        batch_size=workload.batch_size,
        context_len=workload.context_len,
        num_layers_measured=num_layers,
        all_reduce=ranks.kind,
        all_reduce_us=dict(all_reduce_us or {}),
        points=tuple(points),
        overhead_ms=costs.overhead_ms,
        cost_ms=dict(costs.cost_ms),
        check_error=max(errors, default=None),
        check_mean_error=sum(errors) / len(errors) if errors else None,
        unmodified_ms=unmodified,
        achieved_gb_per_s=None if step_bytes is None else step_bytes / timings[0].median_ms / 1e6,
    )


def _build_step(
    shaped: ShapedDecoders, depth: _Depth, workload: Workload, mode: RunMode
) -> tuple[Callable[[], Any], int]:
    """Return what a workload's time is the time of, under a depth, and the bytes that a step must read."""
    if workload.kind == "decode":
        decoder = shaped.build(depth.plan, length=workload.context_len, mode=mode, layers=depth.layers)
        if mode != "eager":
            decoder.capture_fastest()
        return decoder.run_step, decoder.count_step_bytes()
    decoder = shaped.build(depth.plan, length=0, mode=mode, layers=depth.layers)
    return shaped.build_prefill(decoder, num_tokens=workload.context_len), 0


def _choose_depths(architecture: Architecture, num_layers: int, max_group: int) -> list[_Depth]:
    """Choose which depths to fit to and which to check on; the first is the unmodified model, or what fits of it.

    For each kind of group that consecutive layers can form: as many as fit, and half as many with the first layers
    alone behind them; alone, all and half of the first kind. So overhead and every kind's cost are told apart. Checked
    on: the model's own layers, some alone and some in groups of each size, one size after the other.
    """
    total = architecture.num_layers
    own = tuple(range(num_layers))
    examples: dict[str, tuple[int, ...]] = {}
    for size in range(1, max_group + 1):
        for first in range(total - size + 1):
            group = tuple(range(first, first + size))
            examples.setdefault(architecture.describe_group(group), group)
    depths = [_Depth(own, Plan.baseline(num_layers), "fit")]
    single = own[:1]
    for kind, group in examples.items():
        most = num_layers // len(group)
        for count in dict.fromkeys((most, max(1, most // 2))):
            layers = group * count
            plan = _cut([len(group)] * count)
            if kind != architecture.describe_group(single) and count < most:
                rest = num_layers - len(layers)
                layers, plan = layers + single * rest, _cut([len(group)] * count + [1] * rest)
            depth = _Depth(layers, plan, "fit")
            if all(depth.count_groups(architecture) != other.count_groups(architecture) for other in depths):
                depths.append(depth)
    known = [depth.count_groups(architecture) for depth in depths]
    mixtures = (_Depth(own, _cut(list(_alternate(num_layers, max_group, alone))), "check") for alone in (2, 1, 3, 4))
    check = next((depth for depth in mixtures if depth.count_groups(architecture) not in known), None)
    return depths if check is None else [*depths, check]


def _alternate(num_layers: int, max_group: int, alone: int) -> Iterator[int]:
    """Yield group sizes, e.g. 1 1 2 1 1 3 ..., that add up to the layers, with so many layers alone in between."""
    left, size = num_layers, 2
    while left:
        for wanted in (*[1] * alone, size):
            taken = min(wanted, left)
            left -= taken
            if taken:
                yield taken
        size = size + 1 if size < max_group else 2


def _cut(sizes: Sequence[int]) -> Plan:
    """Return the plan of groups of these sizes."""
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return Plan.from_groups([range(start, start + size) for start, size in zip(starts, sizes, strict=True)])


def _build_point(depth: _Depth, architecture: Architecture, timing: StepTiming) -> MeasuredPoint:
    return MeasuredPoint(
        num_groups=depth.count_groups(architecture),
        use=depth.use,
        median_ms=timing.median_ms,
        p10_ms=timing.p10_ms,
        p90_ms=timing.p90_ms,
        num_samples=len(timing.blocks_ms),
    )


def _get_usable_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0])
    return min(_MAX_CPU_BYTES, int(_MEMORY_SHARE * psutil.virtual_memory().available))


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
