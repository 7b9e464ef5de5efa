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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lpsearch.data import Windows
from lpsearch.errors import DataError, LpsearchError, ModelError, PlanError
from lpsearch.models.families import build_blocks, check_family
from lpsearch.models.memory import find_free_bytes
from lpsearch.plan import Plan
from lpsearch.recovery.beginnings import Beginning, BeginningCache, TargetStates
from lpsearch.recovery.group_fits import Batch, FittedProduct, GroupFitter, list_running, swapped_weights
from lpsearch.recovery.projections import PROJECTION_NAMES, STAGES, get_branch
from lpsearch.recovery.walk import enter_decoder
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
        self._extent, self._fits_inputs = extent, fits_inputs
        self._num_passes = num_passes
        batch_tokens = _BATCH_TOKENS.get(model.device.type, _BATCH_TOKENS["cpu"])
        self._batches = self._enter(windows, window_weights, batch_size or max(1, batch_tokens // windows.seq_len))
        self._fitter = GroupFitter(model, self._batches, ridges)
        entered = [batch.entry.hidden_states for batch in self._batches]
        self._state_bytes = sum(state.nbytes for state in entered)
        self._targets = TargetStates(
            entered,
            num_layers=len(self._blocks),
            run_layer=lambda layer, batch, state: self._fitter.run_layer(layer, self._batches[batch], state),
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
                            products += self._fitter.fit_inputs(stage, group, states, entered, weights)
                        product = self._fitter.fit_outputs(stage, group, states, targets, weights)
                        products += [] if product is None else [product]
                with swapped_weights(self._model, weights):
                    states = tuple(
                        self._fitter.run_group(group, batch, state)
                        for batch, state in zip(self._batches, states, strict=True)
                    )
                keep(Beginning(group[-1] + 1, states, dict(weights), tuple(products)))
                on_group(position + 1)
        on_group(len(groups))
        return tuple(products)

    def _enter(self, windows: Windows, window_weights: Sequence[float] | None, batch_size: int) -> list[Batch]:
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
                    batches.append(Batch(entry, weights[chosen].to(self._model.device), flag))
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
            outputs = [self._fitter.find_output(self._blocks[layer], stage)[1] for layer in list_running(group, stage)]
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
            if layer in (running := list_running(group, stage))
            and any(self._fitter.find_output(self._blocks[member], stage)[1] is None for member in running)
        )
