"""The directory that ``recover`` writes: the plan, and the weights that differ from the unmodified model's.

``recovered.safetensors`` names its tensors as ``layers.<layer>.<name within the layer>``, whatever the decoder is
called in the model. What was not changed is not in it: a refit stores the output projections of the groups, and of the
single layers behind the first, which is at most a third of Llama 2 7B.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lpsearch.errors import ModelError, PlanError, describe_error
from lpsearch.models.families import get_decoder_layers
from lpsearch.models.fingerprint import fingerprint_model, fingerprints_match
from lpsearch.models.placement import refuse_spread
from lpsearch.plan import (
    RECOVERED_PLAN_NAME,
    RECOVERED_WEIGHTS_NAME,
    Plan,
    Recovery,
    find_recovered_weights,
    load_plan,
    save_plan,
)
from lpsearch.recovery.refit import swapped_weights
from lpsearch.staging import check_target, staged
from lpsearch.transform import check_plan_model

__all__ = ["apply_recovery", "load_recovered_weights", "name_parameters", "read_recovery", "save_recovered"]

logger = logging.getLogger(__name__)


def name_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the decoder layers by their names in a recovered directory."""
    return {
        f"layers.{layer_idx}.{name}": parameter
        for layer_idx, layer in enumerate(get_decoder_layers(model))
        for name, parameter in layer.named_parameters()
    }


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
    with staged(target) as staging:
        save_file(tensors, staging / RECOVERED_WEIGHTS_NAME, metadata={"format": "pt"})
        save_plan(repaired, staging / RECOVERED_PLAN_NAME)


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


def read_recovery(model: PreTrainedModel, plan: Plan, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the repaired weights that belong to a plan, for :func:`~lpsearch.recovery.swapped_weights`.

    Args:
        model: the unmodified model, on any device and in any dtype; it is not changed.
        plan: what :func:`lpsearch.plan.load_plan` read.
        path: where from.

    Returns:
        By the parameters' names in the model, in its dtype and on its device; empty for a plan whose weights were never
        repaired.

    Raises:
        PlanError: if the weights are missing, or the plan is for another model.
        ModelError: if the weights are damaged, or are not those of the plan beside them.
    """
    file = find_recovered_weights(plan, path)
    if file is None:
        return {}
    assert plan.metadata is not None
    assert plan.metadata.provenance.recovery is not None
    refuse_spread(model, what=f"{file}: a plan with repaired weights")
    check_plan_model(plan.without_recovery(), model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = name_parameters(model)
    weights = {}
    for name, tensor in load_recovered_weights(file).items():
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != tensor.shape:
            found = "none of this name" if parameter is None else f"one of shape {tuple(parameter.shape)}"
            raise ModelError(f"{file}: {name} has shape {tuple(tensor.shape)}, and the model has {found}")
        weights[names[id(parameter)]] = tensor.to(parameter.device, parameter.dtype)
    with swapped_weights(model, weights):
        repaired = fingerprint_model(model)
    expected = plan.metadata.provenance.recovery.fingerprint
    if not fingerprints_match(repaired, expected):
        raise ModelError(
            f"{file}: with these weights the model's fingerprint is {repaired}, expected {expected}: they are not "
            f"those of the {RECOVERED_PLAN_NAME} beside them; run `lpsearch recover` again"
        )
    return weights


def apply_recovery(model: PreTrainedModel, directory: str | Path) -> Plan:
    """Give a model the repaired weights of a directory that ``lpsearch recover`` wrote, in place.

    Args:
        model: the unmodified model, on any device and in any dtype.
        directory: with the plan and its weights.

    Returns:
        The plan, for ``apply_plan``, ``fuse_plan`` or ``export_checkpoint``. Where its weights were never repaired, the
        model is left alone.

    Raises:
        PlanError: if there is no plan, its weights are missing, or it is for another model.
        ModelError: if the weights are damaged, or are not those of the plan beside them.
    """
    plan = load_plan(directory)
    parameters = dict(model.named_parameters())
    weights = read_recovery(model, plan, directory)
    for name, tensor in weights.items():
        parameters[name].data.copy_(tensor)
    logger.info("%s: %d weights are repaired", directory, len(weights))
    return plan
