"""``optimize --dry-run``: what a study would take in memory, time and tokens, before a weight is read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group

from lpsearch.commands.console import Answer, adopt_optuna_log
from lpsearch.commands.facts import Grid, wrap_line
from lpsearch.commands.hardware import Hardware, parse_hardware
from lpsearch.commands.loading import describe_device, resolve_device, resolve_dtype
from lpsearch.commands.rehearsal import RehearsedStudy, rehearse_study
from lpsearch.commands.steps import format_seconds, show_steps
from lpsearch.config import OptimizeConfig, ResolvedConfig
from lpsearch.kinds import parse_kinds
from lpsearch.models import load_geometry, resolve_source
from lpsearch.models.aliases import name_model
from lpsearch.plan import load_plan
from lpsearch.search import PlanSpace

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from lpsearch.evaluation.probe import EvaluationRates, ModelSize

__all__ = ["forecast_study"]

logger = logging.getLogger(__name__)

_DISK_BYTES_PER_S = 1.5e9
"""Taken for reading weights; from a network it takes longer."""

_HOST_TO_DEVICE_BYTES_PER_S = 2e10
"""Taken for weights that are kept in host memory and brought to a GPU for each batch."""

_CACHE_SHARE = 0.5
"""Of the memory beside the weights: what the prefix cache takes at most (lpsearch.evaluation.prefix_cache)."""

_SPREAD_SHARE = 0.8
"""Of a GPU's memory that weights take where a model is spread (lpsearch.models.placement)."""

_MOST_CPU_CACHE_BYTES = 2 << 30


@dataclass(frozen=True)
class _Memory:
    """Bytes on the devices together, or on the host for a CPU.

    Attributes:
        weights: of the model there.
        elsewhere: weights that do not fit there, in host memory or on disk.
        activations: beside them in a batch.
        cache: hidden states that are kept for further plans.
        base: last hidden states of the unmodified model, for divergences.
        available: bytes of all devices.
    """

    weights: int
    elsewhere: int
    activations: int
    cache: int
    base: int
    available: int

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.cache + self.base

    @property
    def fits(self) -> bool:
        return self.total <= self.available


def forecast_study(config: ResolvedConfig, *, hardware: str | None) -> Answer:
    """Say what a study would take.

    Only the model's configuration is read. The layers are timed on this machine, on a few with made-up weights, or
    taken from a data sheet; the search itself runs on made-up losses, which counts its windows, what the prefix cache
    spares, and the time of sampler and database.

    Args:
        config: what the study would be begun with.
        hardware: GPUs by name; None measures the device of ``config``.

    Raises:
        ConfigError: for unknown hardware, and what the configuration and the model do not allow.
        LpsearchError: if the device cannot be measured.
    """
    from lpsearch.evaluation.probe import measure_model_size

    values = config.values
    named = None if hardware is None else parse_hardware(hardware)
    device = _resolve_device(values, named)
    dtype = _resolve_dtype(values, device, named)
    adopt_optuna_log()
    geometry = load_geometry(resolve_source(values.model))
    size = measure_model_size(geometry)
    rates = _find_rates(geometry, size, values, device=device, dtype=dtype, named=named)
    memory, cache_bytes = _plan_memory(size, values, rates, device=device, dtype=dtype, named=named)
    space = PlanSpace(size.num_layers, values.max_group, values.freeze, values.allow)
    for path in values.enqueue:
        space.check_plan(load_plan(path), where=f"--enqueue {path}")
    num_kinds = len(values.data)
    state_bytes = values.seq_len * size.hidden_size * dtype.itemsize
    with show_steps("rehearsing the search"):
        study = rehearse_study(
            space,
            budget=values.budget,
            num_windows=values.windows * num_kinds,
            kinds=parse_kinds(values.data),
            sampler=values.sampler,
            seed=values.seed,
            metric=values.metric,
            objective=values.objective,
            staged=values.staged,
            seq_len=values.seq_len,
            batch_size=_choose_batch_size(device, named, values.seq_len),
            state_bytes=state_bytes,
            cache_bytes=cache_bytes,
        )
    memory = _Memory(**{**vars(memory), "cache": max(study.proxy.held_bytes, study.heldout.held_bytes)})
    document = _build_document(values, size, rates, memory, study, device=device, dtype=dtype, named=named)
    _warn(values, memory)
    return Answer(document, _build_table(document))


def _resolve_device(values: OptimizeConfig, named: Hardware | None) -> torch.device:
    import torch

    return torch.device("cuda") if named is not None else resolve_device(values.device)


