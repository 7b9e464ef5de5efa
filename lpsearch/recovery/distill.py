"""Distil the unmodified model into itself under a plan.

The layers are trained until their logits under the plan are the unmodified model's again: the loss is KL(base || plan)
over the whole vocabulary, the mean over positions (knowledge distillation, Hinton et al., arXiv 1503.02531; of a model
with less depth, Muralidharan et al., arXiv 2407.14679). Text sampled from the unmodified model will do (on sampled
text: Agarwal et al., arXiv 2306.13649), so nothing need be downloaded; train on several kinds, since weights are only
held to what they are shown.

Embeddings, final norm and output head stay as they are. On a GPU products are in bfloat16 with float32 masters, on a
CPU all is in float32. Accelerate carries the loop to as many processes as it was launched with.

Example::

    from lpsearch.recovery.distill import DistillSettings, distill
    from lpsearch.recovery.mixture import Mixture
    from lpsearch.recovery.refit import swapped_weights

    training = Mixture({"wikitext2": wiki_windows, "code": code_windows, "self": sampled_windows})
    validation = {"wikitext2": other_wiki_windows, "code": other_code_windows}
    settings = DistillSettings(num_tokens=20_000_000)
    distilled = distill(model, plan, training=training, validation=validation, settings=settings, weights=refit.weights)
    with swapped_weights(model, {name: weight.to(model.device) for name, weight in distilled.weights.items()}):
        ...  # evaluate the model under the plan, or save it
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lpsearch.data import Windows
from lpsearch.errors import LpsearchError, ModelError, UsageError
from lpsearch.plan import Plan
from lpsearch.recovery.distill_loop import DistillLoop
from lpsearch.recovery.distilled import Distilled, DistillSettings, Evaluation, OnProgress, ValidationLoss
from lpsearch.recovery.mixture import Mixture
from lpsearch.recovery.student import name_trained

__all__ = ["DistillSettings", "Distilled", "Evaluation", "OnProgress", "ValidationLoss", "distill"]


def distill(
    model: PreTrainedModel,
    plan: Plan,
    *,
    training: Mixture,
    validation: Mapping[str, Windows],
    settings: DistillSettings,
    weights: Mapping[str, Tensor] | None = None,
    checkpoint_dir: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Distilled:
    """Train a model's layers under a plan towards the model itself.

    The model is not changed, and serves as what is trained towards. With the same arguments and a directory of
    checkpoints, training goes on where it was killed, on a CPU with the same bits. Under several processes
    (``accelerate launch``) every one calls this with its own copy of the model on its own device.

    Args:
        model: the unmodified model, on the device to train on.
        plan: for the model.
        training: text to train on.
        validation: other text by kind, to choose the best step and to stop early.
        settings: how to train.
        weights: what to begin with, by names in the model, e.g. a refit's; None for the model's own.
        checkpoint_dir: where to write checkpoints, at evaluations; None to write none.
        on_progress: called in the main process.

    Raises:
        PlanError: for a plan of another model, or one that changes nothing.
        ModelError: for a model that is quantised, has a plan applied or is on the wrong device.
        UsageError: for impossible settings, and where an extra is missing.
        ResumeError: if the checkpoints are of another training.
        LpsearchError: if the device has too little memory, saying what would fit.
    """
    if not validation:
        raise UsageError("there is no validation text; give windows of at least one kind that training does not see")
    if weights and settings.lora_rank is None:
        unknown = sorted(set(weights) - set(name_trained(model, plan, "all")))
        if unknown:
            raise ModelError(f"a weight to begin with is {unknown[0]}, which is in no decoder layer that the plan runs")
    loop = DistillLoop(
        model,
        plan,
        training=training,
        validation=validation,
        settings=settings,
        weights=weights or {},
        checkpoint_dir=checkpoint_dir,
        on_progress=on_progress or (lambda step, steps, loss, recovered: None),
    )
    try:
        return loop.run()
    except torch.OutOfMemoryError as error:
        message = str(error).splitlines()[0]
    # Outside the handler, whose traceback holds on to the tensors of the failed pass.
    raise LpsearchError(loop.describe_exhaustion(message))
