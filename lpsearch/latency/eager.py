"""Families that the runtime does not compute: decode steps under transformers' own eager execution.

Mixtures of experts, parallel blocks and others are measured as transformers runs them, with groups fused where a
widened configuration gives a layer with exactly the members' weights, else layer by layer; the profile says which.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from lpsearch.errors import LpsearchError
from lpsearch.latency.fallback import ShapeModel, cache_size, can_widen, layer_sizes, select_layers
from lpsearch.latency.model import fit_group_costs
from lpsearch.latency.profile import MeasuredPoint, ProfileGeometry, WorkloadProfile
from lpsearch.latency.timing import measure_interleaved

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["measure_eager_workload"]

_RUNTIME = {True: "transformers eager, fused layers", False: "transformers eager, layers not fused"}


@torch.inference_mode()
def measure_eager_workload(
    config: PretrainedConfig,
    geometry: ProfileGeometry,
    batch_size: int,
    context_len: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_group: int,
    budget_s: float,
    usable_bytes: int,
    on_progress: Callable[[float], None] | None,
) -> tuple[str, WorkloadProfile]:
    """Measure decode steps and fit the cost of each size of group, whatever the kinds of its layers.

    Args:
        config: text configuration.
        geometry: its shape.
        batch_size: sequences decoded together.
        context_len: cached tokens of each.
        device: device to measure.
        dtype: dtype of weights and cache.
        max_group: largest group to measure.
        budget_s: about how long the timed part takes.
        usable_bytes: memory to use.
        on_progress: called with the share done.

    Returns:
        What executed the steps, and the measurements.

    Raises:
        FamilyError: if transformers cannot build the model from its configuration.
        LpsearchError: if not even a few layers fit into memory.
    """
    fused = can_widen(config)
    num_layers = _count_fitting_layers(
        config, device, dtype, batch_size, context_len, max_group=max_group, usable_bytes=usable_bytes
    )
    cut = copy.deepcopy(config)
    for name, value in select_layers(config, range(num_layers)).items():
        setattr(cut, name, value)
    model = ShapeModel(cut, batch_size=batch_size, context_len=context_len, device=device, dtype=dtype)
    depths = _choose_depths(num_layers, max_group if fused else 1)
    built = [model.build_depth(sizes) for _, sizes in depths]

    def build_step(index: int) -> Callable[[], object]:
        def step() -> object:
            model.use_depth(built[index])
            return model.run_step()

        return step

    timings = measure_interleaved(
        [build_step(index) for index in range(len(depths))],
        device=device,
        budget_s=budget_s,
        min_blocks=3,
        on_progress=on_progress,
    )
    sizes_of = [{str(size): sizes.count(size) for size in set(sizes)} for _, sizes in depths]
    fits = [index for index, (use, _) in enumerate(depths) if use == "fit"]
    costs = fit_group_costs(
        [{f"{size} layer": n for size, n in sizes_of[index].items()} for index in fits],
        [timings[index].median_ms for index in fits],
    )
    by_size = {
        size: costs.cost_ms.get(f"{size} layer", size * costs.cost_ms["1 layer"]) for size in range(1, max_group + 1)
    }
    kinds = {
        geometry.describe_group(range(first, first + size)): by_size[size]
        for size in range(1, max_group + 1)
        for first in range(geometry.num_layers - size + 1)
    }
    points, errors = [], []
    for (use, sizes), timing in zip(depths, timings, strict=True):
        counts: dict[str, int] = {}
        for start, size in _locate(sizes):
            kind = geometry.describe_group(range(start, start + size))
            counts[kind] = counts.get(kind, 0) + 1
        points.append(
            MeasuredPoint(
                num_groups=counts,
                use=use,
                median_ms=timing.median_ms,
                p10_ms=timing.p10_ms,
                p90_ms=timing.p90_ms,
                num_samples=len(timing.blocks_ms),
            )
        )
        if use == "check":
            estimate = costs.overhead_ms + sum(by_size[size] for size in sizes)
            errors.append(abs(estimate / timing.median_ms - 1))
    return _RUNTIME[fused], WorkloadProfile(
        batch_size=batch_size,
        context_len=context_len,
        num_layers_measured=num_layers,
        points=tuple(points),
        overhead_ms=costs.overhead_ms,
        cost_ms=kinds,
        check_error=max(errors, default=None),
        check_mean_error=sum(errors) / len(errors) if errors else None,
        unmodified_ms={"transformers eager": timings[0].median_ms},
    )


def _choose_depths(num_layers: int, max_group: int) -> list[tuple[str, list[int]]]:
    """Choose depths as the sizes of their groups: fitted to all and half of each size, checked on a mixture."""
    depths = [("fit", [1] * num_layers), ("fit", [1] * ((num_layers + 1) // 2))]
    mixed: list[int] = []
    for size in range(2, max_group + 1):
        most = num_layers // size
        depths += [("fit", [size] * count + [1] * (num_layers - size * count)) for count in ((most + 1) // 2, most)]
        mixed += [size] * (num_layers // (3 * size * (max_group - 1)))
    check = mixed + [1] * ((num_layers if mixed else num_layers - num_layers // 4) - sum(mixed))
    unique = [depth for index, depth in enumerate(depths) if depth not in depths[:index]]
    return unique + ([("check", check)] if all(check != sizes for _, sizes in unique) else [])


def _locate(sizes: list[int]) -> list[tuple[int, int]]:
    """Return the first layer and the size of each group."""
    return [(sum(sizes[:index]), size) for index, size in enumerate(sizes)]


def _count_fitting_layers(
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    context_len: int,
    *,
    max_group: int,
    usable_bytes: int,
) -> int:
    """Return how many layers to build: all of them if they fit, else as many as do.

    Raises:
        LpsearchError: if fewer than two of the largest groups fit.
    """
    num_layers: int = config.num_hidden_layers
    layer_elements = max(layer_sizes(config))
    cache_elements = cache_size(config, batch_size=batch_size, context_len=context_len) // num_layers
    other_elements = 2 * config.vocab_size * config.hidden_size + batch_size * config.vocab_size
    fitting = (usable_bytes // dtype.itemsize - other_elements) // (layer_elements + cache_elements)
    if fitting < min(num_layers, 2 * max_group):
        needed_gb = (other_elements + 2 * max_group * (layer_elements + cache_elements)) * dtype.itemsize / 1e9
        raise LpsearchError(
            f"not enough memory on {device} to measure latency: {2 * max_group} layers with batch {batch_size} and "
            f"context {context_len} need {needed_gb:.1f} GB; measure a smaller batch or context, or use --latency off"
        )
    return int(min(num_layers, fitting))
