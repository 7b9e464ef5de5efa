"""Evaluate many plans at once on the same windows: each shared beginning runs once, and plans alike in a layer as one.

At every layer the plans that make the same group there run it as one batch, whatever came before. So a generation of a
few dozen plans costs a few calls a layer and keeps a GPU busy. The output head takes chunks of windows, and the
unmodified model's log-probabilities of a chunk serve every plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpsearch.data import Windows
from lpsearch.evaluation.losses import WindowLosses
from lpsearch.models.families import DecoderBlock, build_blocks, check_family, get_decoder, run_group, select_group
from lpsearch.plan import Group, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PlanBatchEvaluator", "PlanBatchLosses", "capture_inputs", "run_head", "run_layers"]

FloatArray = NDArray[np.float64]

MAX_PLANS = 64
"""Plans whose hidden states exist at the same time."""

_BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
_LOGIT_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}


@dataclass(frozen=True)
class PlanBatchLosses:
    """Losses of plans by window, nats per token.

    Attributes:
        nll: (plans, windows) negative log-likelihood.
        kl: (plans, windows) KL(base || plan).
    """

    nll: FloatArray
    kl: FloatArray


@dataclass(frozen=True)
class _Prefix:
    """Plans that are alike up to a layer: their rows, and the hidden states (windows, seq, hidden) there."""

    rows: list[int]
    hidden_states: Tensor


class PlanBatchEvaluator:
    """Evaluates plans on the windows it holds; a :class:`lpsearch.evaluation.losses.PlanEvaluator` of one plan, too.

    Args:
        model: the unmodified model, in eval mode.
        windows: what to evaluate on.

    Attributes:
        num_tokens: tokens of windows on which plans were evaluated so far, each plan counted on its own. What the
            unmodified model ran to be compared with is left out.
    """

    def __init__(self, model: PreTrainedModel, windows: Windows) -> None:
        """Run the unmodified model on every window."""
        check_family(model)
        self.num_tokens = 0
        self._model = model
        self._windows = windows
        self._blocks = build_blocks(model)
        self._input_ids = torch.tensor(windows.input_ids, dtype=torch.long, device=model.device)  # (windows, seq)
        with torch.inference_mode():
            self._embedded, self._layer_kwargs = capture_inputs(model, self._input_ids)
            self._vocab_size = int(run_head(model, self._embedded[None, :1, :1]).shape[-1])
            every = torch.arange(windows.num_windows, device=model.device)
            baseline = Plan.baseline(len(self._blocks))
            states = [self._run_plans([baseline], part)[0] for part in every.split(self._count_windows_in_batch())]
        self._base_states = torch.cat(states)  # (windows, seq, hidden), before the final norm

    @property
    def num_windows(self) -> int:
        """The number of windows."""
        return self._windows.num_windows

    @property
    def seq_len(self) -> int:
        """Tokens in a window."""
        return self._windows.seq_len

    def count_windows(self, tokens: int) -> int:
        """Return how many windows have that many tokens, rounded up; all where there are fewer."""
        return min(self.num_windows, max(1, -(-tokens // self.seq_len)))

    @torch.inference_mode()
    def evaluate(self, plans: Sequence[Plan], window_indices: Sequence[int]) -> PlanBatchLosses:
        """Evaluate plans on some of the windows.

        Args:
            plans: in any order, repeats allowed.
            window_indices: which windows, each in ``[0, num_windows)``.
        """
        windows = torch.tensor(list(window_indices), device=self._input_ids.device)
        self.num_tokens += len(plans) * len(windows) * self.seq_len
        losses = np.empty((2, len(plans), len(windows)))
        # those that begin alike stand together
        order = sorted(range(len(plans)), key=lambda row: plans[row].key)
        for start in range(0, len(order), MAX_PLANS):
            rows = order[start : start + MAX_PLANS]
            for part in torch.arange(len(windows)).split(self._count_windows_in_batch()):
                chosen = windows[part.to(windows.device)]
                states = self._run_plans([plans[row] for row in rows], chosen)
                found = self._compute_losses(states, chosen).cpu().numpy()  # (2, plans, windows)
                losses[:, np.array(rows)[:, None], part.numpy()] = found
        return PlanBatchLosses(*losses)

    def evaluate_windows(self, plan: Plan, window_indices: Sequence[int]) -> WindowLosses:
        """Evaluate one plan; see :class:`lpsearch.evaluation.losses.PlanEvaluator`."""
        losses = self.evaluate([plan], window_indices)
        return WindowLosses(tuple(losses.nll[0].tolist()), tuple(losses.kl[0].tolist()), self.seq_len - 1)

    def _count_windows_in_batch(self) -> int:
        return max(1, _BATCH_TOKENS[self._model.device.type] // self.seq_len)

    def _run_plans(self, plans: Sequence[Plan], windows: Tensor) -> Tensor:
        """Return the last layer's outputs, (plans, windows, seq, hidden)."""
        groups = [{group[0]: group for group in plan.groups} for plan in plans]
        prefixes: list[list[_Prefix]] = [[] for _ in range(len(self._blocks) + 1)]
        prefixes[0].append(_Prefix(list(range(len(plans))), self._embedded[windows]))
        for layer_idx, reached in enumerate(prefixes[:-1]):
            following: dict[Group, list[_Prefix]] = {}
            for prefix in reached:
                by_group: dict[Group, list[int]] = {}
                for row in prefix.rows:
                    by_group.setdefault(groups[row][layer_idx], []).append(row)
                for group, rows in by_group.items():
                    following.setdefault(group, []).append(_Prefix(rows, prefix.hidden_states))
            reached.clear()
            for group, before in following.items():
                prefixes[layer_idx + len(group)] += self._run_group(group, before)
        outputs = self._embedded.new_empty((len(plans), len(windows), *self._embedded.shape[1:]))
        for prefix in prefixes[-1]:
            outputs[prefix.rows] = prefix.hidden_states
        return outputs

    def _run_group(self, group: Group, before: Sequence[_Prefix]) -> list[_Prefix]:
        """Run a group after several prefixes, as many at once as fill a batch."""
        blocks = select_group(self._blocks, group)
        layer_kwargs = [self._layer_kwargs[i] for i in group]
        width = max(1, _BATCH_TOKENS[self._model.device.type] // before[0].hidden_states[..., 0].numel())
        after = []
        for start in range(0, len(before), width):
            part = before[start : start + width]
            states = torch.stack([prefix.hidden_states for prefix in part])
            outputs = run_layers(blocks, states, layer_kwargs, is_changed=group.is_changed)
            after += [_Prefix(prefix.rows, row) for prefix, row in zip(part, outputs, strict=True)]
        return after

    def _compute_losses(self, states: Tensor, windows: Tensor) -> Tensor:
        """Return (2, plans, windows) nll and KL of the last layer's outputs (plans, windows, seq, hidden)."""
        device = self._model.device.type
        window_bytes = 4 * self.seq_len * self._vocab_size
        num_windows = max(1, _LOGIT_BYTES[device] // window_bytes)
        losses = torch.empty((2, *states.shape[:2]), dtype=torch.float64, device=states.device)
        for part in torch.arange(len(windows), device=states.device).split(num_windows):
            chosen = windows[part]
            base = self._compute_log_probs(self._base_states[chosen][None])[0]  # (windows, seq - 1, vocab)
            probs, targets = base.exp(), self._input_ids[chosen, 1:, None]
            entropy = (probs * base).sum(dim=-1)
            num_plans = max(1, num_windows // len(part))
            for rows in torch.arange(len(states), device=states.device).split(num_plans):
                log_probs = self._compute_log_probs(states[rows[:, None], part])
                taken = log_probs.gather(-1, targets.expand(len(rows), -1, -1, 1))[..., 0]
                losses[0, rows[:, None], part] = -taken.double().mean(dim=-1)
                divergence = entropy - (log_probs * probs).sum(dim=-1)
                losses[1, rows[:, None], part] = divergence.double().mean(dim=-1)
        return losses

    def _compute_log_probs(self, states: Tensor) -> Tensor:
        """Return float32 log-probabilities (plans, windows, seq - 1, vocab) of (plans, windows, seq, hidden)."""
        return torch.log_softmax(run_head(self._model, states)[:, :, :-1], dim=-1, dtype=torch.float32)


def run_layers(
    blocks: Sequence[DecoderBlock],
    hidden_states: Tensor,
    layer_kwargs: Sequence[Mapping[str, Any]],
    *,
    is_changed: bool,
) -> Tensor:
    """Run one group on (plans, windows, seq, hidden); a whole layer of its own runs as the model runs it."""
    rows = hidden_states.flatten(0, 1)  # (plans * windows, seq, hidden)
    outputs = run_group(blocks, rows, layer_kwargs) if is_changed else blocks[0].layer(rows, **layer_kwargs[0])
    return outputs.view(hidden_states.shape)


def capture_inputs(model: PreTrainedModel, input_ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """Return the first layer's input (windows, seq, hidden), and each layer's own keyword arguments.

    The arguments come from a forward of one window. Masks and rotary embeddings are the same for all windows, so they
    broadcast over a batch of any size.
    """
    layers: Any = get_decoder(model).layers
    layer_kwargs: list[dict[str, Any]] = []
    inputs: list[Tensor] = []

    def note_kwargs(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer_kwargs.append(kwargs)

    def note_input(layer: torch.nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])

    handles = [layer.register_forward_pre_hook(note_kwargs, with_kwargs=True) for layer in layers]
    try:
        model.base_model(input_ids=input_ids[:1], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    handle = layers[0].register_forward_pre_hook(note_input)
    try:
        for row in input_ids:
            model.base_model(input_ids=row[None], use_cache=False)
    finally:
        handle.remove()
    return torch.cat(inputs), layer_kwargs


def run_head(model: PreTrainedModel, hidden_states: Tensor) -> Tensor:
    """Run what follows the layers: the family's own final norm and head.

    Meanwhile every layer of the model returns the given hidden states.

    Args:
        model: the unmodified model.
        hidden_states: the last layer's outputs, (plans, windows, seq, hidden).

    Returns:
        Logits, (plans, windows, seq, vocab).
    """
    rows = hidden_states.flatten(0, 1)  # (plans * windows, seq, hidden)
    layers: Any = get_decoder(model).layers
    try:
        for layer in layers:
            layer.__dict__["forward"] = lambda *args, **kwargs: rows
        placeholder = torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device)
        logits: Tensor = model(input_ids=placeholder, use_cache=False).logits
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
    return logits.view(*hidden_states.shape[:3], -1)
