"""Distil the unmodified model into itself under a plan.

The layers are trained until their logits under the plan are the unmodified model's again: the loss is KL(base || plan)
over the whole vocabulary, the mean over positions (knowledge distillation, Hinton et al., arXiv 1503.02531; of a model
with less depth, Muralidharan et al., arXiv 2407.14679). Text sampled from the unmodified model serves as well as any
other (Agarwal et al., arXiv 2306.13649 argue for sampled text), so nothing need be downloaded; train on several kinds,
since one kind repairs that kind alone.

Embeddings, final norm and output head stay as they are. On a GPU products are in bfloat16 with float32 masters, on a
CPU all is in float32. Accelerate carries the loop to as many processes as it was launched with.

Example::

    from lpsearch.recovery.distill import DistillSettings, distill
    from lpsearch.recovery.mixture import Mixture
    from lpsearch.recovery.refit import swapped_weights

    training = Mixture({"wikitext2": wiki_windows, "code": code_windows, "self": sampled_windows})
    validation = {"wikitext2": other_wiki_windows, "code": other_code_windows}
    settings = DistillSettings(num_tokens=20_000_000, learning_rate=1e-4)
    distilled = distill(model, plan, training=training, validation=validation, settings=settings, weights=refit.weights)
    with swapped_weights(model, {name: weight.to(model.device) for name, weight in distilled.weights.items()}):
        ...  # evaluate the model under the plan, or save it
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from transformers import PreTrainedModel

from lpsearch.data import Windows
from lpsearch.errors import LpsearchError, ModelError, UsageError
from lpsearch.evaluation.head import OutputHead, run_decoder
from lpsearch.models.fingerprint import fingerprint_model
from lpsearch.plan import Plan
from lpsearch.recovery.checkpoint import find_checkpoint, restore_optimizer, save_checkpoint
from lpsearch.recovery.divergence import compute_divergence, sum_losses
from lpsearch.recovery.memory import check_memory, choose_micro_batch, describe_exhaustion
from lpsearch.recovery.mixture import Mixture
from lpsearch.recovery.student import Student, build_student, name_trained

__all__ = ["DistillSettings", "Distilled", "Evaluation", "ValidationLoss", "distill"]

logger = logging.getLogger(__name__)

Stopped = Literal["end", "early", "nan"]
OnProgress = Callable[[int, int, float, float], None]
"""Called with the steps done, the steps in all, the training KL in nats per token, and the share recovered."""

LOG_EVERY = 10
"""Steps between two looks at the training loss; each waits for the device."""

_CLIPPED_NORM = 1.0
_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class DistillSettings:
    """How to train.

    Attributes:
        num_tokens: tokens to train on, seen once or several times.
        tokens_per_step: tokens of one update, over all processes; rounded to whole windows.
        micro_batch: windows that go through the model at once in a process; None to choose by the device's memory.
            Results depend on it through rounding only.
        learning_rate: its largest value; it rises linearly and then falls as a cosine to 0.
        warmup_share: share of the steps that it rises for.
        weight_decay: of AdamW, on matrices.
        train: ``all`` layers, or the ``grouped`` ones, which the plan changes.
        lora_rank: train adapters of this rank, which need PEFT; None to train the layers' own weights.
        checkpointing: recompute layers in the backward pass, for less memory.
        seed: of the order of the text, and of adapters.
        evaluate_every: steps between two evaluations on the validation windows; None for 20 in all.
        patience: evaluations without a better one after which to stop; None never stops early.
        keep_every: evaluations between two checkpoints.
    """

    num_tokens: int
    tokens_per_step: int = 32768
    micro_batch: int | None = None
    learning_rate: float = 1e-4
    warmup_share: float = 0.05
    weight_decay: float = 0.0
    train: Literal["all", "grouped"] = "all"
    lora_rank: int | None = None
    checkpointing: bool = False
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
        return _mean_kl(self.validation)


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
        return 1 - best.mean_kl / _mean_kl(self.untouched)


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
    loop = _Loop(
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


class _Objective(nn.Module):
    """The loss of a batch as a module, which data-parallel training wraps."""

    def __init__(self, model: PreTrainedModel, head: OutputHead, base_head: OutputHead) -> None:
        super().__init__()
        self.model = model
        self._head, self._base_head = head, base_head

    def forward(self, input_ids: Tensor, base_hidden_states: Tensor) -> Tensor:
        """Return the mean divergence of (batch, seq) tokens."""
        return compute_divergence(
            run_decoder(self.model, input_ids),
            base_hidden_states,
            head=self._head,
            base_head=self._base_head,
            vocab_size=self._head.vocab_size,
        )


@dataclass
class _State:
    """Where the loop is; what a checkpoint keeps beside tensors."""

    step: int = 0
    micro_batch: int = 1
    history: list[Evaluation] = dataclasses.field(default_factory=list)
    untouched: Mapping[str, ValidationLoss] = dataclasses.field(default_factory=dict)
    best_step: int = 0
    since_best: int = 0
    seconds: float = 0.0
    stopped: Stopped | None = None


class _Loop:
    """One training; the arguments are those of :func:`distill`."""

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        *,
        training: Mixture,
        validation: Mapping[str, Windows],
        settings: DistillSettings,
        weights: Mapping[str, Tensor],
        checkpoint_dir: Path | None,
        on_progress: OnProgress,
    ) -> None:
        self._base, self._plan, self._settings = model, plan, settings
        self._training, self._validation = training, validation
        self._weights, self._checkpoint_dir, self._on_progress = weights, checkpoint_dir, on_progress
        self._device = model.device
        handler = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
        self._accelerator = Accelerator(
            cpu=self._device.type == "cpu", mixed_precision="no", device_placement=False, kwargs_handlers=[handler]
        )
        self._check_device()
        processes = self._accelerator.num_processes
        windows = max(1, round(settings.tokens_per_step / training.seq_len))
        self._windows_per_step = -(-windows // processes) * processes
        self._tokens_per_step = self._windows_per_step * training.seq_len
        self._num_steps = max(1, -(-settings.num_tokens // self._tokens_per_step))
        self._evaluate_every = settings.evaluate_every or max(1, self._num_steps // 20)
        self._schedule = training.schedule(self._num_steps, self._windows_per_step, seed=settings.seed)
        self._state = _State()
        self._best: Mapping[str, Tensor] = {}
        self._loss_sum = torch.zeros((), device=self._device)
        self._loss_count = 0

    def describe_exhaustion(self, message: str) -> str:
        """Say what to do about a lack of memory."""
        settings = self._settings
        options = {"checkpointing"} if settings.checkpointing else set[str]()
        options |= {"grouped"} if settings.train == "grouped" else set()
        options |= {"lora"} if settings.lora_rank is not None else set()
        return describe_exhaustion(
            self._device,
            message,
            micro_batch=self._state.micro_batch,
            seq_len=self._training.seq_len,
            options=options,
        )

    def run(self) -> Distilled:
        """Train to the end."""
        began = time.monotonic()
        self._student = self._build_student()
        with self._autocast():
            tokens = self._to_device(self._training.gather(self._schedule[0, :1]))
            self._base_head = OutputHead(self._base, tokens)
            self._head = OutputHead(self._student.model, tokens)
        self._objective: Any = _Objective(self._student.model, self._head, self._base_head)
        self._optimizer = self._build_optimizer()
        identity = self._identify() if self._checkpoint_dir is not None else {}
        is_resumed = self._checkpoint_dir is not None and self._resume(self._checkpoint_dir, identity)
        if not is_resumed:
            self._begin()
        self._objective = self._accelerator.prepare_model(self._objective)
        seconds_before = self._state.seconds
        while self._state.stopped is None:
            self._step()
            is_due = self._state.step % self._evaluate_every == 0 or self._state.step == self._num_steps
            if not is_due and self._state.step % LOG_EVERY:
                continue
            training_kl = self._read_loss()
            if not math.isfinite(training_kl):
                self._state.stopped = "nan"
            elif is_due:
                self._evaluate(training_kl)
            self._state.seconds = seconds_before + time.monotonic() - began
            if is_due and self._state.stopped != "nan" and self._checkpoint_dir is not None:
                self._keep(self._checkpoint_dir, identity)
            self._report(training_kl)
        return self._finish()

    # ---- Setting up --------------------------------------------------------------------------------------------------

    def _check_device(self) -> None:
        expected = self._accelerator.device
        if self._accelerator.num_processes > 1 and self._device != expected:
            raise ModelError(
                f"process {self._accelerator.process_index} has the model on {self._device}, expected {expected}; load "
                "it on the process's own device"
            )

    def _build_student(self) -> Student:
        settings = self._settings
        if settings.lora_rank is None:
            parameters = dict(self._base.named_parameters())
            all_values, grouped = (
                sum(parameters[name].numel() for name in name_trained(self._base, self._plan, train))
                for train in (settings.train, "grouped")
            )
            check_memory(self._device, num_trained=all_values, num_grouped=grouped, uses_lora=False)
        student = build_student(
            self._base,
            self._plan,
            train=settings.train,
            lora_rank=settings.lora_rank,
            checkpointing=settings.checkpointing,
            frozen_dtype=torch.float32 if self._device.type == "cpu" else None,
            seed=settings.seed,
        )
        if settings.lora_rank is not None:
            check_memory(self._device, num_trained=student.num_trained, num_grouped=0, uses_lora=True)
        return student

    def _build_optimizer(self) -> torch.optim.AdamW:
        """Build AdamW (Loshchilov and Hutter, arXiv 1711.05101), which decays matrices alone."""
        parameters = list(self._student.trained.values())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self._settings.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self._settings.learning_rate,
            betas=_BETAS,
            fused=self._device.type == "cuda",
        )

    def _begin(self) -> None:
        """Evaluate the plan with the model's weights and with those to begin with."""
        state = self._state
        state.micro_batch = self._choose_micro_batch()
        state.untouched = self._validate()
        self._student.set_weights(self._weights)
        first = self._validate() if self._weights else state.untouched
        state.history.append(Evaluation(0, 0, None, first))
        if not math.isfinite(state.history[0].mean_kl):
            state.stopped = "nan"

    def _choose_micro_batch(self) -> int:
        if self._settings.micro_batch is not None:
            return self._settings.micro_batch
        chosen = choose_micro_batch(
            self._device,
            seq_len=self._training.seq_len,
            num_windows=self._windows_per_step // self._accelerator.num_processes,
            num_trained=self._student.num_trained,
            run=self._try_batch,
        )
        everywhere = self._accelerator.gather(torch.tensor([chosen], device=self._device))
        return int(everywhere.min())

    def _try_batch(self, num_windows: int) -> None:
        tokens = self._to_device(self._training.gather(self._schedule[0, :1]).repeat(num_windows, axis=0))
        self._run_batch(tokens).backward()
        for parameter in self._student.trained.values():
            parameter.grad = None

    # ---- Steps -------------------------------------------------------------------------------------------------------

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cuda", torch.bfloat16) if self._device.type == "cuda" else nullcontext()

    def _to_device(self, tokens: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
        on_host = torch.from_numpy(tokens)
        return (on_host.pin_memory() if self._device.type == "cuda" else on_host).to(self._device, non_blocking=True)

    def _run_batch(self, input_ids: Tensor) -> Tensor:
        """Return the loss of (batch, seq) tokens."""
        with self._autocast():
            with torch.no_grad():
                base_hidden_states = run_decoder(self._base, input_ids)
            loss: Tensor = self._objective(input_ids, base_hidden_states)
            return loss

    def _step(self) -> None:
        """Make one update; the batch is a function of the seed and the step."""
        rows = self._schedule[self._state.step]
        rows = rows[self._accelerator.process_index :: self._accelerator.num_processes]
        tokens = self._to_device(self._training.gather(rows))
        batches = tokens.split(self._state.micro_batch)
        for number, batch in enumerate(batches):
            is_last = number == len(batches) - 1
            with nullcontext() if is_last else self._accelerator.no_sync(self._objective):
                loss = self._run_batch(batch) * (len(batch) / len(tokens))
                self._accelerator.backward(loss)
            self._loss_sum += loss.detach()
        self._loss_count += 1
        self._accelerator.clip_grad_norm_(self._student.trained.values(), _CLIPPED_NORM)
        for group in self._optimizer.param_groups:
            group["lr"] = self._find_learning_rate(self._state.step)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._state.step += 1

    def _find_learning_rate(self, step: int) -> float:
        warmup = max(1, round(self._settings.warmup_share * self._num_steps))
        if step < warmup:
            return self._settings.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self._num_steps - warmup)
        return self._settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def _read_loss(self) -> float:
        """Return the mean training loss since the last call, over all processes."""
        total: Any = self._accelerator.reduce(self._loss_sum.clone(), "mean")
        mean = float(total) / self._loss_count
        self._loss_sum.zero_()
        self._loss_count = 0
        return mean

    # ---- Evaluations -------------------------------------------------------------------------------------------------

    def _validate(self) -> dict[str, ValidationLoss]:
        """Evaluate every kind; each process takes its share of the windows."""
        return {kind: self._validate_kind(windows) for kind, windows in self._validation.items()}

    @torch.no_grad()
    def _validate_kind(self, windows: Windows) -> ValidationLoss:
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        mine = windows.input_ids[self._accelerator.process_index :: self._accelerator.num_processes]
        for start in range(0, len(mine), self._state.micro_batch):
            tokens = self._to_device(mine[start : start + self._state.micro_batch].astype(np.int64))
            with self._autocast():
                losses = sum_losses(
                    run_decoder(self._student.model, tokens)[:, :-1],
                    run_decoder(self._base, tokens)[:, :-1],
                    tokens[:, 1:],
                    head=self._head,
                    base_head=self._base_head,
                    vocab_size=self._head.vocab_size,
                )
            sums += torch.stack([losses.kl, losses.nll, losses.kl.new_tensor(losses.num_tokens)])
        total: Any = self._accelerator.reduce(sums, "sum")
        kl, nll, num_tokens = total.tolist()
        return ValidationLoss(kl / num_tokens, nll / num_tokens)

    def _evaluate(self, training_kl: float) -> None:
        """Evaluate, keep the weights if they are the best so far, and decide whether to stop."""
        state = self._state
        best = min(evaluation.mean_kl for evaluation in state.history)
        found = Evaluation(state.step, state.step * self._tokens_per_step, training_kl, self._validate())
        if not math.isfinite(found.mean_kl):
            state.stopped = "nan"
            return
        state.history.append(found)
        if found.mean_kl < best:
            state.best_step, state.since_best = state.step, 0
            if self._accelerator.is_main_process:
                self._best = self._student.collect_weights()
        else:
            state.since_best += 1
        if state.step == self._num_steps:
            state.stopped = "end"
        elif self._settings.patience is not None and state.since_best >= self._settings.patience:
            state.stopped = "early"

    def _report(self, training_kl: float) -> None:
        if self._accelerator.is_main_process:
            recovered = 1 - self._state.history[-1].mean_kl / _mean_kl(self._state.untouched)
            self._on_progress(self._state.step, self._num_steps, training_kl, recovered)

    def _finish(self) -> Distilled:
        state = self._state
        assert state.stopped is not None
        if state.stopped == "nan":
            logger.warning(
                "the loss was no longer finite at step %d; the weights are those of step %d, the best before it: lower "
                "the learning rate",
                state.step,
                state.best_step,
            )
        self._accelerator.wait_for_everyone()
        originals = dict(self._base.named_parameters())
        candidates = {**self._weights, **self._best} if self._accelerator.is_main_process else {}
        weights = {name: weight.to("cpu", originals[name].dtype) for name, weight in candidates.items()}
        return Distilled(
            weights={n: weight for n, weight in weights.items() if not torch.equal(weight, originals[n].cpu())},
            history=tuple(state.history),
            untouched=state.untouched,
            steps=state.step,
            tokens=state.step * self._tokens_per_step,
            seconds=state.seconds,
            best_step=state.best_step,
            stopped=state.stopped,
            num_trained=self._student.num_trained,
        )

    # ---- Checkpoints -------------------------------------------------------------------------------------------------

    def _identify(self) -> dict[str, Any]:
        """Describe what is trained, in JSON's types."""
        begun = hashlib.sha256()
        for name, weight in sorted(self._weights.items()):
            begun.update(f"{name}:{weight.dtype}:".encode())
            begun.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return {
            **{f"settings.{name}": value for name, value in dataclasses.asdict(self._settings).items()},
            "plan": self._plan.key,
            "model": fingerprint_model(self._base),
            "training": self._training.sha256,
            "validation": {kind: windows.sha256 for kind, windows in self._validation.items()},
            "weights": begun.hexdigest(),
            "windows_per_step": self._windows_per_step,
        }

    def _keep(self, directory: Path, identity: Mapping[str, Any]) -> None:
        """Write a checkpoint where one is due."""
        state = self._state
        number = -(-state.step // self._evaluate_every)
        if state.stopped is None and number % self._settings.keep_every:
            return
        if self._accelerator.is_main_process:
            save_checkpoint(
                directory,
                state.step,
                identity=identity,
                state=dataclasses.asdict(state),
                trained=self._student.trained,
                optimizer=self._optimizer,
                best=self._best,
            )
        self._accelerator.wait_for_everyone()

    def _resume(self, directory: Path, identity: Mapping[str, Any]) -> bool:
        """Go on from a checkpoint; False without one."""
        checkpoint = find_checkpoint(directory, identity)
        if checkpoint is None:
            return False
        known = dict(checkpoint.state)
        known["history"] = [
            Evaluation(**{**entry, "validation": _read_losses(entry["validation"])}) for entry in known["history"]
        ]
        known["untouched"] = _read_losses(known["untouched"])
        self._state = _State(**known)
        self._student.set_weights({n: w for n, w in self._weights.items() if n not in self._student.trained})
        restore_optimizer(checkpoint, self._student.trained, self._optimizer)
        self._best = checkpoint.best if self._accelerator.is_main_process else {}
        return True


def _read_losses(content: Mapping[str, Mapping[str, float]]) -> dict[str, ValidationLoss]:
    return {kind: ValidationLoss(**losses) for kind, losses in content.items()}


def _mean_kl(losses: Mapping[str, ValidationLoss]) -> float:
    return sum(loss.kl for loss in losses.values()) / len(losses)
