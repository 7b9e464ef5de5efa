"""``lpsearch profile``: decode latency of a model's shape on this machine, as a file for another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lpsearch.commands.loading import resolve_device, resolve_dtype
from lpsearch.commands.progress import show_steps
from lpsearch.errors import ConfigError
from lpsearch.plan import Plan

__all__ = ["profile"]


def profile(
    model: str | None,
    *,
    out: Path,
    batch_size: int,
    context_len: int,
    max_group: int,
    device: str,
    dtype: str,
) -> dict[str, Any]:
    """Measure decode steps at a few depths and write the fitted profile.

    Args:
        model: alias, hub id, directory or ``.gguf`` file; of an alias only the bundled geometry is needed.
        out: profile file to write.
        batch_size: sequences decoded together.
        context_len: cached tokens of each.
        max_group: most layers in a group.
        device: torch device, or ``auto``.
        dtype: dtype of the weights, or ``auto``.

    Returns:
        Where the profile is, the baseline's latency and that of the deepest plan.
    """
    if model is None:
        raise ConfigError("no model was named; give --model ALIAS (`lpsearch models` lists them), a hub id or a path")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: its directory does not exist; make it first")
    from lpsearch.latency import LatencyModel, measure_profile, save_profile
    from lpsearch.models import load_geometry

    target = resolve_device(device)
    config = load_geometry(model)
    with show_steps("measuring latency", enabled=True) as on_step:
        measured = measure_profile(
            config,
            device=target,
            dtype=resolve_dtype(dtype, target),
            batch_size=batch_size,
            context_len=context_len,
            max_group=max_group,
            on_progress=lambda share: on_step(round(1000 * share), 1000),
        )
    save_profile(measured, out)
    num_layers = measured.geometry.num_layers
    latency_model = LatencyModel(measured)
    deepest = Plan.from_groups(range(i, min(i + max_group, num_layers)) for i in range(0, num_layers, max_group))
    return {
        "profile": str(out),
        "device": measured.device,
        "dtype": measured.dtype,
        "runtime": measured.runtime,
        "baseline_latency_ms": latency_model.estimate_latency_ms(Plan.baseline(num_layers)),
        "least_depth": deepest.depth,
        "least_depth_latency_ms": latency_model.estimate_latency_ms(deepest),
        "check_error": measured.check_error,
    }
