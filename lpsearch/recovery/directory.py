"""The directory that ``recover`` writes: the plan, and the weights that differ from the unmodified model's.

``recovered.safetensors`` names its tensors as ``layers.<layer>.<name within the layer>``, whatever the decoder is
called in the model. A layer that was not touched is not in it: a refit of six pairs of Llama 2 7B stores their output
projections alone, about a tenth of the model.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lpsearch.errors import ModelError, PlanError, UsageError, describe_error
from lpsearch.models.families import get_decoder_layers
from lpsearch.models.fingerprint import fingerprint_model, fingerprints_match
from lpsearch.plan import (
    RECOVERED_PLAN_NAME,
    RECOVERED_WEIGHTS_NAME,
    Plan,
    Recovery,
    find_recovered_weights,
    load_plan,
    save_plan,
)

__all__ = ["apply_recovery", "check_target", "load_recovered_weights", "name_parameters", "save_recovered"]

logger = logging.getLogger(__name__)


def name_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the decoder layers by their names in a recovered directory."""
    return {
        f"layers.{layer_idx}.{name}": parameter
        for layer_idx, layer in enumerate(get_decoder_layers(model))
        for name, parameter in layer.named_parameters()
    }


def check_target(directory: Path) -> None:
    """Refuse a directory that is there and is anything but empty.

    Raises:
        UsageError: if it is.
    """
    if directory.is_dir():
        if any(directory.iterdir()):
            raise UsageError(f"{directory} is not empty; name a new directory, or empty this one")
    elif directory.exists() or directory.is_symlink():
        raise UsageError(f"{directory} is a file; name a new directory")


def save_recovered(
    directory: str | Path, *, plan: Plan, model: nn.Module, weights: Mapping[str, Tensor], recovery: Recovery
) -> None:
    """Write a plan and its repaired weights; the directory appears whole or not at all.

    Args:
        directory: where to; it must not exist, or be empty.
        plan: with the metadata of the unmodified model.
        model: the unmodified model, whose parameters the weights replace.
        weights: by the parameters' names in the model.
        recovery: how they came about; its fingerprint is that of the model with them.

    Raises:
        UsageError: if the directory is not empty.
        PlanError: if the plan names no model.
        OSError: if it cannot be written.
    """
    target = Path(directory)
    check_target(target)
    if plan.metadata is None:
        raise PlanError("a plan without metadata cannot be saved: a plan file names the model that it is for")
    names = {id(parameter): name for name, parameter in name_parameters(model).items()}
    parameters = dict(model.named_parameters())
    tensors = {names[id(parameters[name])]: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    provenance = plan.metadata.provenance.model_copy(update={"recovery": recovery})
    repaired = replace(plan, metadata=plan.metadata.model_copy(update={"provenance": provenance}))
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.absolute().parent))
    try:
        save_file(tensors, staging / RECOVERED_WEIGHTS_NAME, metadata={"format": "pt"})
        save_plan(repaired, staging / RECOVERED_PLAN_NAME)
        staging.chmod(0o755)
        staging.rename(target)  # which replaces an empty directory
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_recovered_weights(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read repaired weights, mapped from the file.

    Returns:
        By name, see the module.

    Raises:
        ModelError: if the file is damaged or gone.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no dict
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is damaged: {describe_error(error)}; run `lpsearch recover` again") from error


@torch.no_grad()
def apply_recovery(model: PreTrainedModel, directory: str | Path) -> Plan:
    """Give a model the repaired weights of a directory that ``recover`` wrote, in place.

    Args:
        model: the unmodified model, on any device and in any dtype.
        directory: with the plan and its weights.

    Returns:
        The plan, for ``apply_plan``, ``fuse_plan`` or ``export_checkpoint``. A plan whose weights were never repaired
        is returned as it is, and the model is left alone.

    Raises:
        PlanError: if there is no plan, or it is for another model.
        ModelError: if the weights are damaged, or are not those of the model's layers.
    """
    plan = load_plan(directory)
    file = find_recovered_weights(plan, directory)
    if file is None:
        return plan
    assert plan.metadata is not None
    assert plan.metadata.provenance.recovery is not None
    identity = plan.metadata.model
    found = fingerprint_model(model)
    if not fingerprints_match(found, identity.fingerprint):
        raise PlanError(
            f"{directory}: the repaired weights are for {identity.id}, and this model ({type(model).__name__}) has "
            f"other weights or another geometry: its fingerprint is {found}, expected {identity.fingerprint}"
        )
    parameters = name_parameters(model)
    weights = load_recovered_weights(file)
    for name, tensor in weights.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            shape = tuple(parameters[name].shape) if name in parameters else "none of this name"
            raise ModelError(f"{file}: {name} has shape {tuple(tensor.shape)}, and the model's is {shape}")
    for name, tensor in weights.items():
        parameters[name].data.copy_(tensor)
    repaired = fingerprint_model(model)
    if not fingerprints_match(repaired, plan.metadata.provenance.recovery.fingerprint):
        raise ModelError(
            f"{file}: with these weights the model's fingerprint is {repaired}, expected "
            f"{plan.metadata.provenance.recovery.fingerprint}: they are not those of {RECOVERED_PLAN_NAME} beside them"
        )
    logger.info("%s: repaired %d weights", directory, len(weights))
    return plan
