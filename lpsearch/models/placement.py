"""Where the parts of a model run that accelerate spreads over several GPUs, host memory and disk.

accelerate gives modules a ``forward`` of their own that brings the arguments, and weights that are kept elsewhere, to
the module's device first. So the modules of a layer may be called from anywhere; only what is added up by hand has to
be brought together. This module does not import accelerate.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lpsearch.errors import ModelError
from lpsearch.models.memory import find_free_bytes

__all__ = [
    "choose_max_memory",
    "describe_placement",
    "find_input_device",
    "find_run_device",
    "holds_weights_elsewhere",
    "is_spread",
    "list_run_devices",
    "place_beside",
    "read_parameter",
    "refuse_spread",
    "runs_own_forward",
]


_WEIGHTS_SHARE = 0.8
"""Share of the free memory that weights may take where a model is spread."""


def is_spread(model: nn.Module) -> bool:
    """Say whether accelerate brings arguments or weights to the modules of a model."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def refuse_spread(model: nn.Module, *, what: str) -> None:
    """Refuse a model that is spread where that is not implemented.

    Args:
        model: the model.
        what: cannot be done, e.g. ``a refit``.

    Raises:
        ModelError: if it is spread.
    """
    if is_spread(model):
        raise ModelError(
            f"{what} needs the whole model on one device, and this one is spread over several, host memory or disk; "
            "load it without a device map, on a larger device or in bfloat16"
        )


def find_run_device(module: nn.Module) -> torch.device | None:
    """Return the device to which accelerate brings the arguments of a module; None where it leaves them."""
    device: Any = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return None if device is None else torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def find_input_device(model: Any) -> torch.device:
    """Return the device that a model's tokens are to be on, and its logits come on."""
    embedding: nn.Module = model.get_input_embeddings()
    return find_run_device(model) or find_run_device(embedding) or next(embedding.parameters()).device


def list_run_devices(model: Any) -> tuple[torch.device, ...]:
    """Return the devices that modules of a model run on, each once, that of the tokens first."""
    found = dict.fromkeys([find_input_device(model)])
    for module in model.modules():
        device = find_run_device(module)
        if device is not None:
            found[device] = None
    return tuple(found)


def place_beside(layer: nn.Module, hidden_states: Tensor) -> Tensor:
    """Return hidden states on the device that a layer runs on."""
    device = find_run_device(layer)
    return hidden_states if device is None else hidden_states.to(device)


def runs_own_forward(layer: nn.Module) -> bool:
    """Say whether a module calls its class's ``forward``, if only after accelerate brought everything there."""
    forward = layer.__dict__.get("forward")
    if forward is None:
        return True
    before = getattr(getattr(layer, "_old_forward", None), "__func__", None)
    return isinstance(forward, partial) and hasattr(layer, "_hf_hook") and before is type(layer).forward


def holds_weights_elsewhere(model: nn.Module) -> bool:
    """Say whether some weights are kept in host memory or on disk, and brought to the device for each use."""
    return any(parameter.is_meta for parameter in model.parameters())


def choose_max_memory() -> dict[int | str, int]:
    """Return how many bytes of weights each GPU and the host may hold; activations and kept states take the rest."""
    free: dict[int | str, int] = {
        number: int(_WEIGHTS_SHARE * find_free_bytes(torch.device("cuda", number)))
        for number in range(torch.cuda.device_count())
    }
    return {**free, "cpu": int(_WEIGHTS_SHARE * find_free_bytes(torch.device("cpu")))}


def describe_placement(model: nn.Module) -> str:
    """Say how many bytes of a model's weights are where, e.g. ``cuda:0 60.1 GiB, disk 2.0 GiB``."""
    held: dict[str, int] = {}
    places: Any = getattr(model, "hf_device_map", {})
    for name, parameter in model.named_parameters():
        prefixes = [prefix for prefix in places if prefix == "" or name == prefix or name.startswith(f"{prefix}.")]
        place = places[max(prefixes, key=len)] if prefixes else str(parameter.device)
        place = f"cuda:{place}" if isinstance(place, int) else str(place)
        held[place] = held.get(place, 0) + parameter.nbytes
    return ", ".join(f"{place} {count / 2**30:.2f} GiB" for place, count in held.items())


def read_parameter(module: nn.Module, name: str) -> Tensor:
    """Return a parameter, also one that is kept in host memory or on disk.

    Args:
        module: holds it, at any depth.
        name: e.g. ``mlp.down_proj.weight``.
    """
    parameter = module.get_parameter(name)
    if not parameter.is_meta:
        return parameter.detach()
    owner, _, leaf = name.rpartition(".")
    weights: Any = getattr(getattr(module.get_submodule(owner), "_hf_hook", None), "weights_map", None)
    if weights is None:
        return parameter.detach()
    value: Tensor = weights[leaf]
    return value.to(parameter.dtype)
