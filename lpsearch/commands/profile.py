"""``lpsearch profile``: latency of a model's shape on this machine, as a file for another."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group

from lpsearch.commands.checks import read_num_layers
from lpsearch.commands.console import Answer
from lpsearch.commands.facts import Facts, Grid, Kept, Row
from lpsearch.commands.loading import resolve_device, resolve_dtype
from lpsearch.commands.options import DeviceOption, DtypeOption, ModelOption
from lpsearch.commands.outputs import check_output_file
from lpsearch.commands.steps import show_steps
from lpsearch.config import parse_allowed
from lpsearch.errors import ConfigError, UsageError
from lpsearch.latency.mix import Workload, parse_mix
from lpsearch.latency.profile import Engine
from lpsearch.latency.workload import check_workloads, limit_context
from lpsearch.plan import Plan
from lpsearch.wording import name_count

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from lpsearch.latency import LatencyProfile
    from lpsearch.latency.profile import WorkloadProfile

__all__ = ["profile"]

logger = logging.getLogger(__name__)

_DEFAULT_CONTEXT = 1024
_DEEPEST = "fewest groups"
_DIGITS = {_DEEPEST: 2, "an attention dropped": 3, "an MLP dropped": 3}
"""After the point, by plan: what one branch takes is little."""

_MAX_DIGITS = 12
"""Of a number of sequences or tokens; no machine holds more."""


def profile(
    model: ModelOption = None,
    out: Annotated[Path, typer.Option(help="profile file to write", metavar="FILE")] = Path("profile.json"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a file that is there")] = False,
    batch: Annotated[
        str | None, typer.Option(help="sequences decoded together, e.g. 1,16,64", show_default="1")
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            help="cached tokens of each sequence, e.g. 1024,4096",
            show_default="1024, or as many as the model reads",
        ),
    ] = None,
    prefill: Annotated[str | None, typer.Option(help="tokens of prompts to time as well, e.g. 2048")] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="workloads instead of --batch, --context and --prefill, e.g. decode:64x4096; may be repeated"
        ),
    ] = None,
    max_group: Annotated[int, typer.Option(help="most layers in a group", min=2)] = 2,
    allow: Annotated[
        str, typer.Option(help="what plans may do: joins, drops (or drop-attention, drop-mlp), e.g. joins,drops")
    ] = "joins",
    engine: Annotated[
        Engine, typer.Option(help="what is timed: lpsearch's own runtime, or the engine that you serve with")
    ] = "runtime",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    tp: Annotated[int, typer.Option(help="GPUs that share the model (tensor parallelism)", min=1)] = 1,
    emulate_tp: Annotated[int | None, typer.Option(help="estimate for so many GPUs from one of them", min=2)] = None,
    all_reduce_us: Annotated[
        float | None, typer.Option(help="with --emulate-tp: time of one sum over those GPUs", min=0)
    ] = None,
    seconds: Annotated[float, typer.Option(help="about how long each workload is timed", min=0)] = 15.0,
) -> Answer | dict[str, Any]:
    """Measure the latency of a model's shape at a few depths, in one engine; needs no weights for a known alias."""
    if model is None:
        raise ConfigError("no model was named; give --model ALIAS (`lpsearch models` lists them), a hub id or a path")
    if (emulate_tp is None) != (all_reduce_us is None):
        raise ConfigError("--emulate-tp and --all-reduce-us go together: how many GPUs, and what a sum over them takes")
    if emulate_tp is not None and tp != 1:
        raise ConfigError("--tp measures real GPUs and --emulate-tp estimates; give one of them")
    if workload and not (batch is context is prefill is None):
        raise ConfigError("--workload says what is measured, and so do --batch, --context and --prefill; drop either")
    requested = _Requested(
        mix=tuple(parse_mix(workload or ())),
        batch_sizes=_parse_counts(batch or "1", option="--batch", least=1),
        context_lens=None if context is None else _parse_counts(context, option="--context", least=0),
        prefill_lens=() if prefill is None else _parse_counts(prefill, option="--prefill", least=1),
    )
    check_output_file(out)
    if out.exists() and not overwrite:
        raise UsageError(f"--out {out}: is there already; add --overwrite to replace it, or name another file")
    from lpsearch.latency import save_profile
    from lpsearch.latency.engines import check_engine_package
    from lpsearch.models import load_geometry

    check_engine_package(engine)
    target = resolve_device(device)
    config = load_geometry(model)
    num_layers = read_num_layers(config)
    if max_group > max(2, num_layers):
        raise ConfigError(f"--max-group is {max_group}; the model has only {num_layers} layers")
    try:
        allowed = parse_allowed([allow])
    except ValueError as error:
        raise ConfigError(f"--allow {allow}: {error}") from None
    max_group = max_group if "joins" in allowed else 1
    workloads = requested.list_workloads(config)
    _check_engine(engine, config, target, workloads, num_ranks=emulate_tp or tp)
    measured = _measure(
        config,
        engine=engine,
        num_ranks=tp,
        emulated_ranks=emulate_tp,
        all_reduce_us=all_reduce_us,
        device=target,
        dtype=resolve_dtype(dtype, target),
        workloads=workloads,
        max_group=max_group,
        allow=allowed,
        budget_s=seconds,
    )
    if measured is None:  # a rank of torchrun that is not the first
        return {"profile": None}
    save_profile(measured, out)
    _warn_of_errors(measured, out)
    extremes = _list_extremes(measured, max_group, allowed)
    document = _build_document(measured, out, extremes)
    return Answer(document, Group(_describe(model, measured, out), "", _build_table(measured, extremes)))


