"""The loop that distils: batches, updates, evaluations and checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor
from transformers import PreTrainedModel

from lpsearch.data import Windows
from lpsearch.errors import ModelError
from lpsearch.models.fingerprint import fingerprint_model
from lpsearch.plan import Plan
from lpsearch.recovery.checkpoint import find_checkpoint, restore_optimizer, save_checkpoint
from lpsearch.recovery.comparison import Comparison
from lpsearch.recovery.compiling import compiled_layers
from lpsearch.recovery.distilled import (
    Distilled,
    DistillSettings,
    Evaluation,
    OnProgress,
    Stopped,
    ValidationLoss,
    compute_mean_kl,
)
from lpsearch.recovery.memory import check_memory, choose_micro_batch, describe_exhaustion
from lpsearch.recovery.mixture import Mixture
from lpsearch.recovery.optimizer import build_optimizer, set_learning_rate
from lpsearch.recovery.student import Student, build_student, name_trained

__all__ = ["DistillLoop"]

logger = logging.getLogger(__name__)

LOG_EVERY = 10
"""Steps between two looks at the training loss; each waits for the device."""

_MIN_COMPILED_TOKENS = 4_000_000
"""Training on fewer tokens ends before compiling has paid for itself."""

_CLIPPED_NORM = 1.0


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


class DistillLoop:
    """One training; the arguments are those of :func:`~lpsearch.recovery.distill.distill`."""

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
        # One process needs no backend, and Accelerate takes back no device that it chose before in the process.
        needs_gloo = self._device.type == "cpu" and torch.distributed.is_torchelastic_launched()
        self._accelerator = Accelerator(
            cpu=needs_gloo, mixed_precision="no", device_placement=False, kwargs_handlers=[handler]
        )
        self._check_device()
        processes: int = self._accelerator.num_processes
        windows = max(1, round(settings.tokens_per_step / training.seq_len))
        self._windows_per_step = -(-windows // processes) * processes
        self._tokens_per_step = self._windows_per_step * training.seq_len
        self._num_steps = max(1, -(-settings.num_tokens // self._tokens_per_step))
        self._evaluate_every = settings.evaluate_every or max(1, self._num_steps // 20)
        is_long = self._num_steps * self._tokens_per_step >= _MIN_COMPILED_TOKENS
        is_worth_it = self._device.type == "cuda" and is_long
        self._is_compiled = is_worth_it if settings.compile is None else settings.compile
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
        self._comparison = Comparison(
            self._base,
            self._student.model,
            self._training.gather(self._schedule[0, :1]),
            is_compiled=self._is_compiled,
        )
        self._objective: Any = self._comparison.objective
        self._optimizer = build_optimizer(
            self._student.trained,
            weight_decay=self._settings.weight_decay,
            uses_adapters=self._settings.lora_rank is not None,
            fused=self._device.type == "cuda",
        )
        identity = self._identify() if self._checkpoint_dir is not None else {}
        is_resumed = self._checkpoint_dir is not None and self._resume(self._checkpoint_dir, identity)
        if not is_resumed:
            self._begin()
        self._objective = self._accelerator.prepare_model(self._objective)
        seconds_before = self._state.seconds
        with ExitStack() as stack:
            if self._is_compiled:
                stack.enter_context(compiled_layers([self._base, self._student.model]))
            self._train(began, seconds_before, identity)
        return self._finish()

    def _train(self, began: float, seconds_before: float, identity: Mapping[str, Any]) -> None:
        """Make updates until something ends the training."""
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

    # ---- Setting up --------------------------------------------------------------------------------------------------

    def _check_device(self) -> None:
        expected = self._accelerator.device
        is_expected = self._device == expected or self._device.type == expected.type == "cpu"
        if self._accelerator.num_processes > 1 and not is_expected:
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
        tokens = self._comparison.to_device(self._training.gather(self._schedule[0, :1]).repeat(num_windows, axis=0))
        torch.autograd.backward(self._comparison.run(tokens))
        for parameter in self._student.trained.values():
            parameter.grad = None

    # ---- Steps -------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Make one update; the batch is a function of the seed and the step."""
        rows = self._schedule[self._state.step]
        rows = rows[self._accelerator.process_index :: self._accelerator.num_processes]
        tokens = self._comparison.to_device(self._training.gather(rows))
        batches = torch.split(tokens, self._state.micro_batch)
        for number, batch in enumerate(batches):
            is_last = number == len(batches) - 1
            with nullcontext() if is_last else self._accelerator.no_sync(self._objective):
                loss = self._comparison.run(batch, self._objective) * (len(batch) / len(tokens))
                self._accelerator.backward(loss)
            self._loss_sum += loss.detach()
        self._loss_count += 1
        self._accelerator.clip_grad_norm_(self._student.trained.values(), _CLIPPED_NORM)
        set_learning_rate(self._optimizer, self._find_learning_rate(self._state.step))
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
        mean: float = total.item() / self._loss_count
        self._loss_sum.zero_()
        self._loss_count = 0
        return mean

    # ---- Evaluations -------------------------------------------------------------------------------------------------

    def _validate(self) -> dict[str, ValidationLoss]:
        """Evaluate every kind; each process takes its share of the windows.

        Never compiled: batches of other sizes would be compiled again.
        """
        with torch.compiler.set_stance("force_eager"):
            return {kind: self._validate_kind(windows) for kind, windows in self._validation.items()}

    def _validate_kind(self, windows: Windows) -> ValidationLoss:
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        mine = windows.input_ids[self._accelerator.process_index :: self._accelerator.num_processes]
        for start in range(0, len(mine), self._state.micro_batch):
            tokens = self._comparison.to_device(mine[start : start + self._state.micro_batch])
            losses = self._comparison.evaluate(tokens)
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
            recovered = 1 - self._state.history[-1].mean_kl / compute_mean_kl(self._state.untouched)
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
        self._accelerator.free_memory()
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
            "rates": "relative",  # in checkpoints without it the learning rate was absolute
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
        if self._accelerator.is_main_process:
            logger.info("training goes on after step %d of %d", self._state.step, self._num_steps)
        self._student.set_weights({n: w for n, w in self._weights.items() if n not in self._student.trained})
        restore_optimizer(checkpoint, self._student.trained, self._optimizer)
        self._best = checkpoint.best if self._accelerator.is_main_process else {}
        return True


def _read_losses(content: Mapping[str, Mapping[str, float]]) -> dict[str, ValidationLoss]:
    return {kind: ValidationLoss(**losses) for kind, losses in content.items()}
