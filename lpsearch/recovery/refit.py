"""Closed-form repair of a plan: projections fitted to what the unmodified model computes.

The hidden states of calibration windows are walked through the model twice, layer by layer through the unmodified one
and group by group through the plan. At the end of a group the two differ by R. With Z the stacked inputs of the group's
attention output projections, and then of its MLP output projections, ridge regression of R on Z gives what is added to
the stacked weight. The walk goes on with the new weights, so that later groups also take up what earlier ones left.
Nothing is added at run time.

Before that, what the branches of a changed group read is mended. A member's attention reads the input of the group and
not what the layers before it make of it. Ridge regression of the difference between what the branch would read in the
unmodified model and what it reads, on what it reads, is a linear map; it goes into the projections that read it
(q, k and v, gate and up). Of six pairs of a model it won back more than all output projections do (studies/LOG.md).

A group that drops branches is fitted by the projections that are left of it. One of which nothing is left counts as
part of the group before it, which is then fitted to what the unmodified model computes behind both; at the very
beginning, as part of the group behind it.

A token counts by the inverse of its mean square in the unmodified model, since the norm that reads it divides by that:
without it a few tokens with huge hidden states (Sun et al., arXiv 2402.17762) decide the fit.

What a walk finds at a group depends on the groups up to there alone, so plans that begin alike share it
(:mod:`lpsearch.recovery.beginnings`).

Where the branch passes a post-norm, its scale at each token is held as it is, and the weight of the norm is divided
out: the fit is of first order, and what follows is fitted to what the norm really returns. A fit that does not lower
the error of what the norm returns is not taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lpsearch.data import Windows
from lpsearch.errors import DataError, LpsearchError, ModelError, PlanError
from lpsearch.models.families import DecoderBlock, build_blocks, check_family, run_group, select_group
from lpsearch.models.memory import find_free_bytes
from lpsearch.models.traits import read_traits
from lpsearch.plan import Group, Plan
from lpsearch.recovery.beginnings import Beginning, BeginningCache, TargetStates
from lpsearch.recovery.projections import (
    PROJECTION_NAMES,
    STAGES,
    Stage,
    find_input_projections,
    find_output_projection,
    get_branch,
)
from lpsearch.recovery.ridge import Gram, fit_ridge
from lpsearch.recovery.walk import Entry, enter_decoder
from lpsearch.transform import check_plan_model
from lpsearch.transform.apply import check_unplanned

__all__ = ["FittedProduct", "Refit", "Refitter", "swapped_weights"]

Extent = Literal["grouped", "after"]

RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Ridges to choose from, as shares of the mean square of an input."""

VALIDATION_EVERY = 5
"""One window in so many of each kind of text is for choosing the ridge."""

_SUMS_HELD = 5
"""Matrices of inputs by inputs that are held at once: sums to fit and to validate, a copy, its factor, and the work."""

_BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
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
class Refit:
    """What a refit found.

    Attributes:
        weights: the new parameters by their names in the model, in its dtype and on its device.
        products: the regressions, in order.
        not_fitted: what could not be fitted, by layer and module, e.g. ``layers.3.mlp``.
    """

    weights: Mapping[str, Tensor]
    products: tuple[FittedProduct, ...]
    not_fitted: tuple[str, ...]


@dataclass(frozen=True)
class _Batch:
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


