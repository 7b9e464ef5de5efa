"""Decoder layers as residual branches: what a family's layer consists of, and the test that it is so.

A decoder layer k is an attention branch A_k(N_k(x)) and an MLP branch F_k(N'_k(x)), each with its own post-norm,
dropout and residual multiplier where the family has them. Layers are recognised by structure, the exact set of their
submodules, not by name: a :class:`~lpsearch.models.traits.BlockForm` says which submodule plays which part. Structure
cannot show the arithmetic between the submodules, so :func:`check_family` runs every layer both ways and refuses a
model whose layers compute anything else.

The layers may be a mixture of experts or dense; the MLP branch is whatever ``layer.mlp`` computes.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any, cast

import torch
from torch import Tensor, nn

from lpsearch.errors import FamilyError, ModelError
from lpsearch.models.placement import find_input_device
from lpsearch.models.traits import FAMILIES, BlockForm
from lpsearch.plan import Group

__all__ = [
    "DecoderBlock",
    "build_blocks",
    "check_family",
    "get_decoder",
    "get_decoder_layers",
    "run_group",
    "select_group",
]

logger = logging.getLogger(__name__)

_SELF_TEST_TOKENS = 12
_SELF_TEST_ULPS = 8
"""Rounding steps, of the layer's dtype, that the two ways of computing a layer may differ by."""


_FORM_OF_SUBMODULES = {family.block.submodules: family.block for family in FAMILIES.values()}

# Layers that passed the self-test. Weak and keyed by the module itself: a replaced layer is tested again.
_PASSED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class DecoderBlock:
    """A decoder layer seen as its two residual branches. It holds the layer, not its weights.

    Attributes:
        layer: the layer.
        form: which of its submodules plays which part.
        runs_attention: whether its attention counts in :func:`run_group`; a plan may drop it.
        runs_mlp: and its MLP.
    """

    layer: nn.Module
    form: BlockForm
    runs_attention: bool = True
    runs_mlp: bool = True

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP both read the layer's input."""
        return bool(getattr(self.layer, "use_parallel_residual", self.form.parallel))

    def attention_branch(self, hidden_states: Tensor, layer_kwargs: Mapping[str, Any]) -> Tensor:
        """Compute A_k(N_k(x)), with the layer's own post-norm and residual multiplier.

        Args:
            hidden_states: x, (batch, seq, hidden).
            layer_kwargs: the keyword arguments that the model passed to this very layer.

        Returns:
            (batch, seq, hidden).
        """
        attention_output = self._submodule(self.form.attention)(self.attention_input(hidden_states), **layer_kwargs)[0]
        return self._finish(attention_output, self.form.attention_post)

    def mlp_branch(self, hidden_states: Tensor) -> Tensor:
        """Compute F_k(N'_k(x)), with the layer's own post-norm and residual multiplier.

        Args:
            hidden_states: x' (x for a parallel block), (batch, seq, hidden).

        Returns:
            (batch, seq, hidden).
        """
        return self._finish(self._submodule("mlp")(self.mlp_input(hidden_states)), self.form.mlp_post)

    def attention_input(self, hidden_states: Tensor) -> Tensor:
        """Compute what the attention reads, N_k(x), both (batch, seq, hidden)."""
        norm = self.form.attention_norm
        return hidden_states if norm is None else cast(Tensor, self._submodule(norm)(hidden_states))

    def mlp_input(self, hidden_states: Tensor) -> Tensor:
        """Compute what the MLP reads, N'_k(x'), both (batch, seq, hidden)."""
        norm = self.form.mlp_norm
        return hidden_states if norm is None else cast(Tensor, self._submodule(norm)(hidden_states))

    def _finish(self, branch: Tensor, post: tuple[str, ...]) -> Tensor:
        for name in post:
            branch = self._submodule(name)(branch)
        multiplier = getattr(self.layer, "residual_multiplier", None)  # granite
        return branch if multiplier is None else branch * multiplier

    def _submodule(self, name: str) -> Any:
        # Looked up at each call, so that a submodule wrapped later (an adapter, a quantised one) is the one that runs.
        return getattr(self.layer, name)


