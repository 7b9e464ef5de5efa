"""Profiles that were measured before, kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lpsearch.errors import ConfigError
from lpsearch.latency.allow import JOINS
from lpsearch.latency.engines import read_engine_versions
from lpsearch.latency.measure import measure_profile, name_device
from lpsearch.latency.mix import Workload
from lpsearch.latency.profile import (
    LARGEST_QUIET_ERROR,
    PROFILE_SCHEMA_VERSION,
    Engine,
    LatencyProfile,
    load_profile,
    save_profile,
)
from lpsearch.models.cache import cache_directory
from lpsearch.versions import read_versions

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["measure_or_reuse_profile"]

logger = logging.getLogger(__name__)


def measure_or_reuse_profile(
    config: PretrainedConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int = 1,
    context_len: int = 1024,
    workloads: Sequence[Workload] | None = None,
    max_group: int = 2,
    allow: Collection[str] = JOINS,
    engine: Engine = "runtime",
    budget_s: float = 15.0,
    on_progress: Callable[[float], None] | None = None,
) -> LatencyProfile:
    """Return the profile of some workloads from the cache, or measure it and keep it.

    The key is engine, device, threads, versions, configuration, dtype and workload, but not how long it was timed. A
    profile whose estimates were far off is measured again, and the better of the two is kept. The arguments are those
    of :func:`lpsearch.latency.measure_profile`.
    """
    device = torch.device(device)
    key = {
        "schema_version": PROFILE_SCHEMA_VERSION,
        "device": name_device(device),
        "num_threads": torch.get_num_threads(),
        "versions": read_versions(),
        "config": config.get_text_config().to_diff_dict(),
        "dtype": str(dtype),
        "workload": [batch_size, context_len, max_group],
    }
    if workloads is not None:  # these keys are new; what was measured before is still found without them
        key["workloads"] = [workload.spec for workload in workloads]
    if set(allow) != JOINS:
        key["allow"] = sorted(allow)
    if engine != "runtime":  # so that a profile of one engine never stands for another
        key["engine"] = [engine, read_engine_versions(engine)]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:24]
    path = cache_directory() / "latency" / f"{digest}.json"
    kept = _load_kept(path)
    if kept is not None and kept.largest_error <= LARGEST_QUIET_ERROR:
        logger.info("latency was measured before, on %s", kept.created_at)
        return kept
    profile = measure_profile(
        config,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        context_len=context_len,
        workloads=workloads,
        max_group=max_group,
        allow=allow,
        engine=engine,
        budget_s=budget_s,
        on_progress=on_progress,
    )
    if kept is not None and kept.largest_error <= profile.largest_error:
        logger.info("the earlier measurement was no further off, and is used")
        return kept
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_profile(profile, path)
    except OSError as error:
        logger.warning("the latency profile cannot be kept for next time: %s", error)
    return profile


def _load_kept(path: Path) -> LatencyProfile | None:
    if not path.is_file():
        return None
    try:
        profile = load_profile(path)
    except ConfigError as error:
        logger.warning("a profile in the cache is unusable and is measured again: %s", error)
        return None
    if profile.largest_error > LARGEST_QUIET_ERROR:
        logger.info(
            "latency was measured before, on %s, but was %.0f%% off where it was checked: measuring again",
            profile.created_at,
            100 * profile.largest_error,
        )
    return profile
