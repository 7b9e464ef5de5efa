"""Decoder-only models in which groups of layers run in parallel, each group as one wide layer.

This file needs torch and transformers only. It stands in every exported directory, so that
``AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)`` loads it there.

Every family's model, attention and MLP are those of transformers, unchanged: a wide layer of m members is the family's
own decoder layer, built for m times the heads, key-value heads and intermediate size. The configuration says so in
``per_layer_config``, by cache slot, and says in ``lpsearch`` what else this file must know:

* ``stem``: what the names of the family's classes in transformers begin with, e.g. ``Llama`` or ``Gemma3Text``, and
  ``layer``: what that of the decoder layer ends with.
* ``groups``: for each group its layers in the base model. Their attention outputs are added to the residual stream at
  once, then their MLP outputs. Attentions and MLPs that were dropped are in none of the following lists.
* ``slots``: the layers that attend alike within a group share a cache slot, and ``model.layers`` has one entry a slot.
  Most groups are one slot. In a group of several (sliding and full attention, with and without rotary embedding), the
  last slot is the layer; those before it only attend, and hand what they found on beside the hidden states.
* ``mlps``: for each entry of ``model.layers`` the layers whose MLPs follow its attention; empty for one that only
  attends.
* ``more_mlps``: MLPs of groups that have no attention left. They have no cache slot and so no entry of their own, and
  stand in the entry numbered ``slot``, at its end or ``ahead`` of its attention (before the first of the model).
  ``config`` is what the configuration of such an MLP says otherwise than the model's.
* ``attention``: the submodule that attends, and ``attention_norm``: the one that norms what it reads, or null.
* ``mlp_norm``: likewise of the MLP; ``attention_post`` and ``mlp_post``: all that their outputs pass before they are
  added to the residual stream.
* ``widened``: the linear modules of an attention whose heads share the hidden size, whatever ``head_dim`` says
  (GPT-NeoX), the output's last. It is built for a hidden size m times as large and reads and writes the model's. Null
  for an attention that has a head size of its own.
* ``post_norms``: the submodules that norm what attention and MLP give, or null.
* ``qk_norm_axis``: which axis of what the norms of queries and keys get has the heads, counted from the end; the last
  where they take all heads at once; null without such norms.

The key-value heads of the members take turns: head j of the first member, of the second ..., then heads j + 1, each
followed by its query heads. Hence tensor parallelism gives every rank an equal part of every member. Where a norm must
see one member alone (after the attention and the MLP in Gemma 2 and 3 and OLMo 2, on queries and keys in Qwen3, Gemma 3
and OLMo 2), there is one module a member.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import signature
from typing import Any

import torch
import transformers
from torch import Tensor, nn

MODEL_TYPE_PREFIX = "lpsearch_"

_CLASS_NAME = re.compile(r"LP(\w+?)(?:Config|Model|ForCausalLM)")

_MLP_BLOCKS = 64
"""Into how many parts at most the members of a group with post-norms split their intermediate size to take turns."""


def count_mlp_blocks(intermediate_size: int) -> int:
    """Return the number of equal parts of one member's intermediate size between which the members take turns."""
    return math.gcd(intermediate_size, _MLP_BLOCKS)


class LayerConfig:
    """The configuration as one layer sees it: the model's own, but for the layer's overrides.

    It is a view, so that what is set on the model's configuration later (the attention implementation) holds here too.
    """

    def __init__(self, config: Any, overrides: dict[str, Any]) -> None:
        self.__dict__["_config"] = config
        self.__dict__["_overrides"] = overrides

    def __getattr__(self, name: str) -> Any:
        """Return the layer's value, or else the model's."""
        if name.startswith("__"):
            raise AttributeError(name)
        return self._overrides[name] if name in self._overrides else getattr(self._config, name)