def run_group(
    blocks: Sequence[DecoderBlock], hidden_states: Tensor, layer_kwargs: Sequence[Mapping[str, Any]]
) -> Tensor:
    """Run consecutive layers as one group.

    The group's equations (arXiv 2502.02790), sums over its members k::

        x' = x  + sum_k A_k(N_k(x))
        y  = x' + sum_k F_k(N'_k(x'))

    and y = x + sum_k (A_k(N_k(x)) + F_k(N'_k(x))) for families with parallel attention and MLP. The branches are summed
    before they are added to the residual stream, in layer order. A branch that is dropped is in no sum, and an empty
    sum adds nothing: a group without branches returns what it was given.

    Args:
        blocks: the members, in layer order, all parallel or none.
        hidden_states: x, (batch, seq, hidden).
        layer_kwargs: for each member the keyword arguments of its own layer: mask, rotary embedding, cache.

    Returns:
        y, (batch, seq, hidden).
    """
    if blocks[0].parallel:
        return _add_sum(
            hidden_states,
            [
                branches
                for block, kwargs in zip(blocks, layer_kwargs, strict=True)
                if (branches := _run_parallel_branches(block, hidden_states, kwargs)) is not None
            ],
        )
    hidden_states = _add_sum(
        hidden_states,
        [
            block.attention_branch(hidden_states, kwargs)
            for block, kwargs in zip(blocks, layer_kwargs, strict=True)
            if block.runs_attention
        ],
    )
    return _add_sum(hidden_states, [block.mlp_branch(hidden_states) for block in blocks if block.runs_mlp])


