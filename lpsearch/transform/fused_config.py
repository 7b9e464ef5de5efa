"""The configuration of a fused model."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from lpsearch.errors import PlanError
from lpsearch.models.traits import LAYER_LISTS, Family, FamilyTraits, read_traits
from lpsearch.plan import Plan
from lpsearch.transform import modeling_lpsearch as modeling

__all__ = ["build_fused_config", "list_last_uses"]


def build_fused_config(config: PretrainedConfig, plan: Plan) -> PretrainedConfig:
    """Build the configuration of the fused model; the one given stays as it is.

    Args:
        config: of the unmodified model.
        plan: for this model.

    Raises:
        FamilyError: if the family cannot be fused.
        PlanError: if the plan drops the attention of every layer, so that no entry of ``model.layers`` is left.
    """
    traits = read_traits(config)
    traits.check_fusing()
    stem, block = traits.family.stem, traits.family.block
    slots, mlps, more_mlps = _arrange_branches(traits, plan)
    per_layer_config = {
        slot: overrides
        for slot, (members, transforming) in enumerate(zip(slots, mlps, strict=True))
        if (overrides := _widen_attention(traits, len(members)) | _widen_mlp(traits, len(transforming)))
    }
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
            "mlps": [list(layers) for layers in mlps],
            "more_mlps": [more | {"config": _widen_mlp(traits, len(more["layers"]))} for more in more_mlps],
            "attention_norm": block.attention_norm,
            "attention_post": list(block.attention_post),
            "mlp_norm": block.mlp_norm,
            "mlp_post": list(block.mlp_post),
            "post_norms": [block.attention_post_norm, block.mlp_post_norm] if traits.has_post_norms else None,
            "qk_norm_axis": traits.family.qk_norm_axis,
        },
    }
    if traits.logits_scale != 1:
        fields["logit_scale"] = traits.logits_scale  # by which vLLM's Transformers backend multiplies logits
    fused: PretrainedConfig = getattr(modeling, names["Config"])(**fields)
    fused._attn_implementation = config._attn_implementation
    return fused


def list_last_uses(names: dict[str, Any]) -> dict[int, int]:
    """Return for each layer of the base model the last entry of ``model.layers`` that is made of its weights.

    Args:
        names: the entry ``lpsearch`` of a fused configuration.
    """
    uses = [(layer, slot) for part in ("slots", "mlps") for slot, used in enumerate(names[part]) for layer in used]
    uses += [(layer, more["slot"]) for more in names["more_mlps"] for layer in more["layers"]]
    # The norms of a group's attention outputs are in its last entry.
    group_of = {layer: tuple(group) for group in names["groups"] for layer in group}
    closes = {group_of[members[0]]: slot for slot, members in enumerate(names["slots"])}
    uses += [(layer, closes[group_of[layer]]) for members in names["slots"] for layer in members]
    last: dict[int, int] = {}
    for layer, slot in uses:
        last[layer] = max(slot, last.get(layer, slot))
    return last


def _arrange_branches(
    traits: FamilyTraits, plan: Plan
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]], list[dict[str, Any]]]:
    """Lay the branches that a plan keeps into entries of ``model.layers``, each of which attends.

    Returns:
        For each entry the layers that attend in it and those whose MLPs follow at once (none ahead of another
        attention); then the MLPs of groups without attention that find no place there: the entry that they belong to,
        whether they stand ahead of its attention, and their layers.
    """
    slots: list[tuple[int, ...]] = []
    mlps: list[tuple[int, ...]] = []
    more_mlps: list[dict[str, Any]] = []
    for group in plan.groups:
        for part in traits.split_group(group.attention_layers):
            slots.append(part.layers)
            mlps.append(())
        if not group.mlp_layers:
            continue
        if slots and not mlps[-1]:
            mlps[-1] = group.mlp_layers
        else:
            slot = max(len(slots) - 1, 0)
            more_mlps.append({"slot": slot, "ahead": not slots, "layers": list(group.mlp_layers)})
    if not slots:
        raise PlanError(
            "the plan drops the attention of every layer, and what is left is no language model; keep at least one"
        )
    return slots, mlps, more_mlps


def _widen_attention(traits: FamilyTraits, num_members: int) -> dict[str, Any]:
    """Return what the configuration of a wide attention says otherwise than the model's."""
    if num_members <= 1:
        return {}
    overrides: dict[str, Any] = {"num_attention_heads": num_members * traits.num_heads}
    if hasattr(traits.config, "num_key_value_heads"):
        overrides["num_key_value_heads"] = num_members * traits.num_kv_heads
    return overrides | _add_bias(traits, traits.family.qkv_bias)


def _widen_mlp(traits: FamilyTraits, num_members: int) -> dict[str, Any]:
    """Return what the configuration of a wide MLP says otherwise than the model's."""
    if num_members <= 1:
        return {}
    overrides = {"intermediate_size": num_members * traits.intermediate_size}
    return overrides | _add_bias(traits, traits.family.mlp_bias)


def _add_bias(traits: FamilyTraits, option: bool | str) -> dict[str, Any]:
    """Turn on the option of biases where projections have none: the bias of a norm before them becomes theirs."""
    if traits.family.norm_kind != "layer" or not isinstance(option, str) or getattr(traits.config, option):
        return {}
    return {option: True}


def _list_attention_modules(family: Family) -> list[str]:
    """Return the linear modules of the attention by their names within it, the output's last."""
    parent = f"{family.block.attention}."
    return [module.removeprefix(parent) for module in family.projections if module.startswith(parent)]
