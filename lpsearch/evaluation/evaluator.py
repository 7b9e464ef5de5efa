"""The proxy: losses of a model under a plan on fixed windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

from lpsearch.data import Windows
from lpsearch.errors import LpsearchError, describe_error
from lpsearch.evaluation.head import OutputHead, run_decoder
from lpsearch.evaluation.losses import RAW, Variant, WindowLosses
from lpsearch.evaluation.prefix_cache import CacheUsage, PrefixCache, choose_cache_bytes
from lpsearch.evaluation.rungs import split_by_rung
from lpsearch.models.families import get_decoder_layers
from lpsearch.models.placement import find_input_device, list_run_devices
from lpsearch.plan import Plan
from lpsearch.transform import applied_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ModelEvaluator", "choose_batch_size"]

_LOGIT_CHUNK_BYTES = 64 << 20
_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}


def choose_batch_size(device: torch.device, seq_len: int) -> int:
    """Choose how many windows run together: 4096 tokens on a CPU and 16384 on a GPU.

    Args:
        device: that of the tokens.
        seq_len: tokens in a window.
    """
    return max(1, _BATCH_TOKENS.get(device.type, _BATCH_TOKENS["cpu"]) // seq_len)


class ModelEvaluator:
    """Evaluates plans on the windows it holds, with the model it holds; a :class:`~.losses.PlanEvaluator`.

    The decoder runs on whole windows; the output head and the losses run on chunks of positions, so that of the logits,
    by far the largest tensor at vocabularies of 256k, only 64 MiB in float32 exist at a time. For KL(base || plan) the
    base model's last hidden states are kept (``hidden_size`` numbers a token, about a hundredth of the logits) and its
    logits are computed again beside the plan's, which costs one more head and no second run of the layers.

    Hidden states at the group boundaries of earlier plans are kept, so a plan runs only the layers after the longest
    beginning that it shares with one of them, on the same batch of windows; its losses are bit for bit those without
    the cache. Ask for the same windows in the same order to profit. Who changes the weights in place names the variant
    that they are then.

    Args:
        model: the unmodified model, in eval mode; a plan is applied to it in place during an evaluation.
        windows: what to evaluate on.
        metric: ``kl`` to measure KL(base || plan) as well.
        batch_size: most windows in a forward pass; None takes 4096 tokens on a CPU and 16384 on a GPU. Results depend
            on it through rounding only.
        cache_bytes: most bytes of hidden states to keep; 0 runs every layer of every plan. None takes half of the free
            memory of a GPU, and on a CPU at most 2 GiB and a quarter of what is available.
        cache_location: where to keep them: beside the weights, or in pinned host memory.

    Raises:
        FamilyError: if the model's head cannot be run apart from its layers.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        windows: Windows,
        metric: Literal["nll", "kl"] = "nll",
        batch_size: int | None = None,
        cache_bytes: int | None = None,
        cache_location: Literal["device", "host"] = "device",
    ) -> None:
        """Check that the model's head can be run apart from its layers."""
        self._model = model
        self._windows = windows
        self._metric = metric
        self._device = find_input_device(model)
        self._batch_size = batch_size or choose_batch_size(self._device, windows.seq_len)
        self._base_hidden_states: dict[int, torch.Tensor] = {}  # by window, each (seq - 1, hidden)
        with torch.inference_mode():
            self._head = OutputHead(model, self._input_ids([0]))
        if cache_bytes is None:
            cache_bytes = choose_cache_bytes(*list_run_devices(model), location=cache_location)
        self._cache = PrefixCache(model=model, budget_bytes=cache_bytes, location=cache_location)

    @property
    def num_windows(self) -> int:
        """Number of windows that ``window_indices`` may name."""
        return self._windows.num_windows

    @property
    def windows(self) -> Windows:
        """The windows themselves."""
        return self._windows

    @property
    def cache_usage(self) -> CacheUsage:
        """Layers that ran, layers that would have run without the cache, and what the cache holds."""
        return self._cache.usage

    def list_cached_states(self) -> list[torch.Tensor]:
        """Return the hidden states that are kept, (windows, seq, hidden) each, not copied."""
        return self._cache.list_states()

    def clear_cache(self) -> None:
        """Forget the hidden states that are kept for further plans."""
        self._cache.clear()

    @torch.inference_mode()
    def evaluate_windows(self, plan: Plan, window_indices: Sequence[int], *, variant: Variant = RAW) -> WindowLosses:
        """Evaluate a plan on some of the windows.

        Args:
            plan: a plan for the evaluator's model.
            window_indices: which windows, each in ``[0, num_windows)``.
            variant: what was done to the model's weights since the evaluator was built.

        Returns:
            One loss a window, in the order of ``window_indices``. A plan that overflows the dtype has losses that are
            not finite.

        Raises:
            IndexError: for a window that does not exist.
            ValueError: for the divergence of a variant on windows that the raw model was not evaluated on.
            LpsearchError: if the device runs out of memory.
        """
        for index in window_indices:
            if not 0 <= index < self.num_windows:
                raise IndexError(f"window {index} is outside [0, {self.num_windows})")
        losses = self._evaluate_in_memory(plan, window_indices, variant)
        divergences = tuple(kl for _, kl in losses if kl is not None)
        return WindowLosses(
            nll_nats_per_token=tuple(nll for nll, _ in losses),
            kl_nats_per_token=divergences if self._metric == "kl" else None,
            tokens_per_window=self._windows.seq_len - 1,
        )

    @torch.inference_mode()
    def remember_base(self, window_indices: Sequence[int]) -> None:
        """Run the unmodified model where divergences of variants will need it; the weights must be its own.

        Args:
            window_indices: which windows, each in ``[0, num_windows)``.
        """
        if self._metric == "kl":
            self._remember_base(window_indices, RAW)

    def _evaluate_in_memory(
        self, plan: Plan, window_indices: Sequence[int], variant: Variant
    ) -> list[tuple[float, float | None]]:
        """Evaluate, and again with a smaller cache where the device runs out of memory."""
        while True:
            try:
                return self._evaluate(plan, window_indices, variant)
            except torch.OutOfMemoryError as error:
                message = describe_error(error)
            # Outside the handler, whose traceback holds on to the tensors of the failed forward.
            if not self._cache.halve():
                raise LpsearchError(
                    f"{self._device} ran out of memory on {self._batch_size} windows of {self._windows.seq_len} "
                    f"tokens ({message}); lower --seq-len, or use --dtype bfloat16 or a larger device"
                )

    def _evaluate(
        self, plan: Plan, window_indices: Sequence[int], variant: Variant
    ) -> list[tuple[float, float | None]]:
        if self._metric == "kl":
            self._remember_base(window_indices, variant)
        losses: dict[int, tuple[float, float | None]] = {}
        with applied_plan(self._model, plan):
            for batch in self._split(window_indices):
                hidden_states = self._run_decoder(plan, batch, variant)
                for index, row in zip(batch, hidden_states, strict=True):
                    losses[index] = self._compute_losses(index, row)
        return [losses[index] for index in window_indices]

    def _split(self, window_indices: Sequence[int]) -> Iterator[list[int]]:
        """Yield the batches; none crosses a rung, so a search in stages runs the batches of a whole evaluation."""
        for rung in split_by_rung(window_indices, self.num_windows, len(self._windows.kinds)):
            for start in range(0, len(rung), self._batch_size):
                yield rung[start : start + self._batch_size]

    def _remember_base(self, window_indices: Sequence[int], variant: Variant) -> None:
        missing = [index for index in window_indices if index not in self._base_hidden_states]
        if missing and variant != RAW:
            raise ValueError(f"evaluate the raw model on windows {missing} first: divergences are from it")
        baseline = Plan.baseline(len(get_decoder_layers(self._model)))
        for batch in self._split(missing):
            for index, row in zip(batch, self._run_decoder(baseline, batch, RAW), strict=True):
                self._base_hidden_states[index] = row.clone()

    def _run_decoder(self, plan: Plan, window_indices: Sequence[int], variant: Variant) -> torch.Tensor:
        """Return the last hidden states at the predicting positions, ``(batch, seq - 1, hidden)``.

        Args:
            plan: the plan that the model is under.
            window_indices: the windows of one batch.
            variant: what was done to its weights.
        """
        input_ids = self._input_ids(window_indices)
        with self._cache.shortcut(plan, window_indices, seq_len=self._windows.seq_len, variant=variant):
            return run_decoder(self._model, input_ids)[:, :-1]

    def _input_ids(self, window_indices: Sequence[int]) -> torch.Tensor:
        rows = self._windows.input_ids[list(window_indices)]
        return torch.from_numpy(rows).to(device=self._device, dtype=torch.long)

    def _compute_losses(self, window_index: int, hidden_states: torch.Tensor) -> tuple[float, float | None]:
        """Return mean NLL and mean KL, or None, of one window in nats per token.

        Args:
            window_index: the window.
            hidden_states: its last hidden states under the plan, ``(seq - 1, hidden)``.
        """
        targets = self._input_ids([window_index])[0, 1:].to(hidden_states.device)  # (seq - 1,)
        base = self._base_hidden_states[window_index] if self._metric == "kl" else None
        chunk_len = max(1, _LOGIT_CHUNK_BYTES // (4 * self._head.vocab_size))
        nll_sum = torch.zeros((), dtype=torch.float64, device=targets.device)
        kl_sum = torch.zeros_like(nll_sum)
        for start in range(0, len(targets), chunk_len):
            chunk = slice(start, start + chunk_len)
            log_probs = self._compute_log_probs(hidden_states[chunk])  # (chunk, vocab)
            nll_sum += F.nll_loss(log_probs, targets[chunk], reduction="sum")
            if base is not None:
                base_log_probs = self._compute_log_probs(base[chunk])
                kl_sum += F.kl_div(log_probs, base_log_probs, reduction="sum", log_target=True)
        mean_kl = None if base is None else float(kl_sum) / len(targets)
        return float(nll_sum) / len(targets), mean_kl

    def _compute_log_probs(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return float32 log-probabilities ``(positions, vocab)`` of last hidden states ``(positions, hidden)``."""
        return F.log_softmax(self._head(hidden_states[None])[0], dim=-1, dtype=torch.float32)
