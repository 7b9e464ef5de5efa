"""Where the plans of a search are evaluated: in this process, in others of this machine, or on a Ray cluster.

Importing this module, as every worker does before its environment is set, imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

from lpsearch.commands.evaluators import EvaluatorName, Evaluators
from lpsearch.commands.steps import show_steps
from lpsearch.config import CacheLocation, Metric, OptimizeConfig
from lpsearch.errors import ConfigError, ModelError
from lpsearch.search import Pool, ThreadPool
from lpsearch.search.workers import BuildEvaluators, Launcher, LocalLauncher, RayLauncher, WorkerPool

if TYPE_CHECKING:
    from lpsearch.config import Split
    from lpsearch.data import Windows
    from lpsearch.evaluation.losses import PlanEvaluator
    from lpsearch.models import LoadedModel

__all__ = ["Recipe", "SearchPools", "build_worker_evaluators", "check_workers", "open_pools", "uses_workers"]

SearchPools = Mapping[EvaluatorName, Pool]
"""What evaluates the plans of a search, by what it does; all in the same slots."""


@dataclass(frozen=True)
class Recipe:
    """What a worker needs to evaluate as its coordinator would; small, since it travels.

    Attributes:
        source: where the model is found, as a study records it.
        fingerprint: of the model that the study was begun with.
        device: torch device of the worker.
        dtype: of the weights.
        trust_remote_code: run the model's own Python code.
        windows: what is evaluated on, by split.
        calibration: what plans are refitted on; None without repair.
        metric: the loss that is searched.
        cache_location: where hidden states are kept for further plans.
        spread: let accelerate spread the layers over all GPUs of the worker.
    """

    source: Mapping[str, Any]
    fingerprint: str
    device: str
    dtype: str
    trust_remote_code: bool
    windows: Mapping[Split, Windows]
    calibration: Windows | None
    metric: Metric
    cache_location: CacheLocation
    spread: bool


def uses_workers(values: OptimizeConfig) -> bool:
    """Say whether plans are evaluated in other processes than the coordinator's."""
    return values.executor == "ray" or (values.workers or 1) > 1 or bool(values.gpus_per_worker)


def check_workers(values: OptimizeConfig) -> None:
    """Refuse options of workers that do not go together, before anything is opened.

    Raises:
        ConfigError: naming them.
    """
    if values.executor != "ray" and values.ray_address is not None:
        raise ConfigError(f"--ray-address {values.ray_address} is of no use without --executor ray; add it, or drop it")
    if not uses_workers(values):
        return
    if values.device.startswith("cuda:"):
        raise ConfigError(
            f"--device {values.device} names one GPU, and each worker has its own; give --device cuda, and choose "
            "GPUs by CUDA_VISIBLE_DEVICES"
        )
    if values.device == "cpu" and values.gpus_per_worker:
        raise ConfigError(f"--gpus-per-worker {values.gpus_per_worker} goes with GPUs, not with --device cpu")


@contextmanager
def open_pools(
    values: OptimizeConfig,
    loaded: LoadedModel,
    windows: Mapping[Split, Windows],
    calibration: Windows | None,
    *,
    device_name: str,
) -> Iterator[SearchPools]:
    """Open what evaluates the plans of a search.

    With workers, the model of this process makes room for theirs: its weights are given up.

    Args:
        values: the configuration.
        loaded: the model that the study is about.
        windows: what is evaluated on, by split.
        calibration: what plans are refitted on; None without repair.
        device_name: what this process evaluates on, as results record it.

    Raises:
        ConfigError: for more workers than GPUs, or a Ray cluster that is not there.
        LpsearchError: if no worker can evaluate.
    """
    with ExitStack() as stack:
        if not uses_workers(values):
            evaluators = Evaluators(
                loaded.model,
                windows,
                metric=values.metric,
                calibration=calibration,
                cache_location=values.cache_location,
            )
            named = evaluators.list_named(device_name=device_name)
            yield {name: stack.enter_context(ThreadPool(evaluator)) for name, evaluator in named.items()}
            return
        recipe = Recipe(
            source=loaded.source.to_dict(),
            fingerprint=loaded.identity.fingerprint,
            device=loaded.model.device.type if values.device == "auto" else values.device,
            dtype=str(loaded.model.dtype).removeprefix("torch."),
            trust_remote_code=values.trust_remote_code,
            windows=windows,
            calibration=calibration,
            metric=values.metric,
            cache_location=values.cache_location,
            spread=values.device_map == "auto",
        )
        launcher = _build_launcher(values, recipe)
        _release_weights(loaded)
        with show_steps("loading the model on the workers"):
            pool = stack.enter_context(WorkerPool(launcher))
        yield {name: pool.view(name) for name in get_args(EvaluatorName)}


