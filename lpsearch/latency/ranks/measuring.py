"""Measuring a profile on several GPUs: on real ranks, or one rank's work plus a given time for the sums."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lpsearch.errors import ConfigError
from lpsearch.latency.allow import JOINS
from lpsearch.latency.measure import measure_profile
from lpsearch.latency.profile import LatencyProfile, count_sums
from lpsearch.latency.ranks.parallel import EmulatedRanks
from lpsearch.latency.ranks.processes import get_torchrun_size, join_ranks, run_ranks
from lpsearch.latency.ranks.symmetric import choose_ranks
from lpsearch.latency.workload import Workload, check_workloads
from lpsearch.models.traits import read_traits

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["emulate_profile_on_ranks", "measure_profile_on_ranks"]


def measure_profile_on_ranks(
    config: PretrainedConfig,
    *,
    num_ranks: int,
    device: torch.device,
    dtype: torch.dtype,
    workloads: Sequence[Workload],
    max_group: int,
    budget_s: float,
    allow: Collection[str] = JOINS,
    on_progress: Callable[[float], None] | None = None,
) -> LatencyProfile | None:
    """Measure with a model shared by ranks: those that ``torchrun`` started, else new processes, which end with it.

    Args:
        config: the model's configuration.
        num_ranks: ranks that share the model.
        device: ``cuda`` for NCCL, one GPU a rank, or ``cpu`` for gloo.
        dtype: of weights and cache.
        workloads: what to measure.
        max_group: largest group.
        budget_s: about how long the timed part of each workload takes.
        allow: what plans may do, as in :data:`lpsearch.config.Allowed`.
        on_progress: called with the share done.

    Returns:
        The profile; None on all ranks of ``torchrun`` but the first.

    Raises:
        ConfigError: if the ranks do not divide the model or outnumber the GPUs, or for more tokens than it reads.
        LpsearchError: if a rank fails.
    """
    _check_model(config, num_ranks, workloads)
    backend = "nccl" if device.type == "cuda" else "gloo"
    options = (config, device.type, dtype, list(workloads), max_group, budget_s, frozenset(allow))
    started = get_torchrun_size()
    if started is None:
        found = run_ranks(
            _measure_rank, num_ranks=num_ranks, backend=backend, arguments=options, on_progress=on_progress
        )
        return LatencyProfile.model_validate(found)
    if started != num_ranks:
        raise ConfigError(f"torchrun started {started} ranks and --tp is {num_ranks}; make them equal")
    group = join_ranks(backend)
    try:
        found = _measure_rank(group, *options, on_progress=on_progress)
        return LatencyProfile.model_validate(found) if dist.get_rank(group) == 0 else None
    finally:
        dist.destroy_process_group()


def emulate_profile_on_ranks(
    config: PretrainedConfig,
    *,
    num_ranks: int,
    all_reduce_us: float,
    device: torch.device,
    dtype: torch.dtype,
    workloads: Sequence[Workload],
    max_group: int,
    budget_s: float,
    allow: Collection[str] = JOINS,
    on_progress: Callable[[float], None] | None = None,
) -> LatencyProfile:
    """Estimate the profile of ranks that are not there: one rank's work, measured, plus a time for each sum.

    Args:
        config: the model's configuration.
        num_ranks: ranks that share the model.
        all_reduce_us: time of one sum over the ranks of a decode step's hidden states.
        device: of the one rank.
        dtype: of weights and cache.
        workloads: what to measure.
        max_group: largest group.
        budget_s: about how long the timed part of each workload takes.
        allow: what plans may do, as in :data:`lpsearch.config.Allowed`.
        on_progress: called with the share done.

    Raises:
        ConfigError: for a prefill, whose sums take another time, or if the ranks do not divide the model.
    """
    _check_model(config, num_ranks, workloads)
    if any(workload.kind != "decode" for workload in workloads):
        raise ConfigError("--emulate-tp estimates decode steps only; drop --prefill")
    measured = measure_profile(
        config,
        device=device,
        dtype=dtype,
        workloads=workloads,
        max_group=max_group,
        budget_s=budget_s,
        allow=allow,
        choose_ranks=lambda num_elements: (EmulatedRanks(num_ranks), {"given": all_reduce_us}),
        on_progress=on_progress,
    )
    sum_ms = all_reduce_us / 1e3
    estimated = [
        workload.model_copy(
            update={
                "cost_ms": {kind: cost + count_sums(kind) * sum_ms for kind, cost in workload.cost_ms.items()},
                "unmodified_ms": {
                    mode: time_ms + 2 * sum_ms * measured.geometry.num_layers
                    for mode, time_ms in workload.unmodified_ms.items()
                },
                "all_reduce": "given",
            }
        )
        for workload in measured.workloads
    ]
    return measured.model_copy(
        update={
            "num_ranks": num_ranks,
            "emulated": True,
            "runtime": f"{measured.runtime}; estimate: one of {num_ranks} ranks measured, sums added",
            "workloads": tuple(estimated),
        }
    )


def _check_model(config: PretrainedConfig, num_ranks: int, workloads: Sequence[Workload]) -> None:
    """Refuse a model that ranks cannot share, or workloads that it cannot run, before any of them starts."""
    traits = read_traits(config)
    traits.check_runtime()
    traits.check_ranks(num_ranks)
    check_workloads(config, workloads)


def _measure_rank(
    group: dist.ProcessGroup,
    config: PretrainedConfig,
    device_type: str,
    dtype: torch.dtype,
    workloads: list[Workload],
    max_group: int,
    budget_s: float,
    allow: Collection[str],
    on_progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Measure on one rank; returns the profile as a document."""
    device = torch.device(device_type, torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
    profile = measure_profile(
        config,
        device=device,
        dtype=dtype,
        workloads=workloads,
        max_group=max_group,
        budget_s=budget_s,
        allow=allow,
        choose_ranks=lambda num_elements: choose_ranks(group, num_elements=num_elements),
        on_progress=on_progress,
    )
    return profile.model_dump(mode="json")