def _resolve_dtype(values: OptimizeConfig, device: torch.device, named: Hardware | None) -> torch.dtype:
    import torch

    if named is not None and values.dtype == "auto":
        return torch.bfloat16
    return resolve_dtype(values.dtype, device)


def _choose_batch_size(device: torch.device, named: Hardware | None, seq_len: int) -> int:
    from lpsearch.evaluation.evaluator import choose_batch_size

    return choose_batch_size(device, seq_len)


def _find_rates(
    geometry: PretrainedConfig,
    size: ModelSize,
    values: OptimizeConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    named: Hardware | None,
) -> EvaluationRates:
    """Measure how fast windows are evaluated, or take it from a data sheet."""
    from lpsearch.evaluation.evaluator import choose_batch_size
    from lpsearch.evaluation.probe import EvaluationRates, estimate_activation_bytes, measure_evaluation_rates

    num_heads = 2 if values.metric == "kl" else 1
    if named is None:
        with show_steps(f"timing layers on {describe_device(device)}"):
            return measure_evaluation_rates(
                geometry,
                device=device,
                dtype=dtype,
                seq_len=values.seq_len,
                num_windows=values.windows * len(values.data),
                metric=values.metric,
            )
    flops_per_s = named.get_flops_per_s(str(dtype).removeprefix("torch."))
    return EvaluationRates(
        layer_s=values.seq_len * size.count_layer_flops(values.seq_len) / flops_per_s,
        rest_s=values.seq_len * size.count_rest_flops(num_heads) / flops_per_s,
        activation_bytes=estimate_activation_bytes(
            size,
            num_tokens=min(values.windows, choose_batch_size(device, values.seq_len)) * values.seq_len,
            dtype_bytes=dtype.itemsize,
            num_heads=num_heads,
        ),
        probe_tokens=0,
    )


