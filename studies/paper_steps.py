"""What ``paper.py`` measures itself, and how its steps are kept: losses and tasks, step times, and the steps' files.

Searches and repairs are the commands ``lpsearch optimize`` and ``lpsearch recover``, run in this process.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from lpsearch.commands.app import app
from lpsearch.commands.console import Answer
from lpsearch.commands.loading import describe_device
from lpsearch.commands.tasks import TaskRun
from lpsearch.data import Windows
from lpsearch.errors import LpsearchError, ResumeError, StudyError, describe_error
from lpsearch.evaluation import ModelEvaluator, compute_paired_delta
from lpsearch.json_file import load_json
from lpsearch.latency import LatencyModel, LatencyProfile
from lpsearch.latency.fallback import TransformersSteps
from lpsearch.latency.runtime.steps import RuntimeSteps
from lpsearch.latency.sums import OneRank
from lpsearch.latency.timing import bootstrap_ratio, measure_interleaved
from lpsearch.latency.workload import StepBuilder, Workload
from lpsearch.models import LoadedModel
from lpsearch.models.traits import read_traits
from lpsearch.plan import Plan, load_plan, write_json
from lpsearch.recovery import read_recovery, swapped_weights
from lpsearch.transform import applied_plan
from lpsearch.versions import read_versions

__all__ = [
    "UNMODIFIED",
    "Variant",
    "is_done",
    "measure_times",
    "read_times",
    "run_command",
    "run_step",
    "score_variants",
]

logger = logging.getLogger(__name__)

UNMODIFIED = "unmodified"


@dataclass(frozen=True)
class Variant:
    """A plan, with the model's own weights or with repaired ones.

    Attributes:
        plan: the plan.
        recovered: directory that ``recover`` wrote; None for the model's own weights.
    """

    plan: Plan
    recovered: Path | None = None


def is_done(file: Path, settings: Mapping[str, Any]) -> bool:
    """Say whether a step was finished before, with the same settings.

    Raises:
        ResumeError: if it was finished with other settings.
        StudyError: if its file is damaged.
    """
    if not file.exists():
        return False
    try:
        recorded = load_json(file)["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{file}: is damaged ({error!r}); move it away, and its step runs again") from None
    asked = json.loads(json.dumps(settings))
    different = [name for name in {**recorded, **asked} if recorded.get(name) != asked.get(name)]
    if different:
        name = different[0]
        raise ResumeError(
            f"{file}: the step was made with {name} {recorded.get(name)!r}, and {asked.get(name)!r} is asked for now; "
            "give another --out, or move the file and what its step wrote away"
        )
    return True


def run_step(
    file: Path, settings: Mapping[str, Any], device: torch.device, run: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what a step found: from its file if it was finished before, or else run it and write the file.

    Args:
        file: of the step.
        settings: what decides the result; JSON values.
        device: what it runs on, for the record.
        run: the step.

    Raises:
        ResumeError: if it was finished with other settings.
        StudyError: if its file is damaged.
    """
    if is_done(file, settings):
        logger.info("%s is there already", file)
    else:
        logger.info("running the step %s", file)
        began = time.monotonic()
        result = run()
        document = {
            "settings": settings,
            "result": result,
            "seconds": round(time.monotonic() - began, 3),
            "device": describe_device(device),
            "versions": read_versions(),
        }
        write_json(document, file)
    found: dict[str, Any] = load_json(file)
    return found


def run_command(arguments: Sequence[str]) -> dict[str, Any]:
    """Run an ``lpsearch`` command line in this process, and return its JSON object.

    Raises:
        LpsearchError: as the command.
    """
    try:
        answer = app(args=list(arguments), prog_name="lpsearch", standalone_mode=False).run()
        return dict(answer.document if isinstance(answer, Answer) else answer)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def score_variants(
    loaded: LoadedModel, variants: Mapping[str, Variant], texts: Mapping[str, Windows], tasks: TaskRun | None
) -> dict[str, Any]:
    """Measure the loss on every text and the scores on tasks, of the unmodified model and of every variant.

    Args:
        loaded: the unmodified model.
        variants: by name.
        texts: windows by name.
        tasks: None for losses alone.

    Returns:
        ``losses`` by variant and text, each with ``nll``, ``perplexity``, ``delta_nll`` and ``delta_nll_se`` in nats
        per token (null where not finite), and what the tasks' own document holds.
    """
    baseline = Variant(Plan.baseline(loaded.identity.num_layers))
    losses: dict[str, dict[str, Any]] = {name: {} for name in (UNMODIFIED, *variants)}
    for text, windows in texts.items():
        evaluator = ModelEvaluator(model=loaded.model, windows=windows, cache_bytes=0)
        base: tuple[float, ...] | None = None
        for name, variant in {UNMODIFIED: baseline, **variants}.items():
            with _repaired(loaded, variant) as plan:
                found = evaluator.evaluate_windows(plan, range(windows.num_windows), variant=name).nll_nats_per_token
            base = base or found
            losses[name][text] = _describe_loss(found, base)
    document: dict[str, Any] = {"losses": losses}
    if tasks is not None:
        entered = {UNMODIFIED: nullcontext, **{name: _enter(loaded, variant) for name, variant in variants.items()}}
        document |= tasks.score(loaded, entered).build_document()
    return document


