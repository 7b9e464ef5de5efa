"""``lpsearch profile``: latency of a model's shape on this machine, as a file for another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lpsearch.commands.checks import read_num_layers
from lpsearch.commands.console import Answer
from lpsearch.commands.loading import resolve_device, resolve_dtype
from lpsearch.commands.options import DeviceOption, DtypeOption, ModelOption
from lpsearch.commands.steps import show_steps
from lpsearch.errors import ConfigError
from lpsearch.plan import Plan

if TYPE_CHECKING:
    from rich.table import Table

    from lpsearch.latency import LatencyProfile

__all__ = ["profile"]


def profile(
    model: ModelOption = None,
    out: Annotated[Path, typer.Option(help="profile file to write", metavar="FILE")] = Path("profile.json"),
    batch: Annotated[str, typer.Option(help="sequences decoded together, e.g. 1,16,64")] = "1",
    context: Annotated[str, typer.Option(help="cached tokens of each sequence, e.g. 1024,4096")] = "1024",
    prefill: Annotated[str | None, typer.Option(help="tokens of prompts to time as well, e.g. 2048")] = None,
    max_group: Annotated[int, typer.Option(help="most layers in a group", min=2)] = 2,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    tp: Annotated[int, typer.Option(help="GPUs that share the model (tensor parallelism)", min=1)] = 1,
    emulate_tp: Annotated[int | None, typer.Option(help="estimate for so many GPUs from one of them", min=2)] = None,
    all_reduce_us: Annotated[
        float | None, typer.Option(help="with --emulate-tp: time of one sum over those GPUs", min=0)
    ] = None,
    seconds: Annotated[float, typer.Option(help="about how long each workload is timed", min=0)] = 15.0,
) -> Answer | dict[str, Any]:
    """Measure the latency of a model's shape at a few depths; needs no weights for a known alias."""
    batch_sizes = _parse_counts(batch, option="--batch", least=1)
    context_lens = _parse_counts(context, option="--context", least=0)
    prefill_lens = _parse_counts(prefill, option="--prefill", least=1) if prefill else ()
    if model is None:
        raise ConfigError("no model was named; give --model ALIAS (`lpsearch models` lists them), a hub id or a path")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: its directory does not exist; make it first")
    if (emulate_tp is None) != (all_reduce_us is None):
        raise ConfigError("--emulate-tp and --all-reduce-us go together: how many GPUs, and what a sum over them takes")
    if emulate_tp is not None and tp != 1:
        raise ConfigError("--tp measures real GPUs and --emulate-tp estimates; give one of them")
    from lpsearch.latency import (
        LatencyModel,
        Workload,
        emulate_profile_on_ranks,
        measure_profile,
        measure_profile_on_ranks,
        save_profile,
    )
    from lpsearch.models import load_geometry

    target = resolve_device(device)
    config = load_geometry(model)
    num_layers = read_num_layers(config)
    if max_group > max(2, num_layers):
        raise ConfigError(f"--max-group is {max_group}; the model has only {num_layers} layers")
    workloads = [Workload("decode", batch, tokens) for batch in batch_sizes for tokens in context_lens]
    workloads += [Workload("prefill", 1, tokens) for tokens in prefill_lens]
    options: dict[str, Any] = {
        "device": target,
        "dtype": resolve_dtype(dtype, target),
        "workloads": workloads,
        "max_group": max_group,
        "budget_s": seconds,
    }
    with show_steps(f"measuring {len(workloads)} workloads") as on_step:
        options["on_progress"] = lambda share: on_step(round(1000 * share), 1000)
        measured: LatencyProfile | None
        if emulate_tp is not None and all_reduce_us is not None:
            measured = emulate_profile_on_ranks(config, num_ranks=emulate_tp, all_reduce_us=all_reduce_us, **options)
        elif tp > 1:
            measured = measure_profile_on_ranks(config, num_ranks=tp, **options)
        else:
            measured = measure_profile(config, **options)
    if measured is None:  # a rank of torchrun that is not the first
        return {"profile": None}
    save_profile(measured, out)
    latency_model = LatencyModel(measured)
    deepest = _deepest(measured, max_group)
    document = {
        "profile": str(out),
        "device": measured.device,
        "num_ranks": measured.num_ranks,
        "emulated": measured.emulated,
        "dtype": measured.dtype,
        "runtime": measured.runtime,
        "workloads": len(measured.workloads),
        "baseline_latency_ms": latency_model.estimate_latency_ms(Plan.baseline(deepest.num_layers)),
        "least_depth": deepest.depth,
        "least_depth_latency_ms": latency_model.estimate_latency_ms(deepest),
        "check_error": max((w.check_error for w in measured.workloads if w.check_error is not None), default=None),
    }
    return Answer(document, _build_table(measured, max_group))


def _parse_counts(text: str, *, option: str, least: int) -> tuple[int, ...]:
    """Parse a list of numbers such as ``1,16,64``.

    Args:
        text: numbers between commas.
        option: for the message.
        least: smallest number that is allowed.

    Raises:
        ConfigError: for anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) >= least for part in parts):
        raise ConfigError(f"{option} {text}: expected whole numbers from {least} between commas, e.g. 1,16,64")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _deepest(measured: LatencyProfile, max_group: int) -> Plan:
    num_layers = measured.geometry.num_layers
    return Plan.from_groups(range(i, min(i + max_group, num_layers)) for i in range(0, num_layers, max_group))


def _build_table(measured: LatencyProfile, max_group: int) -> Table:
    """Lay out each workload: the unmodified model by every way of running it, and the deepest plan against them."""
    from rich import box
    from rich.table import Table

    from lpsearch.latency import LatencyModel

    where = f"{measured.num_ranks} x {measured.device}" if measured.num_ranks > 1 else measured.device
    title = f"{where}, {measured.dtype}, {measured.runtime}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("workload", "unmodified, ms", "fewest groups", "ms", "speed-up against", "off by", "GB/s a GPU"):
        table.add_column(column, justify="left" if column == "workload" else "right")
    deepest = _deepest(measured, max_group)
    for index, workload in enumerate(measured.workloads):
        time_ms = LatencyModel(measured, index).estimate_latency_ms(deepest)
        base = ", ".join(f"{mode} {ms:.2f}" for mode, ms in workload.unmodified_ms.items())
        gains = ", ".join(f"{mode} {ms / time_ms:.2f}x" for mode, ms in workload.unmodified_ms.items())
        error = "" if workload.check_error is None else f"{workload.check_error:.1%}"
        speed = "" if workload.achieved_gb_per_s is None else f"{workload.achieved_gb_per_s:.0f}"
        name = f"{workload.kind} {workload.batch_size} x {workload.context_len}"
        table.add_row(name, base, str(deepest.depth), f"{time_ms:.2f}", gains, error, speed)
    return table
