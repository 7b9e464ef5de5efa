"""Measuring decode steps at a few depths.

TPOT(b, c) is the time of one decode step of b sequences with c cached tokens, embedding to argmax. The depths run
interleaved in one process, there and back (ABBA), so that a drift of the machine's speed meets all of them alike.
"""

from __future__ import annotations

import copy
import itertools
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

import numpy as np
import psutil
import torch

from lpsearch.errors import LpsearchError
from lpsearch.latency.model import fit_group_costs
from lpsearch.latency.profile import LatencyProfile, MeasuredPoint, ProfileGeometry
from lpsearch.latency.shapes import ShapeModel, cache_size, can_widen, layer_sizes, select_layers
from lpsearch.versions import read_versions

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["measure_profile"]

logger = logging.getLogger(__name__)

_STEPS_PER_BLOCK = 3
_MAX_BLOCKS = 60
_WARM_UP_S = 0.5
_MEMORY_SHARE = 0.8
_MAX_CPU_BYTES = 4 << 30  # beyond, a step on a CPU takes seconds; the costs a layer are the same with fewer layers
_RUNTIME = {True: "transformers eager, fused layers", False: "transformers eager, layers not fused"}

_Counts = Mapping[int, int]


def measure_profile(
    config: PretrainedConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    batch_size: int = 1,
    context_len: int = 1024,
    max_group: int = 2,
    budget_s: float = 15.0,
    on_progress: Callable[[float], None] | None = None,
) -> LatencyProfile:
    """Measure decode steps of a model's shape with groups fused into wide layers, and fit the cost of each group size.

    Weights are random and need no download. A family whose layers cannot be widened is measured unfused: then a group
    costs what its layers cost one by one, which is also what running such a plan costs, and ``runtime`` says so. Where
    memory is short fewer layers are built; the model is additive, so the costs carry over to all of them.

    Args:
        config: the model's configuration.
        device: device to measure.
        dtype: dtype of weights and cache.
        batch_size: sequences decoded together.
        context_len: cached tokens of each; cut to what the model reads.
        max_group: largest group to measure.
        budget_s: about how long the timed part takes.
        on_progress: called with the share done.

    Raises:
        FamilyError: if transformers cannot build the model from its configuration.
        LpsearchError: if not even a few layers fit into memory.
    """
    device = torch.device(device)
    config = config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or context_len + 1
    context_len = min(context_len, longest - 1)
    max_group = min(max_group, config.num_hidden_layers)
    fused = can_widen(config)
    num_layers = _count_fitting_layers(
        config, device=device, dtype=dtype, batch_size=batch_size, context_len=context_len, max_group=max_group
    )
    fit, check = _choose_depths(num_layers, max_group if fused else 1)
    samples = _measure_steps(
        _with_layers(config, num_layers),
        [*fit, *check],
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        context_len=context_len,
        budget_s=budget_s,
        on_progress=on_progress,
    )
    points = [_build_point(counts, "fit" if counts in fit else "check", times) for counts, times in samples]
    fitted = [point for point in points if point.use == "fit"]
    costs = fit_group_costs([point.num_groups for point in fitted], [point.median_ms for point in fitted])
    errors = [
        abs(costs.estimate_latency_ms(point.num_groups) / point.median_ms - 1)
        for point in points
        if point.use == "check"
    ]
    cost_ms = dict(costs.cost_ms)
    if not fused:
        cost_ms |= {size: size * cost_ms[1] for size in range(2, max_group + 1)}
    profile = LatencyProfile(
        device=_name_device(device),
        num_threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        versions=read_versions(),
        geometry=ProfileGeometry.from_config(config),
        num_layers_measured=num_layers,
        batch_size=batch_size,
        context_len=context_len,
        runtime=_RUNTIME[fused],
        points=tuple(points),
        overhead_ms=costs.overhead_ms,
        cost_ms=cost_ms,
        check_error=max(errors, default=None),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    described = ", ".join(f"{cost:.3f} ms for a group of {size}" for size, cost in profile.cost_ms.items())
    checked = "" if profile.check_error is None else f"; {profile.check_error:.1%} off on a depth that was not fitted"
    logger.info("latency on %s: overhead %.3f ms, %s%s", profile.device, profile.overhead_ms, described, checked)
    return profile


def _choose_depths(num_layers: int, max_group: int) -> tuple[list[_Counts], list[_Counts]]:
    """Choose which depths to fit to and which to check on, each as the number of groups of each size.

    Fitted: all layers and half of them alone, which tells overhead from layers; then, for each size, half and all of
    the layers in such groups. Checked: a third of the layers in groups of all sizes together.
    """
    fit = [_count_groups(num_layers, {}), _count_groups((num_layers + 1) // 2, {})]
    mixed: dict[int, int] = {}
    for size in range(2, max_group + 1):
        most = num_layers // size
        fit += [_count_groups(num_layers, {size: count}) for count in ((most + 1) // 2, most)]
        mixed[size] = num_layers // (3 * size * (max_group - 1))
    check = _count_groups(num_layers if any(mixed.values()) else num_layers - num_layers // 4, mixed)
    unique = [counts for index, counts in enumerate(fit) if counts not in fit[:index]]
    return unique, [check] if check not in unique else []


def _count_groups(num_layers: int, larger: Mapping[int, int]) -> _Counts:
    """Return the number of groups of each size when the layers outside the larger groups are alone."""
    alone = num_layers - sum(size * count for size, count in larger.items())
    return {size: count for size, count in {1: alone, **larger}.items() if count}


@torch.inference_mode()
def _measure_steps(
    config: PretrainedConfig,
    depths: Sequence[_Counts],
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    context_len: int,
    budget_s: float,
    on_progress: Callable[[float], None] | None,
) -> list[tuple[_Counts, list[float]]]:
    """Return the step times in milliseconds of each depth."""
    model = ShapeModel(config, batch_size=batch_size, context_len=context_len, device=device, dtype=dtype)
    built = [model.build_depth(_spread(counts)) for counts in depths]
    started = time.perf_counter()
    for depth in itertools.cycle(built):
        model.use_depth(depth)
        _time_step_ms(model.run_step, device)
        if time.perf_counter() - started > _WARM_UP_S:
            break
    times: list[list[float]] = [[] for _ in built]
    for block in range(_MAX_BLOCKS):
        order = range(len(built)) if block % 2 == 0 else reversed(range(len(built)))
        for index in order:
            model.use_depth(built[index])
            model.run_step()  # the first step after a change is not timed
            times[index] += [_time_step_ms(model.run_step, device) for _ in range(_STEPS_PER_BLOCK)]
        spent = time.perf_counter() - started
        if on_progress is not None:
            on_progress(min(1.0, max(spent / budget_s, (block + 1) / _MAX_BLOCKS)))
        if spent * (block + 2) / (block + 1) > budget_s:  # another block would not fit
            break
    return list(zip(depths, times, strict=True))


def _spread(counts: _Counts) -> list[int]:
    """Return the group sizes of a depth in an order; the time does not depend on it."""
    return [size for size in sorted(counts, reverse=True) for _ in range(counts[size])]


def _time_step_ms(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        step()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop))
    began = time.perf_counter()
    step()
    return (time.perf_counter() - began) * 1e3


def _build_point(counts: _Counts, use: Literal["fit", "check"], times_ms: Sequence[float]) -> MeasuredPoint:
    p10, median, p90 = (float(value) for value in np.percentile(times_ms, (10, 50, 90)))
    return MeasuredPoint(
        num_groups=dict(counts), use=use, median_ms=median, p10_ms=p10, p90_ms=p90, num_samples=len(times_ms)
    )


def _count_fitting_layers(
    config: PretrainedConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    context_len: int,
    max_group: int,
) -> int:
    """Return how many layers to build: all of them if they fit, else as many as do.

    Raises:
        LpsearchError: if fewer than two of the largest groups fit.
    """
    num_layers: int = config.num_hidden_layers
    layer_elements = max(layer_sizes(config))
    cache_elements = cache_size(config, batch_size=batch_size, context_len=context_len) // num_layers
    other_elements = 2 * config.vocab_size * config.hidden_size + batch_size * config.vocab_size
    room = _get_usable_bytes(device) // dtype.itemsize - other_elements
    fitting = min(num_layers, room // (layer_elements + cache_elements))
    if fitting < min(num_layers, 2 * max_group):
        needed_gb = (other_elements + 2 * max_group * (layer_elements + cache_elements)) * dtype.itemsize / 1e9
        raise LpsearchError(
            f"not enough memory on {device} to measure latency: {2 * max_group} layers with batch {batch_size} and "
            f"context {context_len} need {needed_gb:.1f} GB; measure a smaller batch or context, or use --latency off"
        )
    if fitting < num_layers:
        logger.warning("latency is measured on %d of %d layers, which fit into memory", fitting, num_layers)
    return int(fitting)


def _get_usable_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0])
    return min(_MAX_CPU_BYTES, int(_MEMORY_SHARE * psutil.virtual_memory().available))


def _with_layers(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    cut = copy.deepcopy(config)
    for name, value in select_layers(config, range(num_layers)).items():
        setattr(cut, name, value)
    return cut


def _name_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()})"