@dataclass(frozen=True)
class _Requested:
    """The workloads that are measured, or numbers whose combinations are; no ``context_lens`` is the default."""

    mix: tuple[Workload, ...]
    batch_sizes: tuple[int, ...]
    context_lens: tuple[int, ...] | None
    prefill_lens: tuple[int, ...]

    def list_workloads(self, config: PretrainedConfig) -> list[Workload]:
        """Return the workloads that were named, or every batch with every context, then the prompts.

        Raises:
            ConfigError: for more tokens than the model reads.
        """
        if self.mix:
            check_workloads(config, self.mix, are_named=True)
            return list(self.mix)
        context_lens = self.context_lens or (limit_context(config, _DEFAULT_CONTEXT),)
        workloads = [Workload("decode", batch, tokens) for batch in self.batch_sizes for tokens in context_lens]
        workloads += [Workload("prefill", 1, tokens) for tokens in self.prefill_lens]
        check_workloads(config, workloads)
        return workloads


def _check_engine(
    engine: Engine, config: PretrainedConfig, device: torch.device, workloads: Sequence[Workload], *, num_ranks: int
) -> None:
    """Refuse what another engine than the runtime cannot time."""
    if engine == "runtime":
        return
    from lpsearch.latency.engines import check_engine
    from lpsearch.models.traits import read_traits

    check_engine(engine, read_traits(config), device=device, workloads=workloads, num_ranks=num_ranks)


def _measure(
    config: PretrainedConfig,
    *,
    engine: Engine,
    num_ranks: int,
    emulated_ranks: int | None,
    all_reduce_us: float | None,
    workloads: Sequence[Workload],
    **options: Any,
) -> LatencyProfile | None:
    """Measure on one device, on ranks, or on one of several that are not there.

    Returns:
        The profile; None on all ranks of ``torchrun`` but the first.
    """
    from lpsearch.latency import emulate_profile_on_ranks, measure_profile, measure_profile_on_ranks

    options["workloads"] = workloads
    with show_steps(f"measuring {name_count(len(workloads), 'workload')}") as on_step:
        options["on_progress"] = lambda share: on_step(round(1000 * share), 1000)
        if emulated_ranks is not None and all_reduce_us is not None:
            return emulate_profile_on_ranks(config, num_ranks=emulated_ranks, all_reduce_us=all_reduce_us, **options)
        if num_ranks > 1:
            return measure_profile_on_ranks(config, num_ranks=num_ranks, **options)
        return measure_profile(config, engine=engine, **options)


def _warn_of_errors(measured: LatencyProfile, out: Path) -> None:
    """Warn of the worst workload whose estimates are far off."""
    from lpsearch.latency.profile import describe_profile_error

    worst = max(measured.workloads, key=lambda workload: workload.mean_error or 0.0)
    warning = describe_profile_error(worst.mean_error, name=f"{out}, {_name_workload(worst)}")
    if warning is not None:
        logger.warning("%s", warning)


