"""The test that a model is transformers' own to the bottom, before anything takes its layers apart.

A wide layer is built from parameters and from the configuration alone. Whatever else a model computes with (another
class of a submodule, a hook, a method or a number set on an instance) would be lost without a word, and the result
would be another model's. So a model is compared, module by module, with one that transformers builds from its
configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lpsearch.errors import ModelError
from lpsearch.models import get_decoder_layers
from lpsearch.models.quiet import quiet_transformers

__all__ = ["check_stock"]

_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
    "_state_dict_hooks": "state dict hook",
}

_OF_ITS_USE = frozenset(
    {"_compiled_call_impl", "gradient_checkpointing", "layer_idx", "max_seq_len_cached", "training"}
)
"""Attributes that say how a module is used. A wide layer has its own place in the cache."""


def check_stock(model: PreTrainedModel) -> None:
    """Check that every submodule of a language model is as transformers builds it from the model's configuration.

    Raises:
        ModelError: naming the first place that is not, what is there, what was expected, and how to mend it.
    """
    config: Any = model.config
    num_layers, said = len(get_decoder_layers(model)), config.num_hidden_layers
    if num_layers != said:
        raise ModelError(
            f"{type(model).__name__} has {num_layers} decoder layers, and its configuration says {said} "
            "(num_hidden_layers): layers were removed or added in memory; make the configuration say what is there, "
            "with its lists of one entry a layer, e.g. layer_types"
        )
    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"), quiet_transformers():
        stock: PreTrainedModel = build(config)
    found, expected = _name_modules(model), _name_modules(stock)
    for name in [*expected, *found.keys() - expected.keys()]:
        differences = _list_differences(found.get(name), expected.get(name))
        if (difference := next(differences, None)) is not None:
            raise ModelError(
                f"{type(model).__name__}: {name or 'the model itself'} {difference}; wide layers are built from "
                "weights and configuration alone and would lose it: take it off, merge it into the weights "
                "(`merge_and_unload` for an adapter), or use apply_plan"
            )
    first_names: dict[int, str] = {}
    for name, module in found.items():
        first = first_names.setdefault(id(module), name)
        if expected[first] is not expected[name]:
            raise ModelError(
                f"{type(model).__name__}: {name} and {first} are one module; give each place its own with copy.deepcopy"
            )


def _name_modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _list_differences(module: nn.Module | None, stock: nn.Module | None) -> Iterator[str]:
    """Yield what tells a module from the one that transformers builds in its place, in words that follow its name."""
    if module is None or stock is None:
        yield "is not there" if module is None else f"({_describe(module)}) is nothing that the configuration knows"
        return
    if type(module) is not type(stock):
        yield f"is a {_describe(module)}, expected {_describe(stock)}"
        return
    for attribute, kind in _HOOKS.items():
        for hook in vars(module)[attribute].values():
            if not str(getattr(hook, "__module__", "")).startswith("transformers."):  # e.g. to record hidden states
                yield f"has a {kind} ({getattr(hook, '__qualname__', type(hook).__qualname__)})"
    parameters, known = dict(module.named_parameters(recurse=False)), dict(stock.named_parameters(recurse=False))
    for name in [*known, *parameters.keys() - known.keys()]:
        if name not in parameters or name not in known:
            yield f"has {'no' if name in known else 'a'} parameter {name}"
        elif type(parameters[name]) is not nn.Parameter:
            yield f"holds {name} as {type(parameters[name]).__name__}, expected a plain parameter"
        elif parameters[name].shape != known[name].shape:
            yield f"holds {name} of shape {tuple(parameters[name].shape)}, expected {tuple(known[name].shape)}"
    yield from _list_attributes(module, stock)


def _list_attributes(module: nn.Module, stock: nn.Module) -> Iterator[str]:
    """Yield what instance attributes differ in: those that stand before one of the class, and plain values."""
    values, known = vars(module), vars(stock)
    is_model = isinstance(module, PreTrainedModel)  # on which transformers itself keeps much
    for name in values.keys() - _OF_ITS_USE:
        if name not in known:
            if hasattr(type(module), name) and (callable(values[name]) or not is_model):
                yield f"has a {name} of its own, not its class's"
        elif not name.startswith("_") and not is_model and _is_plain(known[name]) and values[name] != known[name]:
            yield f"has {name} {values[name]!r}, expected {known[name]!r}"


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | tuple)


def _describe(module: nn.Module) -> str:
    """Return the class of a module, with where it is from unless that is torch or transformers."""
    cls = type(module)
    is_known = cls.__module__.startswith(("torch.", "transformers."))
    return cls.__qualname__ if is_known else f"{cls.__module__}.{cls.__qualname__}"