def _plan_memory(
    size: ModelSize,
    values: OptimizeConfig,
    rates: EvaluationRates,
    *,
    device: torch.device,
    dtype: torch.dtype,
    named: Hardware | None,
) -> tuple[_Memory, int]:
    """Return the memory of a study without its cache, and the bytes that the cache may take."""
    import torch

    from lpsearch.models.memory import find_free_bytes

    host_bytes = find_free_bytes(torch.device("cpu"))
    if named is not None:
        capacities = [int(named.gpu.memory_gib * 2**30)] * named.num_gpus
    elif device.type == "cuda" and values.device_map == "auto":
        capacities = [find_free_bytes(torch.device("cuda", n)) for n in range(torch.cuda.device_count())]
    else:
        capacities = [find_free_bytes(device)]
    weights = size.num_parameters * dtype.itemsize
    elsewhere = 0
    if values.device_map == "auto":
        elsewhere = max(0, weights - int(_SPREAD_SHARE * sum(capacities)))
    else:
        capacities = capacities[:1]
    weights -= elsewhere
    free = max(0, capacities[0] - weights // len(capacities))
    if device.type == "cuda" and values.cache_location == "device":
        cache_bytes = int(_CACHE_SHARE * free)
    elif device.type == "cuda":
        cache_bytes = host_bytes // 4
    else:
        cache_bytes = min(_MOST_CPU_CACHE_BYTES, free // 4)
    base = 0
    if values.metric == "kl":
        base = values.windows * len(values.data) * (values.seq_len - 1) * size.hidden_size * dtype.itemsize
    return _Memory(weights, elsewhere, rates.activation_bytes, 0, base, sum(capacities)), cache_bytes


def _build_document(
    values: OptimizeConfig,
    size: ModelSize,
    rates: EvaluationRates,
    memory: _Memory,
    study: RehearsedStudy,
    *,
    device: torch.device,
    dtype: torch.dtype,
    named: Hardware | None,
) -> dict[str, Any]:
    """Put the forecast together: what is expected, and for the proxy the least and the most."""
    num_windows = values.windows * len(values.data)
    tokens_per_window = values.seq_len - 1
    batches_s = memory.elsewhere / _HOST_TO_DEVICE_BYTES_PER_S if device.type == "cuda" else 0.0
    batch_size = _choose_batch_size(device, named, values.seq_len)

    def time_work(windows: float, layers: float) -> float:
        return layers * rates.layer_s + windows * rates.rest_s + batches_s * windows / batch_size

    proxy = study.proxy
    most = study.num_plans * num_windows
    least = num_windows + (study.num_plans - 1) * _count_first_rung(num_windows, len(values.data), staged=values.staged)
    share = proxy.layers / proxy.windows

    def time_search(windows: int) -> float:
        return max(time_work(windows, windows * share), study.books_s)

    heldout_s = time_work(study.heldout.windows, study.heldout.layers)
    total_bytes = memory.weights + memory.elsewhere
    seconds = {
        "loading": total_bytes / _DISK_BYTES_PER_S,
        "sampling": _time_sampling(values, size, rates),
        "search": time_search(proxy.windows),
        "search_least": time_search(least),
        "search_most": time_search(most),
        "heldout": heldout_s,
    }
    seconds["total"] = seconds["loading"] + seconds["sampling"] + seconds["search"] + heldout_s
    return {
        "dry_run": True,
        "model": values.model,
        "num_layers": size.num_layers,
        "num_parameters": size.num_parameters,
        "hardware": describe_device(device) if named is None else named.name,
        "measured": named is None,
        "dtype": str(dtype).removeprefix("torch."),
        "plans": study.num_plans,
        "front": study.num_front,
        "tokens": {
            "proxy": proxy.windows * tokens_per_window,
            "proxy_least": least * tokens_per_window,
            "proxy_most": most * tokens_per_window,
            "heldout": study.heldout.windows * tokens_per_window,
        },
        "layers_run_share": proxy.layers / proxy.layers_asked,
        "memory_bytes": {
            "weights": memory.weights,
            "weights_elsewhere": memory.elsewhere,
            "activations": memory.activations,
            "hidden_states": memory.cache,
            "base_hidden_states": memory.base,
            "total": memory.total,
            "available": memory.available,
            "fits": memory.fits,
        },
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "layer_window_ms": rates.layer_s * 1e3,
        "rest_window_ms": rates.rest_s * 1e3,
    }


def _count_first_rung(num_windows: int, num_kinds: int, *, staged: bool) -> int:
    """Return the windows on which every plan is evaluated."""
    from lpsearch.evaluation.rungs import split_by_rung

    return len(split_by_rung(range(num_windows), num_windows, num_kinds)[0]) if staged else num_windows


def _time_sampling(values: OptimizeConfig, size: ModelSize, rates: EvaluationRates) -> float:
    """Estimate the time of text that the model writes itself: a token costs each window what one of a window does.

    It is written token by token, so this is the least; on a GPU small models take longer.
    """
    specs = [kind.spec for kind in (*parse_kinds(values.data), *parse_kinds(values.heldout or values.data))]
    window_s = size.num_layers * rates.layer_s + rates.rest_s
    return sum(spec == "self" for spec in specs) * values.windows * window_s


def _warn(values: OptimizeConfig, memory: _Memory) -> None:
    """Say what does not fit, and what the forecast leaves out."""
    if not memory.fits:
        logger.warning(
            "this study does not fit: it takes %.1f GiB of %.1f; take a larger device, --dtype bfloat16, or "
            "--device-map auto over several",
            memory.total / 2**30,
            memory.available / 2**30,
        )
    if values.recover != "off":
        logger.warning("the time of a %s of every plan is not counted", values.recover)
    if values.latency == "auto":
        logger.info("measuring latency, about a minute on a GPU and some on a CPU, is not counted; nor is a download")


def _build_table(document: dict[str, Any]) -> Group:
    """Lay the forecast out for a person."""
    rows: list[Sequence[str]] = [("plans", f"{document['plans']:,}", "", "")]
    tokens, seconds, memory = document["tokens"], document["seconds"], document["memory_bytes"]

    def add(name: str, values: dict[str, Any], key: str, write: Callable[[Any], str]) -> None:
        others = [write(values[f"{key}_{end}"]) if f"{key}_{end}" in values else "" for end in ("least", "most")]
        rows.append((name, write(values[key]), *others))

    def write_bytes(count: int) -> str:
        return f"{count / 2**30:.2f} GiB"

    add("tokens of the search", tokens, "proxy", "{:,}".format)
    add("tokens of the held-out check", tokens, "heldout", "{:,}".format)
    add("loading", seconds, "loading", format_seconds)
    if seconds["sampling"]:
        add("sampling text", seconds, "sampling", format_seconds)
    add("search", seconds, "search", format_seconds)
    add("held-out check", seconds, "heldout", format_seconds)
    add("weights", memory, "weights", write_bytes)
    if memory["weights_elsewhere"]:
        add("weights in host memory or on disk", memory, "weights_elsewhere", write_bytes)
    add("activations", memory, "activations", write_bytes)
    add("hidden states that are kept", memory, "hidden_states", write_bytes)
    add("memory in all", memory, "total", write_bytes)
    add("memory that is there", memory, "available", write_bytes)
    title = f"{name_model(document['model'])} on {document['hardware']}, {document['dtype']}"
    return Group(wrap_line(title, "bold"), "", Grid(("", "expected", "least", "most"), rows, left=("",)))
