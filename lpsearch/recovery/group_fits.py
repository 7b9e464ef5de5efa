"""The regressions at a group of a plan: of what its branches read, and of what their output projections add.

The mathematics is in :mod:`lpsearch.recovery.refit`, which walks through the groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lpsearch.models.families import DecoderBlock, build_blocks, run_group, select_group
from lpsearch.models.traits import read_traits
from lpsearch.plan import Group
from lpsearch.recovery.projections import Stage, find_input_projections, find_output_projection, get_branch
from lpsearch.recovery.ridge import Gram, fit_ridge
from lpsearch.recovery.walk import Entry

__all__ = ["Batch", "FittedProduct", "GroupFitter", "list_running", "swapped_weights"]

_MIN_SCALE = 1e-3
"""Weights of a post-norm below this share of their largest leave their output alone: dividing by them is noise."""


@dataclass(frozen=True)
class FittedProduct:
    """One regression.

    Attributes:
        layers: whose projections; those of a group that do not drop the branch, or one of them.
        module: of the projections, within a layer, e.g. ``self_attn.o_proj``; the first of those that read an input.
        ridge: the ridge taken; None where no ridge lowered the error on validation windows.
        error_before: error per token of the group's output, or of what the projections read, on validation windows,
            its mean square divided by that of the unmodified model's.
        error_after: and after the fit, before the validation windows were fitted too.
    """

    layers: tuple[int, ...]
    module: str
    ridge: float | None
    error_before: float
    error_after: float


@dataclass(frozen=True)
class Batch:
    """Windows that run together, all to fit or all to validate.

    Attributes:
        entry: what the decoder makes of them.
        token_weights: (batch,), what each window's tokens count.
        is_validation: whether they choose the ridge.
    """

    entry: Entry
    token_weights: Tensor
    is_validation: bool


@dataclass
class _Output:
    """An output projection of a member while its group runs: what it reads, and what its post-norm does.

    Attributes:
        linear: the projection.
        scale: (hidden,) what its output is multiplied by before it is added; None for 1.
        eps: of the post-norm; None without one.
    """

    linear: nn.Linear
    scale: Tensor | None
    eps: float | None
    inputs: Tensor | None = None

    def keep(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Forward hook: keep the inputs, (tokens, inputs), with the norm's factor of each token and ones for a bias."""
        inputs = args[0].flatten(0, -2).float()
        if self.linear.bias is not None:
            inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
        if self.eps is not None:
            norms = output.flatten(0, -2).float().square().mean(-1, keepdim=True)
            inputs = inputs * torch.rsqrt(norms + self.eps)
        self.inputs = inputs


