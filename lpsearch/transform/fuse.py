"""Fuse the groups of a plan into wide layers, in a model that is in memory."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from lpsearch.errors import ModelError
from lpsearch.models.image_text import holds_language_model
from lpsearch.models.traits import read_traits
from lpsearch.plan import Plan
from lpsearch.transform import modeling_lpsearch as modeling
from lpsearch.transform.apply import check_plan_model, check_unplanned
from lpsearch.transform.fused_config import build_fused_config, list_last_uses
from lpsearch.transform.fused_weights import InterleavedWeights, name_tensors
from lpsearch.transform.stock import check_stock

__all__ = ["check_fusible", "fuse_plan", "has_tied_head"]

logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=PreTrainedModel)


def fuse_plan(model: _Model, plan: Plan) -> _Model:
    """Turn the groups of a plan into wide layers; this cannot be undone.

    A group of m layers becomes one layer of m times the heads and the intermediate size, with the sum over the group
    inside its products. The result differs from the model under :func:`lpsearch.apply_plan` by rounding alone. Branches
    alone in their group keep their weights bit for bit, and those that the plan drops are not there. The model gets a
    class and a configuration of its own, so that ``save_pretrained`` writes what
    ``AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)`` loads.

    Above the model itself, the memory needed is that of one group.

    Args:
        model: an unmodified language model of a family that can be fused; changed in place.
        plan: for this model.

    Returns:
        The same model.

    Raises:
        PlanError: if the plan is for another model, or drops the attention of every layer.
        FamilyError: if the family cannot be fused.
        ModelError: if the model is quantised, has a plan applied, or anything in it is not as transformers builds it;
            the model is left as it was.

    Example:
        >>> import lpsearch
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4)
        >>> model = AutoModelForCausalLM.from_config(config)  # usually: from_pretrained(...)
        >>> plan = lpsearch.Plan.from_groups([[0], [1, 2], [3]])  # usually: load_plan("studies/.../joins-06.json")
        >>> model = lpsearch.fuse_plan(model, plan)
        >>> [layer.self_attn.q_proj.out_features for layer in model.model.layers]
        [64, 128, 64]
    """
    check_fusible(model)
    check_plan_model(plan, model)
    base_config: Any = model.config
    fused_config: Any = build_fused_config(base_config, plan)
    fused_config.tie_word_embeddings = has_tied_head(model)
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
    base_layers, decoder.layers = list(decoder.layers), nn.ModuleList()
    is_training = base_layers[0].training
    prefix = read_traits(base_config).family.decoder
    tensors = name_tensors(base_layers, decoder=prefix)
    base_layers.clear()
    weights = InterleavedWeights(base_config, fused_config, tensors.get)
    with torch.device("meta"):
        layers = modeling.build_layers(fused_config)
    like = next(iter(tensors.values()))
    last_uses = list_last_uses(fused_config.lpsearch)
    for slot, layer in enumerate(layers):
        _fill_layer(layer, f"{prefix}.layers.{slot}.", weights, like=like)
        done = tuple(f"{prefix}.layers.{i}." for i in range(plan.num_layers) if last_uses.get(i, -1) <= slot)
        for name in [name for name in tensors if name.startswith(done)]:
            del tensors[name]
    decoder.layers = layers.train(is_training)
    for module in model.modules():
        if getattr(module, "config", None) is base_config:
            module.config = fused_config
        # Transformers hooks the layers for `output_hidden_states` once a model; these layers are new.
        vars(module).pop("_output_capturing_hooks_installed", None)
    model.__class__ = getattr(modeling, fused_config.architectures[0])
    logger.debug("%s: %d layers became %d wide ones", type(model).__name__, plan.num_layers, len(layers))
    return model


def has_tied_head(model: PreTrainedModel) -> bool:
    """Say whether a model's head and embedding are one tensor, whatever its configuration says."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head.weight is embedding.weight


def check_fusible(model: PreTrainedModel) -> None:
    """Check that a model is the stock language model of a family that can be fused, as it was loaded, to the bottom.

    Raises:
        FamilyError: if the family cannot be fused.
        ModelError: if it is quantised, has a plan applied, or anything in it is not as transformers builds it.
    """
    if str(model.config.model_type).startswith(modeling.MODEL_TYPE_PREFIX):
        raise ModelError(f"{type(model).__name__} is fused already; give the unmodified model that its plan is for")
    if holds_language_model(model.config):
        raise ModelError(
            f"{type(model).__name__} is an image-text model; `export_checkpoint` writes the language model inside it, "
            "which `lpsearch.models.load_model` loads by itself"
        )
    traits = read_traits(model.config)
    traits.check_fusing()
    expected = traits.family.language_model
    if type(model).__name__ != expected:
        raise ModelError(
            f"{type(model).__name__} is not {expected}, the language model of {model.config.model_type}; load it with "
            "AutoModelForCausalLM, without adapters"
        )
    quantised = getattr(model.config, "quantization_config", None)
    if quantised or any(not parameter.is_floating_point() for parameter in model.parameters()):
        raise ModelError(
            f"{type(model).__name__} holds quantised weights, which cannot be joined; load it unquantised (lpsearch "
            "dequantises a .gguf file when it loads it), fuse it, and quantise the result"
        )
    check_unplanned(model)
    check_stock(model)


def _fill_layer(layer: nn.Module, prefix: str, weights: InterleavedWeights, *, like: nn.Parameter) -> None:
    """Give a layer on the meta device its weights; a layer alone in its group gets the very parameters that it had."""
    for name, _ in list(layer.named_parameters()):
        tensor = weights.compute(prefix + name, like.dtype)
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor.to(like.device), requires_grad=like.requires_grad)
        owner, _, leaf = name.rpartition(".")
        setattr(layer.get_submodule(owner), leaf, tensor)