@contextmanager
def _repaired(loaded: LoadedModel, variant: Variant) -> Iterator[Plan]:
    """Give the model the repaired weights of a variant for a while; yields the plan to run it under."""
    weights = {}
    if variant.recovered is not None:
        weights = read_recovery(loaded.model, load_plan(variant.recovered), variant.recovered)
    with swapped_weights(loaded.model, weights):
        yield dataclasses.replace(variant.plan, metadata=None)  # whose fingerprint is of the model's own weights


def _enter(loaded: LoadedModel, variant: Variant) -> Callable[[], Any]:
    @contextmanager
    def enter() -> Iterator[None]:
        with _repaired(loaded, variant) as plan, applied_plan(loaded.model, plan):
            yield

    return enter


def _describe_loss(found: Sequence[float], base: Sequence[float]) -> dict[str, float | None]:
    nll = statistics.fmean(found)
    delta = compute_paired_delta(found, base)
    values = {
        "nll": nll,
        "perplexity": math.exp(nll) if nll < 700 else math.inf,
        "delta_nll": delta.delta,
        "delta_nll_se": delta.standard_error,
    }
    return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}


@torch.inference_mode()
def measure_times(
    config: PretrainedConfig,
    plans: Mapping[str, Plan],
    workload: Workload,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
) -> dict[str, Any]:
    """Time a step of the unmodified model and of every plan, in each mode of the runtime on its own.

    Within a mode all of them run interleaved, so that a plan is only compared with the unmodified model in that mode.

    Args:
        config: the model's shape; weights are random.
        plans: by name.
        workload: what is timed.
        device: a GPU.
        dtype: of weights and cache.
        seconds: about how long each mode is timed.

    Returns:
        ``runtime``; and ``modes``: by mode and name ``latency_ms``, ``p10_ms``, ``p90_ms``, ``speedup`` against the
        unmodified model in the same mode, and its 95 % ``interval``.

    Raises:
        FamilyError: if transformers cannot build the model from its configuration.
        LpsearchError: if the model does not fit on the device.
    """
    traits = read_traits(config)
    builder: StepBuilder
    if traits.runtime_obstacle is None:
        builder = RuntimeSteps(traits, workload, device=device, dtype=dtype, ranks=OneRank())
    else:
        builder = TransformersSteps(traits, workload, device=device, dtype=dtype)
    if not builder.fuses:
        return {"runtime": builder.runtime, "modes": {}, "left_out": "its groups do not run as one wide layer"}
    try:
        builder.reserve(traits.num_layers)
    except torch.OutOfMemoryError as error:
        raise LpsearchError(
            f"the model does not fit on {device} to be timed ({describe_error(error)}); use a larger device, fewer "
            "--context or --batch, --latency with a profile of several GPUs, or --no-times"
        ) from None
    named = {UNMODIFIED: Plan.baseline(traits.num_layers), **plans}
    modes: dict[str, dict[str, Any]] = {}
    for mode in builder.modes:
        steps = [builder.build(plan, range(traits.num_layers), mode).run for plan in named.values()]
        timings = measure_interleaved(steps, device=device, ranks=builder.ranks, budget_s=seconds)
        modes[mode] = {}
        for name, timing in zip(named, timings, strict=True):
            speedup, low, high = bootstrap_ratio(timings[0], timing)
            modes[mode][name] = {
                "latency_ms": timing.median_ms,
                "p10_ms": timing.p10_ms,
                "p90_ms": timing.p90_ms,
                "speedup": speedup,
                "interval": [low, high],
            }
    return {"runtime": builder.runtime, "modes": modes}


def read_times(profile: LatencyProfile, plans: Mapping[str, Plan]) -> dict[str, Any]:
    """Estimate the same from a profile file, of its first workload; only the mode that its costs are of has plans.

    Raises:
        ConfigError: for a group that was not measured.
    """
    latency_model = LatencyModel(profile)
    unmodified_ms = latency_model.estimate_unmodified_ms()
    mode, *others = unmodified_ms
    named = {UNMODIFIED: Plan.baseline(profile.geometry.num_layers), **plans}
    modes = {other: {UNMODIFIED: {"latency_ms": unmodified_ms[other], "speedup": 1.0}} for other in others}
    modes[mode] = {
        name: {
            "latency_ms": latency_model.estimate_latency_ms(plan),
            "speedup": latency_model.estimate_speedup(plan),
        }
        for name, plan in named.items()
    }
    return {
        "runtime": profile.runtime,
        "device": profile.device,
        "num_ranks": profile.num_ranks,
        "emulated": profile.emulated,
        "mean_error": latency_model.workload.mean_error,
        "modes": modes,
    }
