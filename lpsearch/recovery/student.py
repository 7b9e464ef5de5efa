"""The model that is trained: a copy under the plan that shares every weight that training does not change."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lpsearch.errors import ModelError, PlanError, UsageError
from lpsearch.models.families import DecoderBlock, build_blocks, get_decoder_layers
from lpsearch.plan import Plan
from lpsearch.transform import apply_plan
from lpsearch.transform.apply import check_unplanned

__all__ = ["Student", "build_student", "name_trained"]

Train = Literal["all", "grouped"]


@dataclass(frozen=True, eq=False)
class Student:
    """A model under a plan whose layers can be trained.

    Attributes:
        model: under the plan, in eval mode, so that nothing is dropped at random.
        trained: the parameters that are trained, by their names in ``model``: the layers' own, or their adapters'.
        adapters: adapted linear modules by name; empty where the layers' own weights are trained.
        dtypes: of every parameter of the unmodified model, by name.
    """

    model: PreTrainedModel
    trained: Mapping[str, nn.Parameter]
    adapters: Mapping[str, Any]
    dtypes: Mapping[str, torch.dtype]

    @property
    def num_trained(self) -> int:
        """Number of values that are trained."""
        return sum(parameter.numel() for parameter in self.trained.values())

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace weights, by their names in the unmodified model.

        Raises:
            ModelError: for a name or a shape that the model does not have.
        """
        parameters = dict(self.model.named_parameters())
        for name, weight in weights.items():
            module, _, leaf = name.rpartition(".")
            parameter = parameters.get(f"{module}.base_layer.{leaf}" if module in self.adapters else name)
            if parameter is None or parameter.shape != weight.shape:
                found = "no such parameter" if parameter is None else f"one of shape {tuple(parameter.shape)}"
                raise ModelError(
                    f"a weight to begin with is {name}, of shape {tuple(weight.shape)}, and the model has {found}; "
                    "give weights that were recovered for this model"
                )
            # A new tensor, since the one that is there may be the unmodified model's.
            parameter.data = weight.to(device=parameter.device, dtype=parameter.dtype, copy=True)

    @torch.no_grad()
    def collect_weights(self) -> dict[str, Tensor]:
        """Return the trained weights by their names in the unmodified model, in its dtype, on the CPU."""
        if not self.adapters:
            return {name: p.detach().to("cpu", self.dtypes[name], copy=True) for name, p in self.trained.items()}
        collected = {}
        for module, adapted in self.adapters.items():
            weight = adapted.base_layer.weight
            merged = weight.float() + adapted.get_delta_weight("default").float()
            collected[f"{module}.weight"] = merged.to("cpu", self.dtypes[f"{module}.weight"], copy=True)
        return collected


def name_trained(model: PreTrainedModel, plan: Plan, train: Train) -> tuple[str, ...]:
    """Name the parameters to train: those of decoder layers, without the branches that the plan drops.

    Args:
        model: the unmodified model.
        plan: for the model.
        train: ``all`` layers, or the ``grouped`` ones, which the plan changes; a layer of which nothing is left counts
            as part of the group before it.

    Raises:
        PlanError: for a plan that changes nothing.
        ModelError: for a quantised weight among them.
    """
    if plan.num_joins == 0 and plan.num_dropped == 0:
        raise PlanError("the plan joins and drops nothing, so there is nothing to recover; give a plan with groups")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    blocks = build_blocks(model)
    chosen: list[str] = []
    for group in plan.running_groups:
        for layer_idx in group if group.is_changed or train == "all" else ():
            unused = _list_unused(blocks[layer_idx], layer_idx in group.attention_layers, layer_idx in group.mlp_layers)
            for name, parameter in blocks[layer_idx].layer.named_parameters():
                if name.partition(".")[0] in unused:
                    continue
                full_name = names[id(parameter)]
                if not parameter.is_floating_point() or parameter.element_size() < 2:
                    raise ModelError(
                        f"{full_name} is quantised ({parameter.dtype}), and such weights cannot be trained; load the "
                        "model without quantisation"
                    )
                chosen.append(full_name)
    if not chosen:
        raise PlanError("the plan drops every branch of the model, so there is nothing to train; keep some of them")
    return tuple(chosen)


