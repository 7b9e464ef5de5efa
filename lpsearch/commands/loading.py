"""What commands that run a model share: the device, the dtype, and the model that a plan is for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpsearch.commands.checks import read_config
from lpsearch.commands.steps import show_steps
from lpsearch.errors import ConfigError, PlanError, describe_error
from lpsearch.models.aliases import name_model
from lpsearch.plan import Plan

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from lpsearch.data import Windows
    from lpsearch.models import LoadedModel, ModelSource
    from lpsearch.models.conversion import WeightlessCheck

__all__ = [
    "describe_device",
    "fits_in_float32",
    "load_for_search",
    "load_model_of_plan",
    "resolve_device",
    "resolve_dtype",
    "resolve_source_of_plan",
    "settle_dtype",
]

logger = logging.getLogger(__name__)

_WEIGHTS_SHARE = 0.7
"""Share of the free memory that weights may take during the check of a dtype; activations take the rest."""


def _accept(*parts: object) -> None:
    """Refuse nothing."""


def resolve_device(name: str) -> torch.device:
    """Return the device that a name means; ``auto`` is the first GPU if there is one.

    Raises:
        ConfigError: for a name that torch does not know or a device that is not there.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device {name}: not a device of this machine ({describe_error(error)}); try cpu or auto"
        ) from None
    return device


def describe_device(device: torch.device) -> str:
    """Return the name under which results on a device are recorded, e.g. ``NVIDIA H100 80GB HBM3`` or ``cpu``."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that a name means on a device; ``auto`` is bfloat16 where the device is fast at it."""
    import torch

    from lpsearch.evaluation import choose_dtype

    if name == "auto":
        return choose_dtype(device)
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"--dtype {name}: not a dtype; choose auto, float32, bfloat16 or float16")
    return dtype


def resolve_source_of_plan(plan: Plan, model: str | None) -> ModelSource:
    """Return where to find the model that a plan is for, or the one to take in its place.

    Args:
        plan: a plan read from a file.
        model: what to load instead of the model that the plan names, e.g. a local copy of it.

    Raises:
        ModelError: if there is no such model.
        PlanError: for a plan that names a path relative to wherever the command runs.
    """
    from lpsearch.models import resolve_source

    assert plan.metadata is not None  # a plan file has it
    identity = plan.metadata.model
    if model:
        return resolve_source(model)
    source = resolve_source(identity.id, revision=identity.revision)
    if source.path is not None and not Path(identity.id).is_absolute():  # a directory that happens to be here
        raise PlanError(
            f"the plan names its model {identity.id!r}, which would be {source.path} here; a plan names a local model "
            "by its whole path: name the model with --model"
        )
    return source


def load_model_of_plan(
    plan: Plan,
    *,
    model: str | None,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool,
    check: Callable[[PretrainedConfig], None] = _accept,
    check_tokenizer: WeightlessCheck = _accept,
    spread: bool = False,
) -> LoadedModel:
    """Load the model that a plan is for.

    Args:
        plan: a plan read from a file; of one whose weights were repaired, the unmodified model is loaded.
        model: what to load instead of the model that the plan names, e.g. a local copy of it.
        device: where to.
        dtype: of the weights.
        trust_remote_code: run the model's own Python code from the hub.
        check: refuses a configuration, as soon as it is known.
        check_tokenizer: refuses a configuration with its tokenizer, before the weights are read.
        spread: spread it over all GPUs, host memory and disk.

    Raises:
        PlanError: if the plan is for another model.
        ModelError: if there is no such model.
        SourceError: if it cannot be fetched.
    """
    from lpsearch.models import load_model
    from lpsearch.transform import check_plan_layers, check_plan_model

    source = resolve_source_of_plan(plan, model)

    def check_config(config: PretrainedConfig) -> None:
        check_plan_layers(plan, config)
        check(config)

    def check_before_weights(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        check_config(config)
        check_tokenizer(config, tokenizer)

    config = read_config(source, trust_remote_code=trust_remote_code)
    if config is not None:  # before anything is fetched
        check_config(config)
    with show_steps(f"loading {name_model(source.id)} on {describe_device(device)}", unit="bytes") as on_download:
        loaded = load_model(
            source,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            before_weights=check_before_weights,
            spread=spread,
            on_download=on_download,
        )
    check_plan_model(plan.without_recovery(), loaded.model)
    return loaded


def load_for_search(
    source: ModelSource,
    *,
    device: torch.device,
    dtype: str,
    trust_remote_code: bool,
    check: Callable[[PretrainedConfig], None] = _accept,
    spread: bool = False,
) -> LoadedModel:
    """Load a model in the dtype of a search, or in float32 where an automatic dtype must first be checked against it.

    Args:
        source: the model.
        device: where to.
        dtype: name of the dtype, or ``auto``.
        trust_remote_code: run the model's own Python code from the hub.
        check: refuses a configuration, before the weights are read.
        spread: spread it over all GPUs, host memory and disk; then an automatic dtype is not checked.

    Raises:
        ModelError: if there is no such model.
        SourceError: if it cannot be fetched.
    """
    import torch

    from lpsearch.models import load_model

    loaded_dtype = resolve_dtype(dtype, device)
    # The geometry of a repository with its own code is not known before it is loaded.
    may_check = dtype == "auto" and loaded_dtype != torch.float32 and not trust_remote_code and not spread
    if may_check and fits_in_float32(source, device):
        loaded_dtype = torch.float32
    where = "all devices" if spread else describe_device(device)
    with show_steps(f"loading {name_model(source.id)} on {where}", unit="bytes") as on_download:
        return load_model(
            source,
            device=device,
            dtype=loaded_dtype,
            trust_remote_code=trust_remote_code,
            before_weights=lambda config, tokenizer: check(config),
            spread=spread,
            on_download=on_download,
        )


def settle_dtype(model: PreTrainedModel, *, dtype: str, device: torch.device, windows: Windows) -> str:
    """Cast a model that :func:`load_for_search` loaded to the dtype of the search, if that keeps its loss.

    Args:
        model: the unmodified model.
        dtype: name of the dtype, or ``auto``.
        device: where the model is.
        windows: what to compare its loss on.

    Returns:
        Name of the dtype that the model is in now.
    """
    import torch

    from lpsearch.evaluation import apply_dtype

    target = resolve_dtype(dtype, device)
    if model.dtype == torch.float32 and target != torch.float32:
        check = apply_dtype(model, dtype=target, windows=windows)
        if check.dtype == target:
            logger.info("%s moves the baseline by %+.4f nats per token from float32", target, check.nll_difference)
    elif dtype == "auto" and target != torch.float32:
        logger.info("%s is not checked against float32, which does not fit on %s", target, device)
    return str(model.dtype).removeprefix("torch.")


def fits_in_float32(source: ModelSource, device: torch.device) -> bool:
    """Say whether the float32 weights of a model, and a bfloat16 copy, leave room on a device."""
    import torch
    from transformers import AutoModelForCausalLM

    from lpsearch.models import load_geometry
    from lpsearch.models.memory import find_free_bytes

    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        num_parameters = build(load_geometry(source)).num_parameters()
    return bool(6 * num_parameters < _WEIGHTS_SHARE * find_free_bytes(device))
