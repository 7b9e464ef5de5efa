"""Apply a plan to a Hugging Face model in place, and undo it.

``model.layers`` keeps its length and its modules, since models look up masks, rotary embeddings and caches by layer
index. Each layer of a group of two or more, or of one that drops a branch, gets a ``forward`` of its own, an instance
attribute that stands before the class's: the group's first slots keep the arguments that the model made for them and
return the hidden states as they came; the last slot runs the whole group. Every member is run with its own keyword
arguments and so with its own mask, rotary embedding and cache slot. Whole layers alone in their group are not touched.
Weights, ``state_dict`` keys and what ``save_pretrained`` writes are those of the unmodified model.

A branch that the plan drops does not run. The cache slot of a dropped attention counts tokens and keeps none
(:mod:`lpsearch.transform.empty_slots`), so a cache has to belong to one plan: reset it, or make a new one, for another.

Under a plan, ``output_hidden_states`` gives the hidden states after each slot: within a group they repeat the group's
input, after its last slot they are its output. A model runs one forward at a time, as with its cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from lpsearch.errors import ModelError, PlanError
from lpsearch.models.families import (
    DecoderBlock,
    build_blocks,
    check_family,
    get_decoder,
    get_decoder_layers,
    run_group,
    select_group,
)
from lpsearch.models.fingerprint import fingerprint_model, fingerprints_match
from lpsearch.models.placement import place_beside, refuse_spread, runs_own_forward
from lpsearch.plan import Plan
from lpsearch.transform.empty_slots import count_tokens

__all__ = [
    "applied_plan",
    "apply_plan",
    "check_plan_layers",
    "check_plan_model",
    "check_plan_numbers",
    "check_unplanned",
    "undo_plan",
]

logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=PreTrainedModel)


def apply_plan(model: _Model, plan: Plan) -> _Model:
    """Make a model run under a plan; a plan applied before is replaced.

    The first call on a model runs the self-test of its family (two short forwards); later ones only exchange the
    layers' ``forward``. A plan with metadata is checked against the model's fingerprint each time.

    Args:
        model: a decoder-only transformers model; changed in place.
        plan: the groups of layers to run in parallel, and the branches to leave out.

    Returns:
        The same model.

    Raises:
        PlanError: if the plan is for another model.
        FamilyError: if the model's decoder layers are not understood.
        ModelError: if something else has replaced a layer's ``forward``.

    Example:
        >>> import lpsearch
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4)
        >>> model = AutoModelForCausalLM.from_config(config)  # usually: from_pretrained(...)
        >>> plan = lpsearch.Plan.from_groups([[0], [1, 2], [3]])  # usually: load_plan("studies/.../joins-06.json")
        >>> model = lpsearch.apply_plan(model, plan)
        >>> model = lpsearch.undo_plan(model)
        >>> with lpsearch.applied_plan(model, plan):
        ...     logits = model(model.dummy_inputs["input_ids"]).logits
    """
    check_plan_model(plan, model)
    _check_forwards(model)
    if _find_application(model) is None:  # otherwise it passed when the other plan was applied
        check_family(model)
    _replace_application(model, plan)
    return model


def undo_plan(model: _Model) -> _Model:
    """Give a model back the ``forward`` of its layers, exactly as before any plan; without one, do nothing.

    Raises:
        FamilyError: if the model has no list of decoder layers.
    """
    _replace_application(model, None)
    return model


@contextmanager
def applied_plan(model: _Model, plan: Plan) -> Generator[_Model, None, None]:
    """Run a model under a plan within a ``with`` block, then under what was applied before it.

    Args:
        model: a decoder-only transformers model; changed in place.
        plan: the groups of layers to run in parallel, and the branches to leave out.

    Yields:
        The same model.

    Raises:
        PlanError: as :func:`apply_plan`, before anything is changed.
        FamilyError: as :func:`apply_plan`, before anything is changed.
        ModelError: as :func:`apply_plan`, before anything is changed.
    """
    application = _find_application(model)
    apply_plan(model, plan)
    try:
        yield model
    finally:
        _replace_application(model, application.plan if application is not None else None)


def check_plan_model(plan: Plan, model: PreTrainedModel) -> None:
    """Check that a plan is for a model: the number of layers, and the fingerprint if the plan names one.

    Raises:
        PlanError: saying which model the plan is for.
        FamilyError: if the model has no list of decoder layers.
    """
    num_layers = len(get_decoder_layers(model))
    needed = plan.metadata is not None and plan.num_layers == num_layers
    check_plan_numbers(
        plan,
        num_layers=num_layers,
        fingerprint=fingerprint_model(model) if needed else "",
        name=type(model).__name__,
    )


def check_plan_layers(plan: Plan, config: PretrainedConfig) -> None:
    """Check that a plan is for as many layers as a configuration names, before there are weights to fingerprint.

    Raises:
        PlanError: saying which model the plan is for.
    """
    # A model that names no number is no decoder, which loading it says.
    num_layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", plan.num_layers)
    fingerprint = "" if plan.metadata is None else plan.metadata.model.fingerprint  # taken to be right until then
    check_plan_numbers(plan.without_recovery(), num_layers=num_layers, fingerprint=fingerprint, name=config.model_type)


def check_plan_numbers(plan: Plan, *, num_layers: int, fingerprint: str, name: str) -> None:
    """Check that a plan is for the model with these numbers.

    Args:
        plan: the plan.
        num_layers: of the model.
        fingerprint: of the model; not looked at if the plan names none.
        name: what to call the model in a message.

    Raises:
        PlanError: saying which model the plan is for.
    """
    meant_for = plan.metadata.model if plan.metadata is not None else None
    subject = f"the plan is for {meant_for.id}, but" if meant_for is not None else "the plan does not fit:"
    if plan.num_layers != num_layers:
        raise PlanError(
            f"{subject} its groups cover {plan.num_layers} layers and this model ({name}) has {num_layers}; load the "
            "model that it was made for, or search a plan for this one"
        )
    if plan.metadata is None or meant_for is None:
        return
    recovery = plan.metadata.provenance.recovery
    expected = meant_for.fingerprint if recovery is None else recovery.fingerprint
    if not fingerprints_match(fingerprint, expected):
        if recovery is not None and fingerprints_match(fingerprint, meant_for.fingerprint):
            raise PlanError(
                f"the plan belongs to repaired weights, and this model ({name}) has the unmodified ones of "
                f"{meant_for.id}; give it the weights with lpsearch.apply_recovery, or take plan.without_recovery()"
            )
        raise PlanError(
            f"{subject} this model ({name}) has other weights or another geometry: its fingerprint is {fingerprint}, "
            f"expected {expected}; load {meant_for.id}"
            f"{f' at revision {meant_for.revision}' if meant_for.revision else ''}, or search a plan for this model"
        )


def check_unplanned(model: PreTrainedModel) -> None:
    """Check that every layer runs its class's own ``forward``.

    Raises:
        ModelError: if a plan is applied, something else has replaced a layer's ``forward``, or the model is spread over
            devices.
    """
    if _find_application(model) is not None:
        raise ModelError(
            f"a plan is applied to this model ({type(model).__name__}); expected the unmodified one: call undo_plan"
        )
    _check_forwards(model)
    refuse_spread(model, what="a change of its weights")


@dataclass
class _LayerGroup:
    """Layers that run together, and what has been kept for them in the forward under way.

    Attributes:
        layers: their numbers, which are those of their cache slots.
        blocks: the layers, without the branches that the plan drops.
    """

    layers: tuple[int, ...]
    blocks: tuple[DecoderBlock, ...]
    kept: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: Callable[..., Tensor] | None = None  # in a forward with gradient checkpointing
    checkpointing_layers: list[nn.Module] = field(default_factory=list)

    def visit(self, position: int, hidden_states: Tensor, layer_kwargs: dict[str, Any]) -> Tensor:
        """Keep the arguments of one slot, or at the last slot run the group.

        Args:
            position: of the slot within the group.
            hidden_states: (batch, seq, hidden), the same in every slot of the group.
            layer_kwargs: the keyword arguments that the model passed to the slot's layer.

        Returns:
            (batch, seq, hidden): the input, or after the last slot the group's output.
        """
        if position == 0:
            self.kept.clear()
        if len(self.kept) != position:
            raise RuntimeError(
                f"slot {position} of a group of {len(self.blocks)} layers ran after {len(self.kept)} of its slots; "
                "the layers under a plan run in order, each once a forward"
            )
        self.kept.append(layer_kwargs)
        if position < len(self.blocks) - 1:
            return hidden_states
        kept, self.kept = self.kept, []
        if self.checkpoint is None:
            self._count_dropped(kept, hidden_states)
            return self._run(hidden_states, kept)
        # As transformers does: the recomputation would write to a cache again.
        kept = [{name: None if isinstance(value, Cache) else value for name, value in k.items()} for k in kept]
        return self.checkpoint(partial(self._run, kept=kept), hidden_states)

    def _run(self, hidden_states: Tensor, kept: list[dict[str, Any]]) -> Tensor:
        """Run what is left of the group; a whole layer alone runs its class's own ``forward``, to the same bits."""
        running = [
            (block, layer_kwargs)
            for block, layer_kwargs in zip(self.blocks, kept, strict=True)
            if block.runs_attention or block.runs_mlp
        ]
        if len(running) == 1 and running[0][0].runs_attention and running[0][0].runs_mlp:
            block, layer_kwargs = running[0]
            layer: Any = block.layer
            forward = layer.__dict__["forward"].before or partial(type(layer).forward, layer)
            output: Tensor = forward(hidden_states, **layer_kwargs)
            return output
        return run_group(self.blocks, place_beside(self.blocks[0].layer, hidden_states), kept)

    def _count_dropped(self, kept: list[dict[str, Any]], hidden_states: Tensor) -> None:
        """Let the cache slots of dropped attentions count the tokens."""
        for layer_idx, block, layer_kwargs in zip(self.layers, self.blocks, kept, strict=True):
            if not block.runs_attention:
                for value in layer_kwargs.values():  # GPT-NeoX has a name of its own for it
                    if isinstance(value, Cache):
                        count_tokens(value, layer_idx, hidden_states)

    def enter(self) -> None:
        """Begin a forward: with gradient checkpointing, the group is recomputed as a whole and not slot by slot."""
        self.leave()  # an exception that is no Exception calls no hooks on its way out
        for block in self.blocks:
            layer: Any = block.layer
            if layer.training and getattr(layer, "gradient_checkpointing", False):
                self.checkpoint = layer._gradient_checkpointing_func
                self.checkpointing_layers.append(layer)
                layer.gradient_checkpointing = False

    def leave(self) -> None:
        """End a forward, also one that an exception broke off."""
        self.kept.clear()
        self.checkpoint = None
        for layer in self.checkpointing_layers:
            layer.gradient_checkpointing = True  # type: ignore[assignment]  # nn.Module types attributes as tensors
        self.checkpointing_layers.clear()


