"""Fingerprints: which model a plan or a study is for.

A fingerprint is ``<geometry>-<weights>``, two hashes of 16 hex digits.

*geometry* hashes the numbers that fix the shapes of the computation: model type, layers, widths, heads, vocabulary. It
takes none of the fields that transformers adds, renames or restructures between versions (rotary settings, attention
implementation), so that it is equal for a GGUF file, the same model saved as a directory, and one on the meta device.

*weights* hashes sixteen elements, evenly spread, of every parameter of the decoder layers, in the order of layers and
names, rounded to bfloat16. It is therefore equal whether the model was loaded in float32 or bfloat16, and whether a
plan is applied or not. A model in float16 has lost what would tell, and one on the meta device has no weights: there
the part is zeros, and :func:`fingerprints_match` compares geometries only.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from transformers import PretrainedConfig, PreTrainedModel

from lpsearch.models.families import get_decoder_layers
from lpsearch.models.traits import read_traits

__all__ = ["fingerprint_geometry", "fingerprint_model", "fingerprint_tensors", "fingerprints_match"]

_HASH_DIGITS = 16
_SAMPLES_PER_PARAMETER = 16
_NO_WEIGHTS = "0" * _HASH_DIGITS


def fingerprint_model(model: PreTrainedModel) -> str:
    """Return the fingerprint of a model, on any device, with or without a plan applied.

    Raises:
        FamilyError: if the model's decoder layers cannot be found.
    """
    parameters = (parameter for _, parameter in _list_parameters(model))
    return f"{fingerprint_geometry(model.config)}-{_hash_weights(parameters)}"


def fingerprint_tensors(model: PreTrainedModel, read: Callable[[str], torch.Tensor | None]) -> str:
    """Return the fingerprint of a model whose weights are elsewhere, reading a few elements of each.

    Args:
        model: the model, which may be on the meta device.
        read: returns a tensor by its name in the model's state dict; None if there is none.

    Raises:
        FamilyError: if the model's decoder layers cannot be found.
    """
    tensors = (tensor for name, _ in _list_parameters(model) if (tensor := read(name)) is not None)
    return f"{fingerprint_geometry(model.config)}-{_hash_weights(tensors)}"


def fingerprint_geometry(config: PretrainedConfig) -> str:
    """Return the geometry part of the fingerprint of any model with this configuration."""
    traits = read_traits(config)
    geometry = {
        "model_type": traits.config.model_type,
        "num_layers": traits.num_layers,
        "hidden_size": traits.hidden_size,
        "intermediate_size": traits.intermediate_size,
        "num_heads": traits.num_heads,
        "num_key_value_heads": traits.num_kv_heads,
        "head_dim": traits.head_dim,
        "vocab_size": traits.vocab_size,
    }
    canonical = json.dumps(geometry, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:_HASH_DIGITS]


def fingerprints_match(first: str, second: str) -> bool:
    """Say whether two fingerprints can be of the same model; one without weights is compared by geometry alone."""
    geometry, _, weights = first.partition("-")
    other_geometry, _, other_weights = second.partition("-")
    if geometry != other_geometry:
        return False
    return weights == other_weights or _NO_WEIGHTS in (weights, other_weights)


def _list_parameters(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    """List the parameters of the decoder layers by their names in the state dict, in the order of layers and names."""
    layers = get_decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    return [
        (f"{prefix}.{layer_idx}.{name}", parameter)
        for layer_idx, layer in enumerate(layers)
        for name, parameter in sorted(layer.named_parameters(), key=lambda item: item[0])
    ]


@torch.no_grad()
def _hash_weights(parameters: Iterable[torch.Tensor]) -> str:
    """Hash sampled elements of tensors; one transfer for each device that holds some."""
    comparable = (torch.float32, torch.bfloat16)  # float16 lost what bfloat16 would have kept, or kept too much
    samples_of_device: dict[torch.device, list[torch.Tensor]] = defaultdict(list)
    order = []
    for parameter in parameters:
        if parameter.is_meta or parameter.dtype not in comparable:
            return _NO_WEIGHTS
        samples = samples_of_device[parameter.device]
        order.append((parameter.device, len(samples)))
        samples.append(_sample(parameter))
    on_host = {device: torch.stack(samples).cpu() for device, samples in samples_of_device.items()}
    digest = hashlib.sha256()
    for device, row in order:
        digest.update(on_host[device][row].numpy().tobytes())
    return digest.hexdigest()[:_HASH_DIGITS]


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    """Return elements of a parameter as the bits of their bfloat16 rounding, int16 of shape (16,)."""
    flat = parameter.detach().reshape(-1)
    positions = torch.arange(_SAMPLES_PER_PARAMETER, device=flat.device) * flat.numel() // _SAMPLES_PER_PARAMETER
    return flat[positions].to(torch.bfloat16).view(torch.int16)
