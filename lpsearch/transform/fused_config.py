"""The configuration of a fused model."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from lpsearch.models.traits import LAYER_LISTS, Family, read_traits
from lpsearch.plan import Plan
from lpsearch.transform import modeling_lpsearch as modeling

__all__ = ["build_fused_config"]


def build_fused_config(config: PretrainedConfig, plan: Plan) -> PretrainedConfig:
    """Build the configuration of the fused model; the one given stays as it is.

    Args:
        config: of the unmodified model.
        plan: for this model.

    Raises:
        FamilyError: if the family cannot be fused.
    """
    traits = read_traits(config)
    traits.check_fusing()
    stem, block = traits.family.stem, traits.family.block
    slots = [part.layers for group in plan.groups for part in traits.split_group(group)]
    group_of = {layer: group for group in plan.groups for layer in group}
    per_layer_config = {}
    for slot, members in enumerate(slots):
        overrides: dict[str, Any] = {}
        group = group_of[members[0]]
        if len(members) > 1:
            overrides["num_attention_heads"] = len(members) * traits.num_heads
            if hasattr(config, "num_key_value_heads"):
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
    names = {kind: modeling.class_name(stem, kind) for kind in ("Config", "Model", "ForCausalLM")}
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
        "lpsearch": {
            "stem": stem,
            "layer": traits.family.layer,
            "attention": block.attention,
            "widened": _list_attention_modules(traits.family) if traits.family.splits_hidden_size else None,
            "groups": [list(group) for group in plan.groups],
            "slots": [list(slot) for slot in slots],
            "attention_norm": block.attention_norm,
            "post_norms": [block.attention_post_norm, block.mlp_post_norm] if traits.has_post_norms else None,
            "qk_norm_axis": traits.family.qk_norm_axis,
        },
    }
    if traits.logits_scale != 1:
        fields["logit_scale"] = traits.logits_scale  # by which vLLM's Transformers backend multiplies logits
    fused: PretrainedConfig = getattr(modeling, names["Config"])(**fields)
    fused._attn_implementation = config._attn_implementation
    return fused


def _list_attention_modules(family: Family) -> list[str]:
    """Return the linear modules of the attention by their names within it, the output's last."""
    parent = f"{family.block.attention}."
    return [module.removeprefix(parent) for module in family.projections if module.startswith(parent)]
