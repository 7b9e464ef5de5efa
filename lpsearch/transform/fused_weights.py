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
from lpsearch.plan import Plan
from lpsearch.transform import modeling_lpsearch as modeling

__all__ = ["FusedWeights", "build_fused_config", "find_fusible_family"]

_LAYER_LISTS = ("layer_types", "no_rope_layers")
"""Attributes of a configuration with one entry a layer; layers that differ in one attend differently."""

_REASONS = {
    "cohere": "its attention and MLP read the same input",
    "gpt_neox": "its attention and MLP read the same input",
    "phi": "its attention and MLP read the same input",
    "mixtral": "its MLP is a mixture of experts",
    "qwen3_moe": "its MLP is a mixture of experts",
}

_PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
_NORMS = {
    "gemma2": ("input_layernorm", "pre_feedforward_layernorm"),
    "gemma3_text": ("input_layernorm", "pre_feedforward_layernorm"),
    "olmo2": (None, None),
}
"""The norms before attention and MLP of the families that have norms after them as well, or only those."""

_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")
_MEMBER_NAME = re.compile(r"(.+)\.(\d+)\.(\w+)")
_OUTPUTS = ("o_proj", "down_proj", "c_proj")


def find_fusible_family(config: PretrainedConfig) -> str:
    """Return the model type of a model whose groups can be fused into wide layers.

    Raises:
        FamilyError: for any other, with the reason.
    """
    family: str = config.model_type
    if family in modeling.FAMILIES:
        return family
    reason = _REASONS.get(family, "its layers are not known well enough")
    raise FamilyError(
        f"model type {family} cannot be fused into wide layers: {reason}; fused are {', '.join(modeling.FAMILIES)}. "
        "A plan of any other family runs with `apply_plan`, which `lpsearch generate` and `lpsearch evaluate` use"
    )


def build_fused_config(config: PretrainedConfig, plan: Plan) -> PretrainedConfig:
    """Build the configuration of the fused model; the one given stays as it is.

    Args:
        config: of the unmodified model.
        plan: for this model.

    Raises:
        FamilyError: if the family cannot be fused.
    """
    family = find_fusible_family(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    slots = [slot for group in plan.groups for slot in _split_group(config, group)]
    group_of = {layer: group for group in plan.groups for layer in group}
    per_layer_config = {}
    for slot, members in enumerate(slots):
        overrides: dict[str, Any] = {}
        group = group_of[members[0]]
        if len(members) > 1:
            overrides["num_attention_heads"] = len(members) * config.num_attention_heads
            overrides["num_key_value_heads"] = len(members) * config.num_key_value_heads
        if len(group) > 1 and (slot + 1 == len(slots) or slots[slot + 1][0] not in group):
            overrides["intermediate_size"] = len(group) * config.intermediate_size
            if getattr(config, "use_bias", None) is False:  # Starcoder2's norms have a bias, which must go somewhere
                overrides["use_bias"] = True
        if overrides:
            per_layer_config[slot] = overrides
    fields = config.to_dict()
    for name in ("model_type", "transformers_version", "auto_map", "_name_or_path"):
        fields.pop(name, None)
    for name in _LAYER_LISTS:
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
        "head_dim": head_dim,
        "num_hidden_layers": len(slots),
        "per_layer_config": per_layer_config,
        "lpsearch": {"groups": [list(group) for group in plan.groups], "slots": [list(slot) for slot in slots]},
    }
    fused: PretrainedConfig = getattr(modeling, names["Config"])(**fields)
    fused._attn_implementation = config._attn_implementation
    return fused


def _split_group(config: PretrainedConfig, group: Sequence[int]) -> list[tuple[int, ...]]:
    """Split a group into the layers that attend alike, in the order of their first layers."""
    slots: dict[tuple[Any, ...], list[int]] = {}
    lists = [values for name in _LAYER_LISTS if (values := getattr(config, name, None)) is not None]
    for layer in group:
        slots.setdefault(tuple(values[layer] for values in lists), []).append(layer)
    return [tuple(slot) for slot in slots.values()]


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
        self._attention_norm, self._mlp_norm = _NORMS.get(config.model_type, _PRE_NORMS)
        self._norm_offset = 1.0 if config.model_type.startswith("gemma") else 0.0
        self._hidden_size: int = config.hidden_size
        self._intermediate_size: int = config.intermediate_size
        self._attention_blocks: int = config.num_key_value_heads
        self._mlp_blocks = modeling.count_mlp_blocks(config.intermediate_size) if config.model_type in _NORMS else 1
        query_rows, key_rows = (
            heads * fused_config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self._packed = {
            "qkv_proj": [query_rows, key_rows, key_rows],
            "gate_up_proj": [config.intermediate_size, config.intermediate_size],
        }

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
            return torch.full_like(like, 1.0 - self._norm_offset if kind == "weight" else 0.0, dtype=dtype)
        if not module.endswith(_OUTPUTS):
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
        total = torch.zeros(self._hidden_size)
        for layer in layers:
            bias = self._read(f"model.layers.{layer}.{rest}")
            total = total if bias is None else total.to(bias.device) + bias.float()
        return total

    def _stack_inputs(self, layers: Sequence[int], module: str, kind: str, dtype: torch.dtype) -> Tensor:
        """Stack the rows of input projections, or their biases, with the norm before them folded in."""
        in_attention = module.startswith("self_attn.")
        blocks = self._attention_blocks if in_attention else self._mlp_blocks
        norm = self._attention_norm if in_attention else self._mlp_norm
        folded = [self._fold(f"model.layers.{layer}.", module, norm, kind).to(dtype) for layer in layers]
        sections = self._packed.get(module.rpartition(".")[2])
        if sections is None:
            return _take_turns(folded, blocks, dim=0)
        parts = zip(*(torch.split(tensor, sections) for tensor in folded), strict=True)
        return torch.cat([_take_turns(part, blocks, dim=0) for part in parts])

    def _fold(self, layer: str, module: str, norm: str | None, kind: str) -> Tensor:
        """Fold the norm before a projection into its weight or its bias, in float32."""
        if norm is None:
            return self._get(f"{layer}{module}.{kind}")
        if kind == "weight":
            scale = self._get(f"{layer}{norm}.weight").float() + self._norm_offset
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
