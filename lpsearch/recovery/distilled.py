"""How to distil, and what distilling gave."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lpsearch.config import LEARNING_RATE
from lpsearch.errors import UsageError

__all__ = ["DistillSettings", "Distilled", "Evaluation", "OnProgress", "Stopped", "ValidationLoss", "compute_mean_kl"]

Stopped = Literal["end", "early", "nan"]
OnProgress = Callable[[int, int, float, float], None]
"""Called with the steps done, the steps in all, the training KL in nats per token, and the share recovered."""


@dataclass(frozen=True)
class DistillSettings:
    """How to train.

    Attributes:
        num_tokens: tokens to train on, seen once or several times.
        tokens_per_step: tokens of one update, over all processes; rounded to whole windows.
        micro_batch: windows that go through the model at once in a process; None to choose by the device's memory.
            Results depend on it through rounding only.
        learning_rate: its largest value, relative to the size of the weights
            (:mod:`~lpsearch.recovery.optimizer`); it rises linearly and then falls as a cosine to 0.
        warmup_share: share of the steps that it rises for.
        weight_decay: of AdamW, on matrices.
        train: ``all`` layers, or the ``grouped`` ones, which the plan changes.
        lora_rank: train adapters of this rank, which need PEFT; None to train the layers' own weights.
        checkpointing: recompute layers in the backward pass, for less memory.
        compile: run the layers compiled, which takes a minute before the first step and is faster then; None on a GPU
            where there are at least 4 million tokens to train on. Results depend on it through rounding only.
        seed: of the order of the text, and of adapters.
        evaluate_every: steps between two evaluations on the validation windows; None for 20 in all.
        patience: evaluations without a better one after which to stop; None never stops early.
        keep_every: evaluations between two checkpoints.
    """

    num_tokens: int
    tokens_per_step: int = 32768
    micro_batch: int | None = None
    learning_rate: float = LEARNING_RATE
    warmup_share: float = 0.05
    weight_decay: float = 0.0
    train: Literal["all", "grouped"] = "all"
    lora_rank: int | None = None
    checkpointing: bool = False
    compile: bool | None = None
    seed: int = 0
    evaluate_every: int | None = None
    patience: int | None = 5
    keep_every: int = 1

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UsageError: for one that is out of its range.
        """
        for name in (
            "num_tokens",
            "tokens_per_step",
            "micro_batch",
            "lora_rank",
            "evaluate_every",
            "patience",
            "keep_every",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; expected at least 1")
        if not (
            0 < self.learning_rate < math.inf and 0 <= self.warmup_share <= 1 and 0 <= self.weight_decay < math.inf
        ):
            raise UsageError(
                f"learning_rate is {self.learning_rate}, warmup_share {self.warmup_share} and weight_decay "
                f"{self.weight_decay}; expected a positive number, one in [0, 1] and one of at least 0"
            )
        if self.train not in ("all", "grouped"):
            raise UsageError(f"train is {self.train!r}; expected all or grouped")


@dataclass(frozen=True)
class ValidationLoss:
    """Loss on one kind of text.

    Attributes:
        kl: KL(base || plan), nats per token.
        nll: under the plan, nats per token.
    """

    kl: float
    nll: float


@dataclass(frozen=True)
class Evaluation:
    """A look at the validation windows.

    Attributes:
        step: updates done.
        tokens: tokens trained on.
        training_kl: mean KL since the last look at the training loss, nats per token; None before the first step.
        validation: by kind of text.
    """

    step: int
    tokens: int
    training_kl: float | None
    validation: Mapping[str, ValidationLoss]

    @property
    def mean_kl(self) -> float:
        """Mean KL of the kinds, by which the best step is chosen."""
        return compute_mean_kl(self.validation)


@dataclass(frozen=True)
class Distilled:
    """What distilling gave.

    Attributes:
        weights: the best weights by their names in the model, those alone that differ from its own, in its dtype and on
            the CPU; empty in processes other than the main one.
        history: the evaluations, the first before any step.
        untouched: losses of the plan with the model's own weights, by kind of text.
        steps: updates done.
        tokens: tokens trained on, over all processes.
        seconds: that training and evaluating took.
        best_step: after how many steps the weights are from; 0 where training did not help.
        stopped: at the ``end``, ``early`` since nothing got better, or at a loss that is not finite (``nan``).
        num_trained: values that were trained.
    """

    weights: Mapping[str, Tensor]
    history: tuple[Evaluation, ...]
    untouched: Mapping[str, ValidationLoss]
    steps: int
    tokens: int
    seconds: float
    best_step: int
    stopped: Stopped
    num_trained: int

    @property
    def recovered(self) -> float:
        """Share of the untouched plan's validation KL that is gone."""
        best = next(evaluation for evaluation in self.history if evaluation.step == self.best_step)
        return 1 - best.mean_kl / compute_mean_kl(self.untouched)


def compute_mean_kl(losses: Mapping[str, ValidationLoss]) -> float:
    """Return the mean of the kinds' KL, nats per token."""
    return sum(loss.kl for loss in losses.values()) / len(losses)