class MemberLinears(nn.ModuleList):
    """One linear module a member, each on its own features; the outputs stand side by side.

    Args:
        linears: one a member.
        block: features that a member has in each of its turns.
    """

    def __init__(self, linears: list[nn.Module], block: int) -> None:
        super().__init__(linears)
        self.block = block

    def forward(self, features: Tensor) -> Tensor:
        """Take (..., turns x members x block) to (..., members x hidden)."""
        parts = torch.unflatten(features, -1, (-1, len(self), self.block)).unbind(-2)
        return torch.cat([linear(part.flatten(-2)) for linear, part in zip(self, parts, strict=True)], dim=-1)


class MemberNorms(nn.ModuleList):
    """One norm a member, for its queries or keys.

    Args:
        norms: one a member.
        axis: of the heads, counted from the end. If it is the last, the norm takes all heads of a member at once.
        block: entries along the axis that a member has in each of its turns.
    """

    def __init__(self, norms: list[nn.Module], axis: int, block: int) -> None:
        super().__init__(norms)
        self.axis = axis
        self.block = block

    def forward(self, states: Tensor) -> Tensor:
        """Keep the shape, e.g. (batch, seq, turns x members x block, head_dim) for ``axis`` -2."""
        members = torch.unflatten(states, self.axis, (-1, len(self), self.block))  # (..., turns, members, block, ...)
        turns = []
        for member in range(len(self)):
            part = members.select(self.axis - 1, member).flatten(self.axis - 1, self.axis)
            turns.append(torch.unflatten(self[member](part), self.axis, (-1, self.block)))
        return torch.stack(turns, dim=self.axis - 1).flatten(self.axis - 2, self.axis)


class MemberPostNorms(nn.ModuleList):
    """One post-norm a member, each on its own output; their sum is what the residual stream gets."""

    def forward(self, outputs: Tensor) -> Tensor:
        """Take (..., members x hidden) to (..., hidden)."""
        parts = outputs.chunk(len(self), dim=-1)
        total: Tensor = self[0](parts[0])
        for norm, part in zip(self[1:], parts[1:], strict=True):
            total = total + norm(part)
        return total


# Transformers lets the attention implementation be chosen unless a class named "...Attention..." here derives from
# nn.Module: such names are left to subclasses of its own.
class LeadingSlot(nn.Module):
    """The members of a group that attend in a way of their own, ahead of the slot that is the layer.

    Args:
        layer: of which the attention and the norm before it are kept.
        attention_norm: the name of that norm; None if there is none.
    """

    def __init__(self, layer: Any, attention_norm: str | None) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        if attention_norm is not None:
            self.add_module(attention_norm, layer.get_submodule(attention_norm))
        self.self_attn = layer.self_attn
        self.hidden_size = layer.hidden_size

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Take (..., hidden + carried) to the same hidden states with this slot's attention carried too."""
        hidden_states, carried = _split_carried(hidden_states, self.hidden_size)
        normed = hidden_states if self.attention_norm is None else getattr(self, self.attention_norm)(hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, carried=carried, **kwargs)
        return torch.cat([hidden_states, attended], dim=-1)


