"""KL(base || plan) over the whole vocabulary, a chunk of positions at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LossSums", "compute_divergence", "sum_losses"]

Head = Callable[[Tensor], Tensor]
"""Turns last hidden states, (batch, seq, hidden), into logits, (batch, seq, vocab)."""

Compare = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Turns logits under the plan and of the base, (chunk, vocab), into their divergence and its gradient."""

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
"""What one chunk's logits take in float32. A few tensors of that size exist at a time."""


@dataclass(frozen=True)
class LossSums:
    """Sums over positions, float64 scalars on the device.

    Attributes:
        kl: KL(base || plan), nats.
        nll: negative log-likelihood under the plan, nats.
        num_tokens: positions.
    """

    kl: Tensor
    nll: Tensor
    num_tokens: int


def compute_divergence(
    hidden_states: Tensor,
    base_hidden_states: Tensor,
    *,
    head: Head,
    base_head: Head,
    vocab_size: int,
    chunk_bytes: int | None = None,
    is_compiled: bool = False,
) -> Tensor:
    """Compute the mean of KL(base || plan) over positions, differentiable in the plan's hidden states.

    The loss of knowledge distillation at temperature 1 (Hinton et al., arXiv 1503.02531). The heads' parameters get no
    gradient. Since the head is fixed, the gradient of a chunk's hidden states is computed at once in the forward pass
    and kept, ``hidden`` numbers a position, so the head runs once a training step for the plan and once for the base.

    Args:
        hidden_states: last hidden states under the plan, (batch, seq, hidden).
        base_hidden_states: those of the unmodified model, (batch, seq, hidden).
        head: of the plan's model.
        base_head: of the unmodified model.
        vocab_size: logits of a position.
        chunk_bytes: most bytes of a chunk's float32 logits; None for 64 MiB on a CPU and 256 MiB on a GPU.
        is_compiled: whether what is done with a chunk's logits is compiled.

    Returns:
        A float32 scalar, nats per token.
    """
    chunk_len = _choose_chunk_len(hidden_states.device, vocab_size, chunk_bytes)
    apply: Any = _Divergence.apply
    compare = _compile_comparison() if is_compiled else _compare
    return cast(Tensor, apply(hidden_states, base_hidden_states, head, base_head, chunk_len, compare))


@torch.no_grad()
def sum_losses(
    hidden_states: Tensor,
    base_hidden_states: Tensor,
    targets: Tensor,
    *,
    head: Head,
    base_head: Head,
    vocab_size: int,
    chunk_bytes: int | None = None,
) -> LossSums:
    """Sum KL(base || plan) and the NLL of the targets over positions.

    Args:
        hidden_states: last hidden states under the plan, (batch, seq, hidden).
        base_hidden_states: those of the unmodified model, (batch, seq, hidden).
        targets: (batch, seq), the token that each position predicts.
        head: of the plan's model.
        base_head: of the unmodified model.
        vocab_size: logits of a position.
        chunk_bytes: as for :func:`compute_divergence`.
    """
    chunk_len = _choose_chunk_len(hidden_states.device, vocab_size, chunk_bytes)
    kl = torch.zeros((), dtype=torch.float64, device=hidden_states.device)
    nll = torch.zeros_like(kl)
    flat_targets = torch.split(targets.flatten(), chunk_len)
    for (rows, base_rows), chosen in zip(
        _chunks(hidden_states, base_hidden_states, chunk_len), flat_targets, strict=True
    ):
        log_probs = _log_probs(head(rows[None])[0])  # (chunk, vocab)
        nll += F.nll_loss(log_probs, chosen, reduction="sum")
        base_log_probs = _log_probs(base_head(base_rows[None])[0])
        kl += F.kl_div(log_probs, base_log_probs, reduction="sum", log_target=True)
    return LossSums(kl, nll, targets.numel())


class _Divergence(torch.autograd.Function):
    """The mean divergence; its backward returns the gradient that the forward found."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        base_hidden_states: Tensor,
        head: Head,
        base_head: Head,
        chunk_len: int,
        compare: Compare,
    ) -> Tensor:
        num_tokens = hidden_states.shape[:-1].numel()
        total = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        gradient = torch.empty_like(hidden_states.flatten(0, -2)) if ctx.needs_input_grad[0] else None
        position = 0
        for rows, base_rows in _chunks(hidden_states, base_hidden_states, chunk_len):
            base_logits = base_head(base_rows[None])[0]
            with torch.set_grad_enabled(gradient is not None):
                entry = rows.detach().requires_grad_(gradient is not None)
                logits = head(entry[None])[0]  # (chunk, vocab)
            divergence, difference = compare(logits.detach(), base_logits)
            total += divergence / num_tokens
            if gradient is not None:
                (rows_gradient,) = torch.autograd.grad(logits, entry, difference)
                gradient[position : position + len(rows)] = rows_gradient / num_tokens
            position += len(rows)
        if gradient is not None:
            ctx.save_for_backward(gradient.view_as(hidden_states))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None, None, None


def _compare(logits: Tensor, base_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of KL(base || plan) over a chunk, and its gradient by the logits, (chunk, vocab)."""
    base_log_probs, log_probs = _log_probs(base_logits), _log_probs(logits)
    base_probs = base_log_probs.exp()
    divergence = base_log_probs.sub_(log_probs).mul_(base_probs).sum()
    # d KL / d logits = softmax(logits) - softmax(base logits)
    return divergence, log_probs.exp_().sub_(base_probs).to(logits.dtype)


@functools.cache
def _compile_comparison() -> Compare:
    return cast(Compare, torch.compile(_compare))


def _choose_chunk_len(device: torch.device, vocab_size: int, chunk_bytes: int | None) -> int:
    chunk_bytes = chunk_bytes or CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"])
    return max(1, chunk_bytes // (4 * vocab_size))


def _chunks(hidden_states: Tensor, base_hidden_states: Tensor, chunk_len: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows of both, (chunk, hidden)."""
    rows, base_rows = hidden_states.flatten(0, -2), base_hidden_states.flatten(0, -2)
    return zip(torch.split(rows, chunk_len), torch.split(base_rows, chunk_len), strict=True)


def _log_probs(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1, dtype=torch.float32)
