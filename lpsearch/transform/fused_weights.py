"""What a fused model is made of: its configuration, and each of its tensors from those of the base model.

The weight of a norm is folded into the projections behind it, in float32 and rounded once, wherever members share the
norm; what remains of the norm is its scale. A member that shares nothing keeps its weights bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lpsearch.errors import FamilyError
from lpsearch.models.traits import LAYER_LISTS, FamilyTraits, list_fusible_families, read_traits
from lpsearch.plan import Plan
from lpsearch.transform import modeling_lpsearch as modeling

__all__ = ["FusedWeights", "build_fused_config", "read_fusible_traits"]

_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")
_MEMBER_NAME = re.compile(r"(.+)\.(\d+)\.(\w+)")
_OUTPUTS = ("o", "down")


def read_fusible_traits(config: PretrainedConfig) -> FamilyTraits:
    """Read the traits of a model whose groups can be fused into wide layers.

    Raises:
        FamilyError: for any other, with the reason.
    """
    traits = read_traits(config)
    if traits.fusing_obstacle is not None:
        raise FamilyError(
            f"model type {config.model_type} cannot be fused into wide layers: {traits.fusing_obstacle}; fused are "
            f"{', '.join(list_fusible_families())}. A plan of any other family runs with `apply_plan`, which "
            "`lpsearch generate` and `lpsearch evaluate` use"
        )
    return traits


def build_fused_config(config: PretrainedConfig, plan: Plan) -> PretrainedConfig:
    """Build the configuration of the fused model; the one given stays as it is.

    Args:
        config: of the unmodified model.
        plan: for this model.

    Raises:
        FamilyError: if the family cannot be fused.
    """
    traits = read_fusible_traits(config)
    family = config.model_type
    slots = [part.layers for group in plan.groups for part in traits.split_group(group)]
    group_of = {layer: group for group in plan.groups for layer in group}
    per_layer_config = {}
    for slot, members in enumerate(slots):
        overrides: dict[str, Any] = {}
        group = group_of[members[0]]
        if len(members) > 1:
            overrides["num_attention_heads"] = len(members) * traits.num_heads
            overrides["num_key_value_heads"] = len(members) * traits.num_kv_heads
        if len(group) > 1 and (slot + 1 == len(slots) or slots[slot + 1][0] not in group):
            overrides["intermediate_size"] = len(group) * traits.intermediate_size
            if traits.family.norm_kind == "layer":  # the bias of a norm becomes one of the projections behind it
                for option in (traits.family.qkv_bias, traits.family.mlp_bias):
                    if isinstance(option, str) and not getattr(config, option):
                        overrides[option] = True
        if overrides:
            per_layer_config[slot] = overrides
    fields = config.to_dict()
    for name in ("model_type", "transformers_version", "auto_map", "_name_or_path"):
        fields.pop(name, None)
    for name in LAYER_LISTS:
        if fields.get(name) is not None:
            fields[name] = [fields[name][members[0]] for members in slots]
    names = {kind: modeling.class_name(family, kind) for kind in ("Config", "Model", "ForCausalLM")}
    module = modeling.__name__.rpartition(".")[2]
    fields |= {
        "architectures": [names["ForCausalLM"]],
        "auto_map": {
            "AutoConfig": f"{module}.{names['Config']}",
            "AutoModel": f"{module}.{names['Model']}",
            "AutoModelForCausalLM": f"{module}.{names['ForCausalLM']}",
        },
        "head_dim": traits.head_dim,
        "num_hidden_layers": len(slots),
        "per_layer_config": per_layer_config,
        "lpsearch": {"groups": [list(group) for group in plan.groups], "slots": [list(slot) for slot in slots]},
    }
    fused: PretrainedConfig = getattr(modeling, names["Config"])(**fields)
    fused._attn_implementation = config._attn_implementation
    return fused


class FusedWeights:
    """The tensors of a fused model, each computed when it is asked for."""

    def __init__(
        self, config: PretrainedConfig, fused_config: PretrainedConfig, read: Callable[[str], Tensor | None]
    ) -> None:
        """Prepare to compute tensors.

        Args:
            config: of the unmodified model.
            fused_config: from :func:`build_fused_config`.
            read: returns a tensor of the unmodified model by its name in the state dict; None if there is none.
        """
        self._read = read
        self._slots: list[list[int]] = fused_config.lpsearch["slots"]
        # What is kept apart for each member of a group stands in the order of the slots.
        self._group_of_slot = [
            [layer for slot in self._slots if slot[0] in group for layer in slot]
            for members in self._slots
            for group in fused_config.lpsearch["groups"]
            if members[0] in group
        ]
        self._traits = read_traits(config)
        self._attention_blocks = self._traits.num_kv_heads
        inner = self._traits.intermediate_size
        self._mlp_blocks = modeling.count_mlp_blocks(inner) if self._traits.has_post_norms else 1

    @torch.no_grad()
    def compute(self, name: str, dtype: torch.dtype) -> Tensor:
        """Compute a tensor of the fused model.

        Args:
            name: in the fused model's state dict.
            dtype: of the result; what is folded is rounded to it once.
        """
        match = _LAYER_NAME.fullmatch(name)
        if match is None:
            return self._get(name).to(dtype)
        slot, rest = int(match[1]), match[2]
        in_attention = rest.startswith(("self_attn.", "input_layernorm."))
        layers = self._slots[slot] if in_attention else self._group_of_slot[slot]
        if len(layers) == 1:
            return self._get(f"model.layers.{layers[0]}.{rest}").to(dtype)
        if match := _MEMBER_NAME.fullmatch(rest):
            module = match[1].replace("_projs", "_proj")
            return self._get(f"model.layers.{layers[int(match[2])]}.{module}.{match[3]}").to(dtype)
        module, _, kind = rest.rpartition(".")
        if module.endswith("layernorm"):
            like = self._get(f"model.layers.{layers[0]}.{rest}")
            return torch.full_like(like, 1.0 - self._traits.norm_offset if kind == "weight" else 0.0, dtype=dtype)
        if self._traits.family.projections[module][0] not in _OUTPUTS:
            return self._stack_inputs(layers, module, kind, dtype)
        if kind == "weight":
            columns = [self._get(f"model.layers.{layer}.{rest}").to(dtype) for layer in layers]
            return _take_turns(columns, self._attention_blocks if in_attention else 1, dim=1)
        return self._add_biases(layers, rest).to(dtype)

    def _get(self, name: str) -> Tensor:
        tensor = self._read(name)
        assert tensor is not None, name
        return tensor

    def _add_biases(self, layers: Sequence[int], rest: str) -> Tensor:
        """Add the biases of output projections, those that there are."""
        total = torch.zeros(self._traits.hidden_size)
        for layer in layers:
            bias = self._read(f"model.layers.{layer}.{rest}")
            total = total if bias is None else total.to(bias.device) + bias.float()
        return total

    def _stack_inputs(self, layers: Sequence[int], module: str, kind: str, dtype: torch.dtype) -> Tensor:
        """Stack the rows of input projections, or their biases, with the norm before them folded in."""
        in_attention = module.startswith("self_attn.")
        blocks = self._attention_blocks if in_attention else self._mlp_blocks
        block = self._traits.family.block
        norm = block.attention_norm if in_attention else block.mlp_norm
        folded = [self._fold(f"model.layers.{layer}.", module, norm, kind).to(dtype) for layer in layers]
        sections = [self._traits.part_sizes[part] for part in self._traits.family.projections[module]]
        parts = zip(*(torch.split(tensor, sections) for tensor in folded), strict=True)
        return torch.cat([_take_turns(part, blocks, dim=0) for part in parts])

    def _fold(self, layer: str, module: str, norm: str | None, kind: str) -> Tensor:
        """Fold the norm before a projection into its weight or its bias, in float32."""
        if norm is None:
            return self._get(f"{layer}{module}.{kind}")
        if kind == "weight":
            scale = self._get(f"{layer}{norm}.weight").float() + self._traits.norm_offset
            return self._get(f"{layer}{module}.weight").float() * scale
        bias, norm_bias = self._read(f"{layer}{module}.bias"), self._read(f"{layer}{norm}.bias")
        if norm_bias is None:
            return self._get(f"{layer}{module}.bias")
        moved = self._get(f"{layer}{module}.weight").float() @ norm_bias.float()
        return moved if bias is None else moved + bias.float()


def _take_turns(members: Sequence[Tensor], blocks: int, *, dim: int) -> Tensor:
    """Join tensors along a dimension, block by block: the first block of each member, then the second of each."""
    parts = [torch.unflatten(member, dim, (blocks, -1)) for member in members]
    return torch.stack(parts, dim=dim + 1).flatten(dim, dim + 2)