class FeedForward(nn.Module):
    """The MLP of a group that has no attention: x + F(N'(x)).

    Args:
        layer: a decoder layer, of which the MLP and what stands before and after it are kept.
        names: the entry ``lpsearch`` of the configuration.
    """

    mlp: nn.Module

    def __init__(self, layer: Any, names: dict[str, Any]) -> None:
        super().__init__()
        self.mlp_norm: str | None = names["mlp_norm"]
        self.mlp_post = tuple(names["mlp_post"])
        for name in _name_mlp_modules(names):
            self.add_module(name, layer.get_submodule(name))
        self.residual_multiplier = getattr(layer, "residual_multiplier", None)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Keep the shape, (..., hidden)."""
        normed = hidden_states if self.mlp_norm is None else getattr(self, self.mlp_norm)(hidden_states)
        return hidden_states + _finish_branch(self, self.mlp(normed), self.mlp_post)


def _name_mlp_modules(names: dict[str, Any]) -> list[str]:
    """Return the submodules of a decoder layer that belong to its MLP."""
    return [name for name in (names["mlp_norm"], "mlp", *names["mlp_post"]) if name is not None]


def _finish_branch(owner: Any, output: Tensor, post: Iterable[str]) -> Tensor:
    """Take the output of an attention or an MLP to what is added to the residual stream."""
    for name in post:
        output = getattr(owner, name)(output)
    return output if owner.residual_multiplier is None else output * owner.residual_multiplier


def list_more_mlps(names: dict[str, Any], slot: int) -> dict[str, list[dict[str, Any]]]:
    """Return the further MLPs of an entry of ``model.layers``, by the attribute that has them."""
    own = [more for more in names.get("more_mlps", ()) if more["slot"] == slot]
    return {
        "mlps_ahead": [more for more in own if more["ahead"]],
        "more_mlps": [more for more in own if not more["ahead"]],
    }


def _split_carried(hidden_states: Tensor, hidden_size: int) -> tuple[Tensor, Tensor | None]:
    """Split what a slot got into the hidden states and what earlier slots of its group found, if there are any."""
    if hidden_states.shape[-1] == hidden_size:
        return hidden_states, None
    return hidden_states[..., :hidden_size], hidden_states[..., hidden_size:]


@cache
def _carrying_attention(attention_class: Any, *, side_by_side: bool) -> type[nn.Module]:
    """Return a family's attention that adds its output to what is carried, or puts it beside that."""

    class CarryingAttention(attention_class):  # type: ignore[misc]
        # Not `forward`: runtimes that bring their own attention read the source of the stock one.
        def __call__(self, *args: Any, carried: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            output, weights = super().__call__(*args, **kwargs)
            if carried is not None:
                output = torch.cat([carried, output], dim=-1) if side_by_side else carried + output
            return output, weights

    return CarryingAttention


@cache
def _carrying_layer(layer_class: Any) -> type[nn.Module]:
    """Return a family's decoder layer whose attention gets what earlier slots of its group found."""

    class CarryingLayer(layer_class):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            hidden_states, carried = _split_carried(hidden_states, self.hidden_size)
            output: Tensor = super().forward(hidden_states, carried=carried, **kwargs)
            return output

    return CarryingLayer


@cache
def _attending_layer(layer_class: Any) -> type[nn.Module]:
    """Return a family's decoder layer without MLP."""

    class AttendingLayer(layer_class):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            norm, attention, *post = self.stage
            normed = hidden_states if norm is None else getattr(self, norm)(hidden_states)
            attended, _ = getattr(self, attention)(hidden_states=normed, **kwargs)
            return hidden_states + _finish_branch(self, attended, post)

    return AttendingLayer


@cache
def _longer_layer(layer_class: Any) -> type[nn.Module]:
    """Return a decoder layer with further MLPs ahead of it and after it."""

    class LongerLayer(layer_class):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            for mlp in self.mlps_ahead:
                hidden_states = mlp(hidden_states)
            hidden_states = super().forward(hidden_states, **kwargs)
            for mlp in self.more_mlps:
                hidden_states = mlp(hidden_states)
            return hidden_states

    return LongerLayer


def build_layers(config: Any) -> nn.ModuleList:
    """Build one entry a cache slot for a configuration of one of this file's classes."""
    names = config.lpsearch
    stem: str = names["stem"]
    modeling = sys.modules[getattr(transformers, f"{stem}Model").__module__]
    layer_class = getattr(modeling, f"{stem.removesuffix('Text')}{names.get('layer', 'DecoderLayer')}")
    overrides = {int(slot): values for slot, values in (config.to_dict().get("per_layer_config") or {}).items()}
    return nn.ModuleList(
        _build_entry(layer_class, config, slot, overrides.get(slot) or {}) for slot in range(len(names["slots"]))
    )


def _build_entry(layer_class: Any, config: Any, slot: int, overrides: dict[str, Any]) -> nn.Module:
    """Build one entry of ``model.layers``."""
    names = config.lpsearch
    group = next(group for group in names["groups"] if names["slots"][slot][0] in group)
    alike = [members for members in names["slots"] if members[0] in group]  # the slots of the group
    members, mlp = names["slots"][slot], list_mlps(names)[slot]
    layer: Any = _build_layer(layer_class, config, slot, overrides)
    if names.get("widened") and len(members) > 1:
        _widen_attention(layer, names, LayerConfig(config, overrides), slot, num_members=len(members))
    _give_attentions_their_own(layer, names, num_members=len(members), num_attending=sum(map(len, alike)))
    _give_mlps_their_own(layer, names, num_members=len(mlp))
    if len(alike) > 1:
        stock: Any = type(layer.self_attn)
        layer.self_attn.__class__ = _carrying_attention(stock, side_by_side=names["post_norms"] is not None)
    entry_class = layer_class
    if members != alike[-1]:
        layer, entry_class = LeadingSlot(layer, names["attention_norm"]), LeadingSlot
    else:
        if not mlp:
            _remove_mlp(layer, names)
            entry_class = _attending_layer(entry_class)
        if len(alike) > 1:
            entry_class = _carrying_layer(entry_class)
    further = list_more_mlps(names, slot)
    if any(further.values()):
        for attribute, mlps in further.items():
            built = [_build_feed_forward(layer_class, config, slot, more) for more in mlps]
            setattr(layer, attribute, nn.ModuleList(built))
        entry_class = _longer_layer(entry_class)
    layer.__class__ = entry_class
    entry: nn.Module = layer
    return entry


def _remove_mlp(layer: Any, names: dict[str, Any]) -> None:
    """Take the MLP out of a decoder layer, and note what its attention needs without the stock forward."""
    for name in _name_mlp_modules(names):
        delattr(layer, name)
    layer.stage = (names["attention_norm"], names["attention"], *names["attention_post"])
    layer.residual_multiplier = getattr(layer, "residual_multiplier", None)


def list_mlps(names: dict[str, Any]) -> list[list[int]]:
    """Return for each entry of ``model.layers`` the layers whose MLPs follow its attention.

    Directories of versions that dropped nothing do not say: all those of a group, after its last slot.
    """
    if "mlps" in names:
        mlps: list[list[int]] = names["mlps"]
        return mlps
    closing: dict[int, list[int]] = {}
    for group in names["groups"]:
        closing[max(slot for slot, members in enumerate(names["slots"]) if members[0] in group)] = group
    return [closing.get(slot, []) for slot in range(len(names["slots"]))]


def _build_layer(layer_class: Any, config: Any, slot: int, overrides: dict[str, Any]) -> Any:
    """Build a family's decoder layer for a configuration of its own."""
    layer = layer_class(LayerConfig(config, overrides) if overrides else config, slot)
    layer.hidden_size = config.hidden_size
    return layer


def _build_feed_forward(layer_class: Any, config: Any, slot: int, more: dict[str, Any]) -> nn.Module:
    """Build the MLP of a group without attention."""
    layer = _build_layer(layer_class, config, slot, more["config"])
    _give_mlps_their_own(layer, config.lpsearch, num_members=len(more["layers"]))
    return FeedForward(layer, config.lpsearch)


def _widen_attention(layer: Any, names: dict[str, Any], config: LayerConfig, slot: int, *, num_members: int) -> None:
    """Give a layer the attention of a model that is m times as wide, between hidden states of the model's own size."""
    hidden_size = config.hidden_size
    wide_config = LayerConfig(config, {"hidden_size": num_members * hidden_size})
    attention = type(layer.get_submodule(names["attention"]))(wide_config, slot)
    attention.config = config
    *inputs, output = names["widened"]
    for name in (*inputs, output):
        stock: Any = getattr(attention, name)
        width = (stock.in_features, hidden_size) if name == output else (hidden_size, stock.out_features)
        setattr(attention, name, nn.Linear(*width, bias=stock.bias is not None))
    setattr(layer, names["attention"], attention)


def _give_attentions_their_own(layer: Any, names: dict[str, Any], *, num_members: int, num_attending: int) -> None:
    """Replace the modules of a wide attention that may not mix its members by one a member.

    Args:
        layer: a decoder layer.
        names: the entry ``lpsearch`` of the configuration.
        num_members: layers that attend in it.
        num_attending: layers that attend in its group.
    """
    axis = names["qk_norm_axis"]
    if axis is None and names["post_norms"] is None:
        return
    attention = layer.self_attn
    head_dim = attention.head_dim
    query_block = attention.num_key_value_groups  # query heads of one key-value head
    if num_members > 1 and axis is not None:
        for name, block in (("q_norm", query_block), ("k_norm", 1)):
            norm = getattr(attention, name)
            size = norm.weight.shape[0] // num_members if axis == -1 else head_dim
            norms = [_build_norm(norm, size) for _ in range(num_members)]
            setattr(attention, name, MemberNorms(norms, axis, block * head_dim if axis == -1 else block))
    if names["post_norms"] is None:
        return
    if num_members > 1:
        _split_linear(attention, "o_proj", num_members, query_block * head_dim)
    if num_attending > 1:
        _give_post_norms(layer, names["post_norms"][0], num_attending)


def _give_mlps_their_own(layer: Any, names: dict[str, Any], *, num_members: int) -> None:
    """Replace the modules of a wide MLP that may not mix its members by one a member."""
    if names["post_norms"] is None or num_members <= 1:
        return
    inner = layer.mlp.down_proj.in_features // num_members
    _split_linear(layer.mlp, "down_proj", num_members, inner // count_mlp_blocks(inner))
    _give_post_norms(layer, names["post_norms"][1], num_members)


def _give_post_norms(layer: Any, name: str, num_members: int) -> None:
    """Replace a post-norm by one a member."""
    norm = getattr(layer, name)
    setattr(layer, name, MemberPostNorms([_build_norm(norm, layer.hidden_size) for _ in range(num_members)]))


def _build_norm(norm: Any, size: int) -> nn.Module:
    """Build another norm of the same kind."""
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    built: nn.Module = type(norm)(size, eps=eps)
    return built


def _split_linear(owner: nn.Module, name: str, num_members: int, block: int) -> None:
    """Replace a wide linear module by those of the members that it stands for.

    They are registered under the plural of its name, ``o_projs`` for ``o_proj``, and found under its own by the stock
    forward: what tensor parallelism does to ``o_proj`` is for one linear module, and each member gets it by itself.
    """
    linear: Any = getattr(owner, name)
    delattr(owner, name)
    width, has_bias = linear.in_features // num_members, linear.bias is not None
    members: list[nn.Module] = [nn.Linear(width, linear.out_features, bias=has_bias) for _ in range(num_members)]
    setattr(owner, f"{name}s", MemberLinears(members, block))
    stock: Any = type(owner)
    owner.__class__ = _call_plural(stock, name)


@cache
def _call_plural(module_class: Any, name: str) -> type[nn.Module]:
    """Return a subclass in which a submodule is found under the singular of its name too.

    Runtimes that rewrite modules look at one module of a class to learn its submodules, so it is a class of its own.
    """
    plural = property(lambda module: getattr(module, f"{name}s"))
    return type(module_class.__name__, (module_class,), {name: plural, "__module__": __name__})


@contextmanager
def _without_layers(config: Any) -> Iterator[None]:
    """Let a stock model build everything but its decoder layers."""
    num_hidden_layers = config.num_hidden_layers
    config.num_hidden_layers = 0
    try:
        yield
    finally:
        config.num_hidden_layers = num_hidden_layers


def _plan_members(decoder: Any, config: Any) -> None:
    """Let tensor parallelism do to modules that there are one a member what it does to the stock one."""
    plan: dict[str, str] = vars(decoder)["_tp_plan"]
    if config.lpsearch.get("more_mlps"):
        plan = plan | {
            name.replace(".mlp.", f".{attribute}.*.mlp."): style
            for name, style in plan.items()
            if ".mlp." in name
            for attribute in ("mlps_ahead", "more_mlps")
        }
    if config.lpsearch["post_norms"] is not None or config.lpsearch["qk_norm_axis"] is not None:
        plan = plan | {
            f"{name}.*" if name.endswith("_norm") else f"{name}s.*": style
            for name, style in plan.items()
            if name.endswith(("_norm", ".o_proj", ".down_proj"))
        }
    decoder._tp_plan = plan


@cache
def _build_classes(stem: str) -> dict[str, type[Any]]:
    """Build the configuration, the decoder and the language model of a family, by their class names."""
    stock_config: Any = getattr(transformers, f"{stem}Config")
    stock_decoder: Any = getattr(transformers, f"{stem}Model")
    stock_model: Any = getattr(transformers, f"{stem.removesuffix('Text')}ForCausalLM")

    class Config(stock_config):  # type: ignore[misc]
        model_type = MODEL_TYPE_PREFIX + stock_config.model_type
        _auto_class = "AutoConfig"

        def __getattribute__(self, name: str) -> Any:
            # Transformers refuses to read what differs between layers from the configuration of the model; here it has
            # a meaning there too: the value of one layer of the base model.
            if torch.compiler.is_compiling():  # which cannot trace `object.__getattribute__`
                values = super().__getattribute__("__dict__")
                return values[name] if name in values else super().__getattribute__(name)
            # `generate` reads it a hundred times a token, so not through the stock lookups but for another name of a
            # value, and for errors.
            try:
                return object.__getattribute__(self, name)
            except AttributeError:
                return super().__getattribute__(name)

    class Model(stock_decoder):  # type: ignore[misc]
        config_class = Config
        _auto_class = "AutoModel"

        def __init__(self, config: Any) -> None:
            with _without_layers(config):
                super().__init__(config)
            self.layers = build_layers(config)
            self.post_init()
            _plan_members(self, config)
            if config._attn_implementation == "vllm":
                # vLLM leaves queries and keys split by heads where the plan gathers them for a norm over all (OLMo 2).
                plan: dict[str, str] = vars(self)["_tp_plan"]
                self._tp_plan = {n: "rowwise" if s == "rowwise_split_input" else s for n, s in plan.items()}

    class ForCausalLM(stock_model):  # type: ignore[misc]
        config_class = Config
        _auto_class = "AutoModelForCausalLM"

        def __init__(self, config: Any) -> None:
            with _without_layers(config):
                super().__init__(config)
            decoder: Any = self.get_decoder()
            decoder.layers = build_layers(config)
            _plan_members(decoder, config)
            self.post_init()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

        # `generate` asks for the signature at every token of a model that is not its own: this one is ready-made.
        forward.__signature__ = signature(stock_model.forward)  # type: ignore[attr-defined]

    classes = {}
    for built in (Config, Model, ForCausalLM):
        name = class_name(stem, built.__name__)
        built.__name__ = built.__qualname__ = name
        classes[name] = built
    return classes


def class_name(stem: str, kind: str) -> str:
    """Name a class of this file: ``kind`` is Config, Model or ForCausalLM, e.g. ``LPLlamaForCausalLM``."""
    return f"LP{stem}{kind}"


def __getattr__(name: str) -> Any:
    """Build the classes of a family when one is asked for, so that only its code is imported."""
    match = _CLASS_NAME.fullmatch(name)
    if match is None or not hasattr(transformers, f"{match[1]}Config"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _build_classes(match[1])[name]