@dataclass(frozen=True, eq=False)
class _Application:
    """A plan as it stands on a model; found through the slots, so that it goes where the layers go."""

    plan: Plan
    groups: tuple[_LayerGroup, ...]
    handles: tuple[RemovableHandle, ...]


@dataclass(frozen=True, eq=False)
class _Slot:
    """What stands in for the ``forward`` of one layer of a group.

    An object and not a closure, so that a deep copy of the model has slots that refer to the copied layers.
    """

    application: _Application
    group: _LayerGroup
    position: int
    before: Callable[..., Tensor] | None  # what accelerate gave the layer; None for the class's own

    def __call__(self, hidden_states: Tensor, **layer_kwargs: Any) -> Tensor:
        return self.group.visit(self.position, hidden_states, layer_kwargs)


@dataclass(frozen=True, eq=False)
class _Enter:
    """Forward pre-hook of the decoder."""

    groups: tuple[_LayerGroup, ...]

    def __call__(self, decoder: nn.Module, args: tuple[Any, ...]) -> None:
        for group in self.groups:
            group.enter()


@dataclass(frozen=True, eq=False)
class _Leave:
    """Forward hook of the decoder that drops what a forward broken off by an exception left behind."""

    groups: tuple[_LayerGroup, ...]

    def __call__(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for group in self.groups:
            group.leave()


def _find_application(model: PreTrainedModel) -> _Application | None:
    """Return the plan that stands on a model; None without one, or with one that changes nothing."""
    for layer in get_decoder_layers(model):
        forward = layer.__dict__.get("forward")
        if isinstance(forward, _Slot):
            return forward.application
    return None


def _check_forwards(model: PreTrainedModel) -> None:
    """Refuse a layer whose ``forward`` another library replaced, since running its parts would pass that by."""
    for layer_idx, layer in enumerate(get_decoder_layers(model)):
        forward = layer.__dict__.get("forward")
        if not isinstance(forward, _Slot) and not runs_own_forward(layer):
            raise ModelError(
                f"layer {layer_idx} ({type(layer).__name__}) has a forward that is not its class's; expected the "
                "class's own, or what accelerate gives the layers of a model that it spreads over devices: take off "
                "what another library put there, or load the model anew"
            )


def _replace_application(model: PreTrainedModel, plan: Plan | None) -> None:
    """Take off the plan that stands on a model and put on another, or none."""
    layers = get_decoder_layers(model)
    standing = _find_application(model)
    if standing is not None:
        for handle in standing.handles:
            handle.remove()
        for group in standing.groups:
            group.leave()
        for layer in layers:
            slot = layer.__dict__.get("forward")
            if isinstance(slot, _Slot):
                del layer.forward
                if slot.before is not None:
                    layer.__dict__["forward"] = slot.before
    if plan is None or not any(group.is_changed for group in plan.groups):
        return
    blocks = build_blocks(model)
    groups = tuple(_LayerGroup(group.layers, select_group(blocks, group)) for group in plan.groups if group.is_changed)
    decoder = get_decoder(model)
    handles = (
        decoder.register_forward_pre_hook(_Enter(groups)),
        decoder.register_forward_hook(_Leave(groups), always_call=True),
    )
    application = _Application(plan, groups, handles)
    for group in groups:
        for position, block in enumerate(group.blocks):
            before = block.layer.__dict__.get("forward")
            block.layer.__dict__["forward"] = _Slot(application, group, position, before)
    logger.debug("%s runs %d layers in %d groups", type(model).__name__, plan.num_layers, len(plan.groups))
