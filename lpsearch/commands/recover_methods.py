"""The two methods of ``lpsearch recover``: a refit in closed form, and distilling after it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpsearch.commands.steps import show_steps
from lpsearch.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from lpsearch.data import Windows
    from lpsearch.models import LoadedModel

__all__ = ["Repair", "distill_plan", "refit_plan"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repair:
    """What a method found.

    Attributes:
        weights: by name in the model.
        num_tokens: tokens that it saw, each as often as it saw it.
        steps: steps of training; None for a refit.
        settings: what decided the result.
    """

    weights: Mapping[str, Tensor]
    num_tokens: int
    steps: int | None
    settings: Mapping[str, str | int | float | bool | None]


def refit_plan(loaded: LoadedModel, plan: Plan, windows: Windows, *, passes: int) -> Repair:
    """Fit the projections on the windows, the last of which choose the ridge; each fit walks ``passes`` times."""
    from lpsearch.recovery.by_loss import refit_by_loss, split_validation

    fitted, validation = split_validation(windows)
    with show_steps("refitting") as on_step:
        refit = refit_by_loss(loaded.model, plan, fitted, validation, num_passes=passes, on_progress=on_step)
    for name in refit.not_fitted:
        logger.warning("%s has no output projection that could be fitted; it stays as it is", name)
    logger.info("refitted %d of %d products", sum(p.ridge is not None for p in refit.products), len(refit.products))
    num_tokens = fitted.num_windows * fitted.seq_len * passes
    return Repair(refit.weights, num_tokens, None, {"passes": passes})


def distill_plan(
    loaded: LoadedModel,
    plan: Plan,
    windows: Windows,
    refit: Repair,
    *,
    settings: Mapping[str, Any],
    checkpoints: Path,
) -> Repair:
    """Train towards the unmodified model, from a refit on.

    Args:
        loaded: the unmodified model.
        plan: for it.
        windows: of each kind, the last ones tell when training has helped most.
        refit: what to begin with.
        settings: by the names of :class:`~lpsearch.recovery.distill.DistillSettings`.
        checkpoints: directory where training keeps what it needs to go on.
    """
    from lpsearch.recovery.by_loss import split_validation
    from lpsearch.recovery.distill import DistillSettings, distill
    from lpsearch.recovery.mixture import Mixture

    training, validation = ({part.spec: part for part in side.split_kinds()} for side in split_validation(windows))
    mixture = Mixture(training, {kind.spec: kind.weight for kind in windows.kinds})
    reported = 0.0

    def report(step: int, steps: int, training_kl: float, recovered: float) -> None:
        nonlocal reported
        on_step(step, steps)
        if recovered != reported:
            reported = recovered
            message = "step %d of %d: KL %.4f nats per token on training text, %.1f %% won back on validation windows"
            logger.info(message, step, steps, training_kl, 100 * recovered)

    with show_steps("distilling") as on_step:
        distilled = distill(
            loaded.model,
            plan,
            training=mixture,
            validation=validation,
            settings=DistillSettings(**settings),
            weights=refit.weights,
            checkpoint_dir=checkpoints,
            on_progress=report,
        )
    logger.info(
        "distilled %d steps (%s); the best is step %d: KL on validation windows is down by %.1f %%",
        distilled.steps,
        distilled.stopped,
        distilled.best_step,
        100 * distilled.recovered,
    )
    weights = {name: weight.to(loaded.model.device) for name, weight in distilled.weights.items()}
    recorded = {name: value for name, value in settings.items() if value is not None}
    return Repair(weights, refit.num_tokens + distilled.tokens, distilled.steps, {**refit.settings, **recorded})
