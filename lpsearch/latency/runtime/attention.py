"""Attention over a static cache, in plain torch: what the kernels compute for one row, and all longer inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lpsearch.latency.architecture import Architecture, AttentionKind, build_rope_table, rope_partner

__all__ = ["Rope", "attend", "norm_heads"]


class Rope:
    """Rotary embedding of one kind of attention for the positions of a cache.

    Attributes:
        table: (2, positions, head_dim) cosines and signed sines, float32.
        partner: (head_dim,) index of each element's partner.
    """

    def __init__(
        self, architecture: Architecture, kind: AttentionKind, *, num_positions: int, device: torch.device
    ) -> None:
        """Build the table on a device."""
        self.table = build_rope_table(architecture, kind, num_positions=num_positions).to(device)
        self.partner = rope_partner(architecture, kind).to(device)

    def rotate(self, heads: Tensor, start: int) -> Tensor:
        """Rotate (batch, seq, heads, head_dim) from position ``start`` on."""
        cos, sin = self.table[:, start : start + heads.shape[1], None]  # (seq, 1, head_dim) each
        x = heads.float()
        rotated: Tensor = x * cos + x[..., self.partner] * sin
        return rotated.to(heads.dtype)


def norm_heads(heads: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Norm each head by itself, (batch, seq, heads, head_dim) with a weight of (heads, head_dim); None leaves it."""
    if weight is None:
        return heads
    return (F.rms_norm(heads.float(), heads.shape[-1:], eps=eps) * weight.float()).to(heads.dtype)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    start: int,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Enter new tokens into a cache and attend to its valid entries.

    Args:
        q: (batch, seq, heads, head_dim), rotated; several tokens only with an empty cache.
        k: (batch, seq, kv_heads, head_dim), rotated.
        v: like ``k``.
        keys: (batch, kv_heads, capacity, head_dim), likewise ``values``.
        values: see ``keys``.
        start: tokens cached before.
        scale: factor of the scores.
        softcap: tanh bound of the scores.
        window: tokens attended to at most, the current one included; None for all.

    Returns:
        (batch, seq, heads, head_dim).
    """
    batch, seq, num_heads, head_dim = q.shape
    stop = start + seq
    keys[:, :, start:stop] = k.transpose(1, 2)
    values[:, :, start:stop] = v.transpose(1, 2)
    first = 0 if window is None or seq > 1 else max(0, stop - window)
    k, v = keys[:, :, first:stop], values[:, :, first:stop]
    if seq == 1:
        # The queries of one key-value head stand where positions would, so that no key is repeated.
        grouped = q.view(batch, k.shape[1], -1, head_dim)  # (batch, kv_heads, queries, head_dim)
        return _attend(grouped, k, v, None, scale, softcap, causal=False).reshape(batch, 1, num_heads, head_dim)
    assert start == 0
    mask = None
    if softcap is not None or (window is not None and window < seq):
        position = torch.arange(seq, device=q.device)
        distance = position[:, None] - position[None, :]
        mask = (distance >= 0) & (distance < (window or seq))
    return _attend(q.transpose(1, 2), k, v, mask, scale, softcap, causal=mask is None).transpose(1, 2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None, *, causal: bool
) -> Tensor:
    """Attend with (batch, heads, seq, head_dim) to (batch, kv_heads, length, head_dim)."""
    grouped = q.shape[1] != k.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = softcap * torch.tanh((q @ k.transpose(-1, -2)) * (scale / softcap))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.float().softmax(-1).to(q.dtype) @ v