class GroupFitter:
    """Fits the projections of one group after another.

    Attributes:
        blocks: the layers of the unmodified model.

    Args:
        model: the unmodified model.
        batches: the windows to fit to and to validate on.
        ridges: to choose from.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch], ridges: Sequence[float]) -> None:
        self.blocks = build_blocks(model)
        self._model, self._batches, self._ridges = model, tuple(batches), tuple(ridges)
        self._traits = read_traits(model.config)
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}

    def run_layer(self, layer_idx: int, batch: Batch, hidden_states: Tensor) -> Tensor:
        """Run a layer as the unmodified model does."""
        layer: Any = self.blocks[layer_idx].layer
        output: Tensor = layer(hidden_states, **batch.entry.layer_kwargs[layer_idx])
        return output

    def run_group(self, group: Group, batch: Batch, hidden_states: Tensor) -> Tensor:
        """Run the layers of a group as the plan does, with the weights that the model has now."""
        blocks = select_group(self.blocks, group)
        return run_group(blocks, hidden_states, [batch.entry.layer_kwargs[layer_idx] for layer_idx in group])

    def fit_inputs(
        self,
        stage: Stage,
        group: Group,
        states: Sequence[Tensor],
        entered: Mapping[int, Sequence[Tensor]],
        weights: dict[str, Tensor],
    ) -> list[FittedProduct]:
        """Fit what reads the inputs of a group's attentions or MLPs, and put the new weights into ``weights``.

        Args:
            stage: which of the two.
            group: a group that the plan changes.
            states: for each batch, what the group reads.
            entered: by layer, for each batch what the layer reads in the unmodified model.
            weights: the parameters that were fitted by now, by name.
        """
        projections = {
            layer: found
            for layer in list_running(group, stage)
            if (found := find_input_projections(self.blocks[layer], stage))
        }
        with_ones = {layer: all(p.bias is not None for p in found.values()) for layer, found in projections.items()}
        grams = {}
        for layer, found in projections.items():
            weight = next(iter(found.values())).weight
            num_inputs = weight.shape[1] + with_ones[layer]
            grams[layer] = {flag: Gram(num_inputs, weight.shape[1], device=weight.device) for flag in (False, True)}
        for number, (batch, state) in enumerate(zip(self._batches, states, strict=True)):
            with swapped_weights(self._model, weights):
                before = self._run_up_to(stage, select_group(self.blocks, group), group, batch, state)
            for layer in projections:
                block = self.blocks[layer]
                expected_before = self._run_up_to(stage, [block], [layer], batch, entered[layer][number])
                read, expected = (
                    block.attention_input(states) if stage == "attention" else block.mlp_input(states)
                    for states in (before, expected_before)
                )
                inputs = read.flatten(0, 1).float()
                residual = expected.flatten(0, 1).float() - inputs
                if with_ones[layer]:
                    inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
                grams[layer][batch.is_validation].add(inputs, residual, self._weigh(batch, expected))
        products = []
        for layer, found in projections.items():
            if not any(float(gram.residual) for gram in grams[layer].values()):
                continue  # it reads what it reads in the unmodified model
            fit = fit_ridge(grams[layer][False], grams[layer][True], self._ridges)
            for linear in found.values():
                self._map_inputs(linear, None if fit.ridge is None else fit.change, weights)
            branch, hidden = get_branch(self.blocks[layer], stage)[0], fit.change.shape[1]
            name = f"{branch}.{next(iter(found))}"
            errors = (fit.error_before / hidden, fit.error_after / hidden)
            products.append(FittedProduct((layer,), name, fit.ridge, *errors))
        return products

    def _run_up_to(
        self, stage: Stage, blocks: Sequence[DecoderBlock], layers: Iterable[int], batch: Batch, state: Tensor
    ) -> Tensor:
        """Return what the attentions, or the MLPs, of layers that run as one group are given, before their norms."""
        if stage == "attention" or blocks[0].parallel:
            return state
        attentions = [replace(block, runs_mlp=False) for block in blocks]
        return run_group(attentions, state, [batch.entry.layer_kwargs[layer] for layer in layers])

    def _map_inputs(self, linear: nn.Linear, change: Tensor | None, weights: dict[str, Tensor]) -> None:
        """Let a projection of the model read x + x @ change; a last row beyond its inputs goes into its bias.

        Not a projection that an earlier walk changed, since ``change`` is of what the branch reads, not of what an
        earlier map made of it.
        """
        for parameter in linear.parameters():
            weights.pop(self._names[id(parameter)], None)
        if change is not None:
            weight = linear.weight.data.double()
            self._change(linear.weight, weight @ change[: linear.in_features].T, weights)
            if len(change) > linear.in_features:
                self._change(linear.bias, weight @ change[-1], weights)

    def fit_outputs(
        self,
        stage: Stage,
        group: Group,
        states: Sequence[Tensor],
        targets: Sequence[Tensor],
        weights: dict[str, Tensor],
    ) -> FittedProduct | None:
        """Fit the attention's or the MLP's projections of a group, and put the new weights into ``weights``."""
        found = {layer: self.find_output(self.blocks[layer], stage) for layer in list_running(group, stage)}
        outputs = [output for _, output in found.values() if output is not None]
        if not found or len(outputs) < len(found):
            return None
        num_inputs = sum(output.linear.in_features + (output.linear.bias is not None) for output in outputs)
        device = outputs[0].linear.weight.device
        hidden = outputs[0].linear.out_features
        grams = {flag: Gram(num_inputs, hidden, device=device) for flag in (False, True)}
        with swapped_weights(self._model, weights), ExitStack() as hooks:
            for output in outputs:
                hooks.callback(output.linear.register_forward_hook(output.keep).remove)
            for batch, state, target in zip(self._batches, states, targets, strict=True):
                reached = self.run_group(group, batch, state)
                residual = (target.float() - reached.float()).flatten(0, 1)
                token_weights = self._weigh(batch, target)
                inputs = torch.cat([output.inputs for output in outputs if output.inputs is not None], dim=1)
                grams[batch.is_validation].add(inputs, residual, token_weights)
        fit = fit_ridge(grams[False], grams[True], self._ridges)
        changed = dict(weights)
        if fit.ridge is not None:
            self._add(outputs, fit.change, changed)
            has_norm = any(output.eps is not None for output in outputs)
            if has_norm and not self._measure_error(group, states, targets, changed) < fit.error_before:
                fit = replace(fit, ridge=None, error_after=fit.error_before)
        if fit.ridge is not None:
            weights.update(changed)
        module = next(name for name, _ in found.values())
        return FittedProduct(tuple(found), module, fit.ridge, fit.error_before / hidden, fit.error_after / hidden)

    def _measure_error(
        self, group: Group, states: Sequence[Tensor], targets: Sequence[Tensor], weights: Mapping[str, Tensor]
    ) -> float:
        """Return the mean squared error of a group's output over validation tokens, as a fit counts it."""
        total, count = 0.0, 0
        with swapped_weights(self._model, weights):
            for batch, state, target in zip(self._batches, states, targets, strict=True):
                if batch.is_validation:
                    residual = (target.float() - self.run_group(group, batch, state).float()).flatten(0, 1)
                    total += float(residual.double().square().sum(-1) @ self._weigh(batch, target).double())
                    count += len(residual)
        return total / count

    @staticmethod
    def _weigh(batch: Batch, target: Tensor) -> Tensor:
        """Return what each token counts, (tokens,)."""
        power = target.float().square().mean(-1)  # (batch, seq)
        return (batch.token_weights[:, None] / power).flatten()

    def _add(self, outputs: Sequence[_Output], change: Tensor, weights: dict[str, Tensor]) -> None:
        """Add a change of the stacked weight, (inputs, hidden), to the members' weights and biases."""
        sizes = [output.linear.in_features + (output.linear.bias is not None) for output in outputs]
        for output, part in zip(outputs, torch.split(change, sizes), strict=True):
            if output.scale is not None:
                scale = output.scale.double()
                is_small = scale.abs() < _MIN_SCALE * scale.abs().max()
                part = torch.where(is_small, 0.0, part / torch.where(is_small, 1.0, scale))
            rows = part.T  # (hidden, inputs)
            if output.linear.bias is not None:
                self._change(output.linear.bias, rows[:, -1], weights)
                rows = rows[:, :-1]
            self._change(output.linear.weight, rows, weights)

    def _change(self, parameter: Tensor, change: Tensor, weights: dict[str, Tensor]) -> None:
        name = self._names[id(parameter)]
        present = weights.get(name, parameter.data)
        weights[name] = (present.double() + change).to(parameter.dtype)

    def find_output(self, block: DecoderBlock, stage: Stage) -> tuple[str, _Output | None]:
        """Find the projection of a branch that writes to the residual stream; None where it is no linear module."""
        branch, _ = get_branch(block, stage)
        name, linear = find_output_projection(block, stage)
        if linear is None:
            return branch, None
        norm = block.form.attention_post_norm if stage == "attention" else block.form.mlp_post_norm
        multiplier = float(getattr(block.layer, "residual_multiplier", 1.0))
        scale, eps = None, None
        if norm is not None:
            post: Any = getattr(block.layer, norm)
            scale, eps = post.weight.data.float() + self._traits.norm_offset, self._traits.norm_eps
        if multiplier != 1.0:
            scale = (
                torch.ones(linear.out_features, device=linear.weight.device) if scale is None else scale
            ) * multiplier
        return f"{branch}.{name}", _Output(linear, scale, eps)


def list_running(group: Group, stage: Stage) -> tuple[int, ...]:
    """Return the layers of a group whose attention, or whose MLP, the plan does not drop."""
    return group.attention_layers if stage == "attention" else group.mlp_layers


@contextmanager
def swapped_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let parameters of a model be other tensors within a ``with`` block; nothing is copied.

    Args:
        model: its parameters keep their identity.
        weights: by the parameters' names, in their shapes.
    """
    parameters = dict(model.named_parameters())
    originals = {name: parameters[name].data for name in weights}
    for name, tensor in weights.items():
        parameters[name].data = tensor
    try:
        yield
    finally:
        for name, tensor in originals.items():
            parameters[name].data = tensor