def build_student(
    model: PreTrainedModel,
    plan: Plan,
    *,
    train: Train = "all",
    lora_rank: int | None = None,
    checkpointing: bool = False,
    frozen_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Student:
    """Copy a model, put it under a plan and make its layers trainable; the model itself is left as it was.

    Embeddings, final norm and output head are not trained, and what is not trained is shared with the model.

    Args:
        model: the unmodified model.
        plan: for the model.
        train: ``all`` layers, or the ``grouped`` ones.
        lora_rank: train adapters of this rank on the layers' linear modules (LoRA, arXiv 2106.09685); None to train
            the layers' own weights.
        checkpointing: recompute layers and groups in the backward pass instead of keeping what is inside them.
        frozen_dtype: of what is not trained, where that must be another dtype than the model's; what is trained is in
            float32.
        seed: of the adapters.

    Raises:
        PlanError: for a plan of another model, or one that changes nothing.
        ModelError: for a quantised model, or one that has a plan applied.
        UsageError: if adapters need PEFT, and it is not installed.
    """
    check_unplanned(model)
    names = name_trained(model, plan, train)
    shared = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    copied: Any = apply_plan(copy.deepcopy(model, dict(shared)), plan)
    copied.eval()
    dtypes = {name: parameter.dtype for name, parameter in copied.named_parameters()}
    for parameter in copied.parameters():
        parameter.data = parameter.data if frozen_dtype is None else parameter.data.to(frozen_dtype)
    if checkpointing:
        _checkpoint_layers(copied)
    adapters: dict[str, Any] = {}
    if lora_rank is None:
        parameters = dict(copied.named_parameters())
        trained = {name: parameters[name] for name in names}
    else:
        adapters = _add_adapters(copied, names, lora_rank, seed)
        trained = {name: p for name, p in copied.named_parameters() if ".lora_" in name}
    for parameter in trained.values():
        parameter.data = parameter.data.to(torch.float32, copy=True)
        parameter.requires_grad_(True)
    return Student(copied, trained, adapters, dtypes)


def _list_unused(block: DecoderBlock, has_attention: bool, has_mlp: bool) -> set[str]:
    """List the submodules of a layer that do not run where branches are dropped; a norm may serve both branches."""
    form = block.form
    of_attention = {form.attention, *form.attention_post} | ({form.attention_norm} - {None})
    of_mlp = {"mlp", *form.mlp_post} | ({form.mlp_norm} - {None})
    used = (of_attention if has_attention else set()) | (of_mlp if has_mlp else set())
    return {name for name in of_attention | of_mlp if name is not None and name not in used}


def _checkpoint_layers(model: PreTrainedModel) -> None:
    """Turn gradient checkpointing on without train mode: submodules stay in eval mode, so nothing is random."""
    for layer in get_decoder_layers(model):
        module: Any = layer
        module.gradient_checkpointing = True
        module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        module.training = True


def _add_adapters(model: PreTrainedModel, names: tuple[str, ...], rank: int, seed: int) -> dict[str, Any]:
    """Put adapters on the linear modules that have a weight among ``names``; return them by name."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UsageError("--lora needs PEFT; install it with: pip install 'lpsearch[recover]'") from None
    modules = dict(model.named_modules())
    stems = [name.removesuffix(".weight") for name in names]
    targets = [stem for stem in stems if isinstance(modules.get(stem), nn.Linear)]
    if not targets:
        raise ModelError(f"{type(model).__name__} has no linear modules in its layers to adapt; train without --lora")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    modules = dict(model.named_modules())
    return {target: modules[target] for target in targets}