class Refitter:
    """Fits plans of one model on one set of windows; the model is as it was after each.

    Args:
        model: the unmodified model, in eval mode.
        windows: to calibrate on.
        window_weights: what each window counts; None for the weight of its kind of text.
        extent: ``grouped`` fits the groups that the plan changes; ``after`` also each single layer behind the first of
            them, which takes up what is left of the error.
        fits_inputs: whether what the branches of changed groups read is fitted too.
        num_passes: walks through the model; each later one begins from the weights that the former found.
        ridges: to choose from.
        batch_size: windows that run together; None for what suits the device.
        cache_bytes: most bytes to keep between fits, half for hidden states of the unmodified model and half for what
            plans that begin alike share; 0 walks from the first layer each time, to the same bits.

    Raises:
        FamilyError: if the family is not understood.
        ModelError: if a plan is applied to the model, or its output projections are quantised.
        DataError: if there are too few windows to choose the ridge by.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Windows,
        *,
        window_weights: Sequence[float] | None = None,
        extent: Extent = "after",
        fits_inputs: bool = True,
        num_passes: int = 1,
        ridges: Sequence[float] = RIDGES,
        batch_size: int | None = None,
        cache_bytes: int = 0,
    ) -> None:
        check_unplanned(model)
        self._model = model
        self._blocks = build_blocks(model)
        self._refuse_quantised()
        check_family(model)
        self._traits = read_traits(model.config)
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._extent, self._fits_inputs = extent, fits_inputs
        self._num_passes = num_passes
        self._ridges = tuple(ridges)
        batch_tokens = _BATCH_TOKENS.get(model.device.type, _BATCH_TOKENS["cpu"])
        self._batches = self._enter(windows, window_weights, batch_size or max(1, batch_tokens // windows.seq_len))
        entered = [batch.entry.hidden_states for batch in self._batches]
        self._state_bytes = sum(state.nbytes for state in entered)
        self._targets = TargetStates(
            entered,
            num_layers=len(self._blocks),
            run_layer=lambda layer, batch, state: self._run_layer(layer, self._batches[batch], state),
            budget_bytes=cache_bytes // 2,
        )
        self._cache: BeginningCache[FittedProduct] = BeginningCache(cache_bytes // 2)

    def clear_cache(self) -> bool:
        """Give up what is kept between fits, and keep nothing from now on; false if there was nothing."""
        num_held = self._cache.num_held
        self._cache.clear()
        self._targets.clear()
        return num_held > 0

    def fit(self, plan: Plan, *, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Refit:
        """Fit the projections of a plan.

        Args:
            plan: for the model.
            on_progress: called with groups done and groups in all.

        Raises:
            PlanError: if the plan is for another model, changes nothing, or leaves nothing to fit.
            DataError: if there are fewer tokens than inputs of a group's projections.
            LpsearchError: if the device has too little memory for the sums.
        """
        check_plan_model(plan, self._model)
        self._check_amount(plan)
        weights: dict[str, Tensor] = {}
        products: list[FittedProduct] = []
        num_groups = len(plan.running_groups)
        with torch.no_grad():  # in inference mode nobody could train what is returned
            for num_pass in range(self._num_passes):

                def report(done: int, num_before: int = num_pass * num_groups) -> None:
                    on_progress(num_before + done, num_groups * self._num_passes)

                # A later pass begins from the weights of the whole plan.
                cache = self._cache if num_pass == 0 else BeginningCache[FittedProduct](0)
                products += self._walk(plan, weights, cache, report)
        return Refit(weights, tuple(products), self._list_unfitted(plan))

    def _walk(
        self,
        plan: Plan,
        weights: dict[str, Tensor],
        cache: BeginningCache[FittedProduct],
        on_group: Callable[[int], None],
    ) -> tuple[FittedProduct, ...]:
        """Walk once through a plan, and put the new weights into ``weights``.

        Returns:
            The regressions.
        """
        groups = plan.running_groups
        changed = [position for position, group in enumerate(groups) if group.is_changed]
        num_groups = len(groups) if self._extent == "after" else changed[-1] + 1  # nothing is fitted behind them
        products: list[FittedProduct] = []
        with cache.visit(groups, state_bytes=self._state_bytes) as (begun, keep):
            if begun is None:
                begun = Beginning(groups[changed[0]][0], (), {}, ())
            states = begun.states or self._targets.get(begun.num_layers)
            weights.update(begun.weights)
            products += begun.products
            for position, group in enumerate(groups[:num_groups]):
                if group[0] < begun.num_layers:
                    continue
                if group.is_changed or self._extent == "after":
                    reads_other = group.is_changed and self._fits_inputs
                    entered = {layer: self._targets.get(layer) for layer in group} if reads_other else {}
                    targets = self._targets.get(group[-1] + 1)
                    for stage in STAGES:
                        if reads_other:
                            products += self._fit_inputs(stage, group, states, entered, weights)
                        product = self._fit_stage(stage, group, states, targets, weights)
                        products += [] if product is None else [product]
                with swapped_weights(self._model, weights):
                    states = tuple(
                        self._run_group(group, batch, state) for batch, state in zip(self._batches, states, strict=True)
                    )
                keep(Beginning(group[-1] + 1, states, dict(weights), tuple(products)))
                on_group(position + 1)
        on_group(len(groups))
        return tuple(products)

    def _enter(self, windows: Windows, window_weights: Sequence[float] | None, batch_size: int) -> list[_Batch]:
        weights = torch.tensor(windows.list_weights() if window_weights is None else window_weights)
        # Kinds of text are interleaved: where there are enough windows, each kind gives its share to both.
        indices = torch.arange(windows.num_windows)
        has_all = windows.num_windows >= VALIDATION_EVERY * len(windows.kinds)
        places = indices // len(windows.kinds) if has_all else indices
        is_validation = places % VALIDATION_EVERY == VALIDATION_EVERY - 1
        if not bool(is_validation.any()):
            raise DataError(
                f"{windows.num_windows} windows are too few for a refit, which chooses its ridge by one in "
                f"{VALIDATION_EVERY}; give at least {VALIDATION_EVERY} of each kind of text (--windows)"
            )
        batches = []
        for flag in (False, True):
            for chosen in torch.split((is_validation == flag).nonzero()[:, 0], batch_size):
                if len(chosen):
                    input_ids = torch.from_numpy(windows.input_ids[chosen.numpy()]).long().to(self._model.device)
                    entry = enter_decoder(self._model, input_ids)
                    batches.append(_Batch(entry, weights[chosen].to(self._model.device), flag))
        return batches

    def _check_amount(self, plan: Plan) -> None:
        """Refuse a plan with nothing to fit, and text or memory that is too little for its widest product."""
        changed = [group for group in plan.running_groups if group.is_changed]
        if not changed:
            raise PlanError("the plan joins and drops nothing, so there is nothing to refit; give a plan with groups")
        if changed[0].num_stages == 0:  # only where it is the whole model
            raise PlanError("the plan drops every branch of the model, so there is nothing to refit; keep some of them")
        widths = []
        for group, stage in itertools.product(changed, STAGES):
            outputs = [self._find_output(self._blocks[layer], stage)[1] for layer in _list_running(group, stage)]
            widths.append(sum(output.linear.in_features for output in outputs if output is not None))
        widest = max(widths)
        seq_len = self._batches[0].entry.hidden_states.shape[1]
        num_fitted = sum(len(batch.token_weights) * seq_len for batch in self._batches if not batch.is_validation)
        if num_fitted < widest:
            needed = -(-widest * VALIDATION_EVERY // ((VALIDATION_EVERY - 1) * seq_len))
            raise DataError(
                f"{num_fitted} tokens to fit are too few for the {widest} inputs of a group's projections; give at "
                f"least {needed} windows of {seq_len} tokens over all kinds of text (--windows is for each), better "
                "ten times as many"
            )
        needed_bytes = _SUMS_HELD * 8 * widest**2
        device = self._model.device
        free_bytes = find_free_bytes(device)
        if needed_bytes > free_bytes:
            raise LpsearchError(
                f"{device}: the fit needs {needed_bytes / 1e9:.1f} GB for sums over {widest} inputs, and "
                f"{free_bytes / 1e9:.1f} GB are free; use a larger device or --device cpu, or a plan of smaller groups"
            )

    def _run_layer(self, layer_idx: int, batch: _Batch, hidden_states: Tensor) -> Tensor:
        """Run a layer as the unmodified model does."""
        layer: Any = self._blocks[layer_idx].layer
        output: Tensor = layer(hidden_states, **batch.entry.layer_kwargs[layer_idx])
        return output

    def _run_group(self, group: Group, batch: _Batch, hidden_states: Tensor) -> Tensor:
        blocks = select_group(self._blocks, group)
        return run_group(blocks, hidden_states, [batch.entry.layer_kwargs[layer_idx] for layer_idx in group])

    def _fit_inputs(
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
            for layer in _list_running(group, stage)
            if (found := find_input_projections(self._blocks[layer], stage))
        }
        with_ones = {layer: all(p.bias is not None for p in found.values()) for layer, found in projections.items()}
        grams = {}
        for layer, found in projections.items():
            weight = next(iter(found.values())).weight
            num_inputs = weight.shape[1] + with_ones[layer]
            grams[layer] = {flag: Gram(num_inputs, weight.shape[1], device=weight.device) for flag in (False, True)}
        for number, (batch, state) in enumerate(zip(self._batches, states, strict=True)):
            with swapped_weights(self._model, weights):
                before = self._run_up_to(stage, select_group(self._blocks, group), group, batch, state)
            for layer in projections:
                block = self._blocks[layer]
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
            branch, hidden = get_branch(self._blocks[layer], stage)[0], fit.change.shape[1]
            name = f"{branch}.{next(iter(found))}"
            errors = (fit.error_before / hidden, fit.error_after / hidden)
            products.append(FittedProduct((layer,), name, fit.ridge, *errors))
        return products

    def _run_up_to(
        self, stage: Stage, blocks: Sequence[DecoderBlock], layers: Iterable[int], batch: _Batch, state: Tensor
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

    def _fit_stage(
        self,
        stage: Stage,
        group: Group,
        states: Sequence[Tensor],
        targets: Sequence[Tensor],
        weights: dict[str, Tensor],
    ) -> FittedProduct | None:
        """Fit the attention's or the MLP's projections of a group, and put the new weights into ``weights``."""
        found = {layer: self._find_output(self._blocks[layer], stage) for layer in _list_running(group, stage)}
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
                reached = self._run_group(group, batch, state)
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
                    residual = (target.float() - self._run_group(group, batch, state).float()).flatten(0, 1)
                    total += float(residual.double().square().sum(-1) @ self._weigh(batch, target).double())
                    count += len(residual)
        return total / count

    @staticmethod
    def _weigh(batch: _Batch, target: Tensor) -> Tensor:
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

    def _find_output(self, block: DecoderBlock, stage: Stage) -> tuple[str, _Output | None]:
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

    def _refuse_quantised(self) -> None:
        """Refuse projections whose weights cannot take up a change."""
        paths = {id(module): path for path, module in self._model.named_modules()}
        for block, stage in itertools.product(self._blocks, STAGES):
            module: Any = get_branch(block, stage)[1]
            for name in (name for name in PROJECTION_NAMES[stage] if hasattr(module, name)):
                linear = getattr(module, name)
                for leaf, tensor in (*linear.named_parameters(), *linear.named_buffers()):
                    if not tensor.is_floating_point() or tensor.element_size() < 2:
                        raise ModelError(
                            f"{paths[id(linear)]}.{leaf} is quantised ({tensor.dtype}), and such weights cannot be "
                            "refitted; load the model without quantisation"
                        )

    def _list_unfitted(self, plan: Plan) -> tuple[str, ...]:
        """Name the branches of changed groups that have no projection to fit."""
        return tuple(
            f"layers.{layer}.{get_branch(self._blocks[layer], stage)[0]}"
            for group in plan.running_groups
            if group.is_changed
            for layer in group
            for stage in STAGES
            if layer in (running := _list_running(group, stage))
            and any(self._find_output(self._blocks[member], stage)[1] is None for member in running)
        )


def _list_running(group: Group, stage: Stage) -> tuple[int, ...]:
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
