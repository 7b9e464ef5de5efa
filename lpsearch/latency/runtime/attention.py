"""Attention of groups over static caches: by kernels for one token a sequence, in plain torch for all else.

Plain attention is also the reference of the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lpsearch.latency.runtime import kernels
from lpsearch.latency.runtime.rope import Rope
from lpsearch.latency.sums import Ranks
from lpsearch.models.traits import AttentionKind, FamilyTraits
from lpsearch.transform.fused_weights import WideLayer

__all__ = ["GroupAttention"]


class GroupAttention:
    """Attends with every group of a model, on one rank.

    Args:
        traits: of the model.
        ranks: the ranks that share the model.
        num_positions: positions of the cache.
        device: where to run.
    """

    def __init__(self, traits: FamilyTraits, ranks: Ranks, *, num_positions: int, device: torch.device) -> None:
        self._traits, self._ranks = traits, ranks
        self._num_heads = traits.num_heads // ranks.num_ranks
        self._num_kv_heads = traits.num_kv_heads // ranks.num_ranks
        self._ropes: dict[AttentionKind, Rope] = {
            kind: Rope(traits, kind, num_positions=num_positions, device=device) for kind in dict.fromkeys(traits.kinds)
        }

    def attend(
        self, layer: WideLayer, caches: Sequence[Tensor], qkv: Tensor, *, length: int, position: Tensor | None
    ) -> Tensor:
        """Attend with all members of a group, whose new tokens enter the caches.

        Args:
            layer: the group's weights.
            caches: of each part of the group that attends alike, (2, batch, kv_heads, capacity, head_dim).
            qkv: (rows, projections of all members).
            length: tokens cached before.
            position: the same on the device, to attend by the kernel, with one row a sequence; None for plain torch.

        Returns:
            (rows, heads * head_dim of all members).
        """
        head_dim = self._traits.head_dim
        if self._traits.qk_norm == "full":
            qkv = self._norm_full_width(layer, qkv)
        members = [len(part.layers) for part in layer.parts]
        rows = [count * (self._num_heads + 2 * self._num_kv_heads) * head_dim for count in members]
        columns = [count * self._num_heads * head_dim for count in members]
        out = qkv.new_empty((len(qkv), sum(columns)))
        pieces = zip(layer.parts, caches, torch.split(qkv, rows, 1), torch.split(out, columns, 1), strict=True)
        for index, (part, cache, part_qkv, part_out) in enumerate(pieces):
            norms = (layer.q_norm[index], layer.k_norm[index]) if self._traits.qk_norm == "head" else (None, None)
            if position is not None:
                self._attend_by_kernel(part.kind, cache, part_qkv, part_out, norms, position)
            else:
                self._attend_plain(part.kind, cache, part_qkv, part_out, norms, length)
        return out

    def _attend_by_kernel(
        self,
        kind: AttentionKind,
        cache: Tensor,
        qkv: Tensor,
        out: Tensor,
        norms: tuple[Tensor | None, Tensor | None],
        position: Tensor,
    ) -> None:
        kernels.attend_row(
            qkv,
            cache[0],
            cache[1],
            out,
            rope=self._ropes[kind].table,
            partner=self._ropes[kind].partner,
            position=position,
            q_norm=norms[0],
            k_norm=norms[1],
            norm_eps=self._traits.norm_eps,
            num_heads=out.shape[1] // self._traits.head_dim,
            scale=self._traits.attention_scale,
            softcap=self._traits.attention_softcap,
            window=kind.window,
        )

    def _attend_plain(
        self,
        kind: AttentionKind,
        cache: Tensor,
        qkv: Tensor,
        out: Tensor,
        norms: tuple[Tensor | None, Tensor | None],
        length: int,
    ) -> None:
        traits, rope = self._traits, self._ropes[kind]
        batch = cache.shape[1]
        heads, kv_heads = out.shape[1] // traits.head_dim, cache.shape[2]
        split = qkv.reshape(batch, len(qkv) // batch, -1, traits.head_dim)  # (batch, seq, all heads, head_dim)
        q, k, v = torch.split(split, [heads, kv_heads, kv_heads], dim=2)
        attended = _attend_cached(
            rope.rotate(_norm_heads(q, norms[0], traits.norm_eps), length),
            rope.rotate(_norm_heads(k, norms[1], traits.norm_eps), length),
            v,
            cache[0],
            cache[1],
            start=length,
            scale=traits.attention_scale,
            softcap=traits.attention_softcap,
            window=kind.window,
        )
        out.copy_(attended.flatten(2).flatten(0, 1))

    def _norm_full_width(self, layer: WideLayer, qkv: Tensor) -> Tensor:
        """Norm each member's queries and keys over their whole width, which is spread over ranks."""
        head_dim, eps = self._traits.head_dim, self._traits.norm_eps
        widths = [heads * head_dim for heads in (self._num_heads, self._num_kv_heads, self._num_kv_heads)]
        pieces = list(torch.split(qkv, [len(part.layers) * width for part in layer.parts for width in widths], dim=1))
        normed = [index for index in range(len(pieces)) if index % 3 < 2]  # each part's queries and keys, not values
        weights = [weight for pair in zip(layer.q_norm, layer.k_norm, strict=True) for weight in pair]
        members = [pieces[i].float().view(-1, *weight.shape) for i, weight in zip(normed, weights, strict=True)]
        squares = torch.cat([member.square().sum(-1) for member in members], dim=1)  # (rows, 2 * members of all parts)
        squares = self._ranks.all_reduce(squares) / self._ranks.num_ranks
        sums = torch.split(squares, [len(weight) for weight in weights], 1)
        for i, member, weight, total in zip(normed, members, weights, sums, strict=True):
            factor = torch.rsqrt(total / weight.shape[1] + eps)
            pieces[i] = (member * factor[..., None] * weight.float()).flatten(1).to(qkv.dtype)
        return torch.cat(pieces, dim=1)


def _norm_heads(heads: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Norm each head by itself, (batch, seq, heads, head_dim) with a weight of (heads, head_dim); None leaves it."""
    if weight is None:
        return heads
    return (F.rms_norm(heads.float(), heads.shape[-1:], eps=eps) * weight.float()).to(heads.dtype)


def _attend_cached(
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
        attended = _compute_attention(grouped, k, v, None, scale, softcap, causal=False)
        return attended.reshape(batch, 1, num_heads, head_dim)
    assert start == 0
    mask = None
    if softcap is not None or (window is not None and window < seq):
        position = torch.arange(seq, device=q.device)
        distance = position[:, None] - position[None, :]
        mask = (distance >= 0) & (distance < (window or seq))
    return _compute_attention(q.transpose(1, 2), k, v, mask, scale, softcap, causal=mask is None).transpose(1, 2)


def _compute_attention(
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