def _build_document(measured: LatencyProfile, out: Path, extremes: Mapping[str, Plan]) -> dict[str, Any]:
    """Build the last line of stdout; the times are those of the first workload."""
    from lpsearch.latency import LatencyModel

    latency_model = LatencyModel(measured)
    unmodified = Plan.baseline(measured.geometry.num_layers)
    deepest = extremes.get(_DEEPEST, unmodified)
    return {
        "profile": str(out),
        "device": measured.device,
        "num_ranks": measured.num_ranks,
        "emulated": measured.emulated,
        "dtype": measured.dtype,
        "engine": measured.engine,
        "runtime": measured.runtime,
        "workloads": len(measured.workloads),
        "baseline_latency_ms": next(iter(latency_model.estimate_unmodified_ms().values())),
        "least_depth": deepest.depth,
        "least_depth_latency_ms": latency_model.estimate_latency_ms(deepest),
        "saved_ms": {
            what: latency_model.estimate_latency_ms(unmodified) - latency_model.estimate_latency_ms(plan)
            for what, plan in extremes.items()
            if what != _DEEPEST
        },
        "kv_bytes_per_token": latency_model.estimate_kv_bytes_per_token(unmodified),
        "check_error": max((w.check_error for w in measured.workloads if w.check_error is not None), default=None),
    }


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
    are_numbers = all(part.isascii() and part.isdigit() and len(part) <= _MAX_DIGITS for part in parts)
    if not are_numbers or any(int(part) < least for part in parts):
        raise ConfigError(f"{option} {text}: expected whole numbers from {least} between commas, e.g. 1,16,64")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _list_extremes(measured: LatencyProfile, max_group: int, allow: Collection[str]) -> dict[str, Plan]:
    """Return plans that show what there is to gain: as many joins as there can be, and each drop by itself.

    A branch is dropped where there is one kind of layer; of several kinds, that of the first layer.
    """
    num_layers = measured.geometry.num_layers
    plans = {}
    if "joins" in allow:
        starts = range(0, num_layers, max_group)
        plans[_DEEPEST] = Plan.from_groups(range(i, min(i + max_group, num_layers)) for i in starts)
    unmodified = Plan.baseline(num_layers)
    if "drop-attention" in allow:
        plans["an attention dropped"] = unmodified.drop({"attention": [0]})
    if "drop-mlp" in allow:
        plans["an MLP dropped"] = unmodified.drop({"mlp": [0]})
    return plans


def _name_workload(workload: WorkloadProfile) -> str:
    return f"{workload.kind} {workload.batch_size} x {workload.context_len}"


def _describe(model: str, measured: LatencyProfile, out: Path) -> Facts:
    """Say what was measured, and where it is written."""
    geometry = measured.geometry
    where = measured.device if measured.num_ranks == 1 else f"{measured.num_ranks} x {measured.device}"
    first = measured.workloads[0]
    layers = f"{geometry.num_layers} layers" + (
        "" if first.num_layers_measured == geometry.num_layers else f", {first.num_layers_measured} of them built"
    )
    rows: list[Row] = [
        ("profile", out),
        ("model", f"{model}: {layers}, {measured.dtype}"),
        ("device", f"{where}{', emulated from one' if measured.emulated else ''}"),
        ("engine", f"{measured.engine}: {measured.runtime}, {name_count(measured.num_threads, 'CPU thread')}"),
        ("measured", f"{name_count(len(first.points), 'depth')} of each workload, {_describe_samples(measured)}"),
        ("use it", Kept(shlex.join(["lpsearch", "optimize", "--model", model, "--latency", str(out)]))),
    ]
    return Facts(rows)


def _describe_samples(measured: LatencyProfile) -> str:
    least = min(point.num_samples for workload in measured.workloads for point in workload.points)
    return f"each timed {least:,} times or more; the model's shape with random weights"


def _build_table(measured: LatencyProfile, extremes: Mapping[str, Plan]) -> Grid:
    """Lay out each workload: the unmodified model by every way of running it, and what plans take against it."""
    from lpsearch.latency import LatencyModel

    speed = "GB/s a GPU" if measured.num_ranks > 1 else "GB/s"
    columns = ("workload", "unmodified ms", "plan", "depth", "ms", "speed-up against", "off by", speed)
    rows = []
    for index, workload in enumerate(measured.workloads):
        latency_model = LatencyModel(measured, index)
        unmodified_ms = latency_model.estimate_unmodified_ms()
        base = "\n".join(f"{mode} {ms:.2f}" for mode, ms in unmodified_ms.items())
        error = "" if workload.check_error is None else f"{workload.check_error:.1%}"
        achieved = "" if workload.achieved_gb_per_s is None else f"{workload.achieved_gb_per_s:.3g}"
        cells = [_name_workload(workload), base]
        for what, plan in extremes.items():
            time_ms = latency_model.estimate_latency_ms(plan)
            gains = "\n".join(f"{mode} {ms / time_ms:.{_DIGITS[what]}f}x" for mode, ms in unmodified_ms.items())
            rows.append((*cells, what, str(plan.depth), f"{time_ms:.{_DIGITS[what]}f}", gains, error, achieved))
            cells, error, achieved = ["", ""], "", ""
    return Grid(columns, rows, left=("workload", "plan"))
