"""The unmodified model and the one that is trained, run side by side."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lpsearch.evaluation.head import OutputHead, run_decoder
from lpsearch.recovery.divergence import LossSums, compute_divergence, sum_losses

__all__ = ["Comparison"]


class Comparison:
    """Losses of a model under a plan against the unmodified model, in bfloat16 on a GPU.

    Attributes:
        objective: the loss as a module, which data-parallel training wraps.

    Args:
        base: the unmodified model.
        model: under the plan, on the same device.
        input_ids: (windows, seq), to check the output heads on.
        is_compiled: whether the loss is compiled.

    Raises:
        FamilyError: if an output head cannot be run apart from the layers.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        model: PreTrainedModel,
        input_ids: npt.NDArray[Any],
        *,
        is_compiled: bool = False,
    ) -> None:
        self._base, self._model, self._device = base, model, base.device
        tokens = self.to_device(input_ids)
        with self._autocast():
            self._base_head, self._head = OutputHead(base, tokens), OutputHead(model, tokens)
        self.objective: nn.Module = _Objective(model, self._head, self._base_head, is_compiled)

    def to_device(self, input_ids: npt.NDArray[Any]) -> Tensor:
        """Return tokens, (batch, seq), on the device; nothing waits for them."""
        on_host = torch.from_numpy(input_ids.astype(np.int64))
        return (on_host.pin_memory() if self._device.type == "cuda" else on_host).to(self._device, non_blocking=True)

    def run(self, input_ids: Tensor, objective: nn.Module | None = None) -> Tensor:
        """Compute KL(base || plan), a scalar to take gradients of.

        Args:
            input_ids: (batch, seq), on the device.
            objective: the module that wraps ``self.objective``; None for that itself.
        """
        with self._autocast():
            with torch.no_grad():
                base_hidden_states = run_decoder(self._base, input_ids)
            loss: Tensor = (objective or self.objective)(input_ids, base_hidden_states)
            return loss

    @torch.no_grad()
    def evaluate(self, input_ids: Tensor) -> LossSums:
        """Sum KL and NLL over the predicted tokens of (batch, seq)."""
        with self._autocast():
            return sum_losses(
                run_decoder(self._model, input_ids)[:, :-1],
                run_decoder(self._base, input_ids)[:, :-1],
                input_ids[:, 1:],
                head=self._head,
                base_head=self._base_head,
                vocab_size=self._head.vocab_size,
            )

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cuda", torch.bfloat16) if self._device.type == "cuda" else nullcontext()


class _Objective(nn.Module):
    """The loss of a batch as a module, which data-parallel training wraps."""

    def __init__(self, model: PreTrainedModel, head: OutputHead, base_head: OutputHead, is_compiled: bool) -> None:
        super().__init__()
        self.model = model
        self._head, self._base_head, self._is_compiled = head, base_head, is_compiled

    def forward(self, input_ids: Tensor, base_hidden_states: Tensor) -> Tensor:
        """Return the mean divergence of (batch, seq) tokens."""
        return compute_divergence(
            run_decoder(self.model, input_ids),
            base_hidden_states,
            head=self._head,
            base_head=self._base_head,
            vocab_size=self._head.vocab_size,
            is_compiled=self._is_compiled,
        )