def _run_parallel_branches(
    block: DecoderBlock, hidden_states: Tensor, layer_kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Return the sum of what a parallel block runs; None where it runs nothing."""
    attention = block.attention_branch(hidden_states, layer_kwargs) if block.runs_attention else None
    mlp = block.mlp_branch(hidden_states) if block.runs_mlp else None
    if attention is None or mlp is None:
        return mlp if attention is None else attention
    return attention + mlp


def _add_sum(hidden_states: Tensor, branches: list[Tensor]) -> Tensor:
    """Add the sum of branches, left to right; unlike the builtin, without adding 0 first."""
    if not branches:
        return hidden_states
    # Where a model is spread, the members of a group may run on several devices.
    return hidden_states + reduce(add, [branch.to(hidden_states.device) for branch in branches])


def get_decoder(model: nn.Module) -> nn.Module:
    """Return the module that owns the text decoder layers, e.g. ``model.model`` or ``model.gpt_neox``.

    Raises:
        FamilyError: for an encoder-decoder model, and for one without a list of decoder layers.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise FamilyError(
            f"{type(model).__name__} is no transformers model; expected a decoder-only PreTrainedModel, "
            "e.g. from AutoModelForCausalLM.from_pretrained"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise FamilyError(f"{_name(model)} has an encoder and a decoder; lpsearch takes decoder-only models. {_MEND}")
    decoder = model.get_decoder()  # type: ignore[operator]  # nn.Module types every attribute as tensor or module
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise FamilyError(
            f"{_name(model)}: its decoder ({type(decoder).__name__}) has no list of decoder layers named `layers`. "
            f"{_MEND}"
        )
    return decoder  # type: ignore[no-any-return]


def get_decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the text decoder's layers.

    Raises:
        FamilyError: as :func:`get_decoder`.
    """
    layers = get_decoder(model).layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def build_blocks(model: nn.Module) -> tuple[DecoderBlock, ...]:
    """View every decoder layer of a model as its two branches, going by structure alone.

    Raises:
        FamilyError: for a layer whose submodules are those of no known form, or for layers of which only some run
            attention and MLP in parallel.
    """
    blocks: list[DecoderBlock] = []
    for layer_idx, layer in enumerate(get_decoder_layers(model)):
        submodules = frozenset(name for name, _ in layer.named_children())
        form = _FORM_OF_SUBMODULES.get(submodules)
        if form is None:
            raise FamilyError(
                f"{_name(model)}: its decoder layer {layer_idx} ({type(layer).__name__}) is not built of one attention "
                f"and one MLP in a known form; it has {', '.join(sorted(submodules))}. {_MEND}"
            )
        if any(block.layer is layer for block in blocks):
            raise FamilyError(
                f"{_name(model)}: its decoder layer {layer_idx} is the same module as an earlier one, while each has a "
                "slot in the cache; give every place a layer of its own (copy.deepcopy, then set `layer_idx`)"
            )
        blocks.append(DecoderBlock(layer, form))
    if len({block.parallel for block in blocks}) > 1:
        raise FamilyError(f"{_name(model)}: only some of its decoder layers run attention and MLP in parallel. {_MEND}")
    return tuple(blocks)


def select_group(blocks: Sequence[DecoderBlock], group: Group) -> tuple[DecoderBlock, ...]:
    """Return the layers of a group, as :func:`run_group` takes them, each without the branches that the group drops.

    Args:
        blocks: every layer of the model, as :func:`build_blocks` returns them.
        group: of a plan for the model.
    """
    return tuple(
        replace(
            blocks[layer_idx],
            runs_attention=layer_idx in group.attention_layers,
            runs_mlp=layer_idx in group.mlp_layers,
        )
        for layer_idx in group
    )


def check_family(model: nn.Module) -> None:
    """Check that every decoder layer is its input plus its attention branch plus its MLP branch.

    One ordinary forward of a few random tokens, in which each layer's input and keyword arguments, as the model made
    them, are run through :func:`run_group` as well. The two results may differ elementwise by 8 units of the dtype's
    resolution at |input| + |output| + RMS(output - input): by the order of a few additions. A layer that passed once
    is not run again. The model must have no plan applied; random state and train mode are left as they were.

    Raises:
        FamilyError: naming the model type and the first layer that computes something else.
        ModelError: if a layer's output is not finite, so that nothing can be compared.
    """
    blocks = build_blocks(model)
    if all(block.layer in _PASSED for block in blocks):
        return
    decoder = get_decoder(model)
    embeddings: Any = decoder.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(embeddings.weight.shape[0], (1, _SELF_TEST_TOKENS), generator=generator)
    in_training = [module for module in decoder.modules() if module.training]
    handles = []
    try:
        decoder.eval()
        for layer_idx, block in enumerate(blocks):
            hook = _SelfTestHook(model, layer_idx, block)
            handles.append(block.layer.register_forward_hook(hook, with_kwargs=True))
        with torch.no_grad():
            decoder(input_ids=input_ids.to(find_input_device(model)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for module in in_training:
            module.training = True
    _PASSED.update(block.layer for block in blocks)
    logger.debug("%s: %d decoder layers passed the self-test", _name(model), len(blocks))


@dataclass(frozen=True)
class _SelfTestHook:
    """Forward hook of one layer that compares its output with that of its branches."""

    model: nn.Module
    layer_idx: int
    block: DecoderBlock

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        where = f"{_name(self.model)}: its decoder layer {self.layer_idx} ({type(layer).__name__})"
        if len(args) != 1 or not isinstance(output, Tensor):
            raise FamilyError(
                f"{where} takes {len(args)} positional arguments and returns {type(output).__name__}; expected the "
                f"hidden states alone and a tensor. {_MEND}"
            )
        hidden_states: Tensor = args[0]
        if not bool(output.isfinite().all()):
            raise ModelError(
                f"{where} returns values that are not finite in {output.dtype}, so it cannot be tested; load the model "
                "in bfloat16 or float32, and check its weights"
            )
        branches = run_group([self.block], hidden_states, [kwargs]).to(output.device)
        hidden_states = hidden_states.to(output.device)
        x, expected, actual = hidden_states.float(), output.float(), branches.float()
        scale = x.abs() + expected.abs() + (expected - x).square().mean().sqrt()
        allowed = _SELF_TEST_ULPS * torch.finfo(output.dtype).eps * scale
        excess = ((actual - expected).abs() - allowed).flatten()
        worst = int(excess.argmax())
        if not bool(excess[worst] <= 0):
            difference = float((actual - expected).abs().flatten()[worst])
            raise FamilyError(
                f"{where} is not its input plus attention plus MLP: they differ by {difference:.3g}, expected at most "
                f"{float(allowed.flatten()[worst]):.3g} in {output.dtype}. {_MEND}"
            )


def _name(model: nn.Module) -> str:
    """Name a model in a message, e.g. ``model type gpt2 (GPT2LMHeadModel)``."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return f"model type {model_type} ({type(model).__name__})"


_MEND = f"Use a model of a supported family ({', '.join(FAMILIES)}, or one built like them)"