def build_worker_evaluators(recipe: Recipe) -> Mapping[str, PlanEvaluator]:
    """Load the model of a study in a worker, and build what evaluates there.

    Args:
        recipe: what the coordinator says of the study.

    Raises:
        ModelError: if the model that is found here is another one.
        SourceError: if it cannot be fetched.
    """
    from lpsearch.commands.loading import describe_device, resolve_device, resolve_dtype
    from lpsearch.models import ModelSource, load_model

    device = resolve_device(recipe.device)
    loaded = load_model(
        ModelSource.from_dict(recipe.source),
        device=device,
        dtype=resolve_dtype(recipe.dtype, device),
        trust_remote_code=recipe.trust_remote_code,
        spread=recipe.spread,
    )
    if loaded.identity.fingerprint != recipe.fingerprint:
        raise ModelError(
            f"{loaded.source.id}: the worker found another model (fingerprint {loaded.identity.fingerprint}) than the "
            f"study's ({recipe.fingerprint}); put the same one there"
        )
    evaluators = Evaluators(
        loaded.model,
        recipe.windows,
        metric=recipe.metric,
        calibration=recipe.calibration,
        cache_location=recipe.cache_location,
    )
    named = evaluators.list_named(device_name=describe_device(device))
    return {name: evaluator for name, evaluator in named.items()}  # noqa: C416 - the keys are any string here


def _build_launcher(values: OptimizeConfig, recipe: Recipe) -> Launcher:
    """Build what starts the workers.

    Raises:
        ConfigError: for more workers than GPUs, or a Ray cluster that is not there.
    """
    build: BuildEvaluators = partial(build_worker_evaluators, recipe)
    needs_gpu = recipe.device != "cpu"
    gpus_per_worker = int(needs_gpu) if values.gpus_per_worker is None else values.gpus_per_worker
    if values.executor == "ray":
        return RayLauncher(
            build, address=values.ray_address, num_workers=values.workers, gpus_per_worker=gpus_per_worker
        )
    if not gpus_per_worker:
        num_workers = values.workers or 1
        return LocalLauncher(build, num_workers=num_workers, environments=[_share_cpus(num_workers)])
    gpus = _list_gpus()
    num_workers = values.workers or max(1, len(gpus) // gpus_per_worker)
    if num_workers * gpus_per_worker > len(gpus):
        raise ConfigError(
            f"--workers {num_workers} with {gpus_per_worker} GPUs each need {num_workers * gpus_per_worker} GPUs, and "
            f"this machine has {len(gpus)}; give fewer, or --executor ray to use other machines"
        )
    own = [gpus[first : first + gpus_per_worker] for first in range(0, num_workers * gpus_per_worker, gpus_per_worker)]
    return LocalLauncher(
        build,
        num_workers=num_workers,
        environments=[{"CUDA_VISIBLE_DEVICES": ",".join(share), **_share_cpus(num_workers)} for share in own],
    )


def _list_gpus() -> list[str]:
    """Return the GPUs that this process sees, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = [str(index) for index in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    return [name.strip() for name in named][: torch.cuda.device_count()]


def _share_cpus(num_workers: int) -> dict[str, str]:
    """Return an environment in which a worker computes in its share of the CPUs, unless the user says how many."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // num_workers))}


def _release_weights(loaded: LoadedModel) -> None:
    """Give up the weights of this process's model; its configuration and dtype stay."""
    import torch

    torch.nn.Module.to(loaded.model, "meta")
    torch.cuda.empty_cache()  # nothing where no GPU was used
