"""Kernels of a decode step of one sequence, where every product reads its weights once and does little else.

A product of one row is bound by memory, so the same kernel also computes norm, bias, activation and residual: an
RMSNorm whose weight is folded into the matrix is a factor of the result, whose sum of squares is gathered on the way.
Attention rotates, writes the cache and reads its valid entries in one kernel. It is split over the cache, so that all
processors have work, and a second kernel combines the parts (Dao et al., "Flash-Decoding for long-context inference",
2023).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lpsearch.latency.runtime.launch import dependent_launch

try:
    import triton
    import triton.language as tl

    from lpsearch.latency.runtime.launch import release, wait
except ImportError:  # builds of torch for the CPU alone come without it
    triton = None

__all__ = ["attend_row", "multiply_row"]

_TARGET_BLOCKS = 264
_MIN_SPLIT = 64
_ACTIVATIONS = {None: 0, "silu": 1, "gelu_tanh": 2}


def _choose_num_splits(*, batch_size: int, num_kv_heads: int, capacity: int) -> int:
    """Return into how many parts the cache is split, so that its readers fill the device."""
    wanted = -(-_TARGET_BLOCKS // (batch_size * num_kv_heads))
    most = max(1, capacity // _MIN_SPLIT)
    return int(min(64, 1 << (max(1, min(wanted, most)) - 1).bit_length()))


if triton is not None:

    @triton.jit
    def _tanh(x):
        return 2 * tl.sigmoid(2 * x) - 1

    @triton.jit
    def _multiply_row_kernel(
        x_ptr,
        w_ptr,
        bias_ptr,
        residual_ptr,
        out_ptr,
        num_out,
        num_in,
        eps,
        HAS_NORM: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        ACTIVATION: tl.constexpr,
        EVEN: tl.constexpr,
        BLOCK_OUT: tl.constexpr,
        BLOCK_IN: tl.constexpr,
        PDL: tl.constexpr,
    ):
        member = tl.program_id(1).to(tl.int64)
        rows = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        cols = tl.arange(0, BLOCK_IN)
        row_mask = rows < num_out
        # With an activation, row r belongs with row num_out + r.
        num_rows = num_out if ACTIVATION == 0 else 2 * num_out
        x_ptr += member * num_in
        w_ptr += member * num_rows * num_in
        w_ptrs = w_ptr + rows.to(tl.int64)[:, None] * num_in + cols[None, :]
        up_ptrs = w_ptrs + num_out.to(tl.int64) * num_in
        mask = row_mask[:, None] & (cols < num_in)[None, :]
        w = tl.load(w_ptrs, mask=mask, other=0.0)
        if ACTIVATION != 0:
            up = tl.load(up_ptrs, mask=mask, other=0.0)
        wait(PDL)
        release(PDL)
        x = tl.load(x_ptr + cols, mask=cols < num_in, other=0.0).to(tl.float32)
        sums = w.to(tl.float32) * x[None, :]
        if ACTIVATION != 0:
            up_sums = up.to(tl.float32) * x[None, :]
        squares = x * x
        for start in range(BLOCK_IN, num_in, BLOCK_IN):
            col_mask = start + cols < num_in
            if EVEN:
                col_mask = tl.full([BLOCK_IN], True, dtype=tl.int1)
            mask = row_mask[:, None] & col_mask[None, :]
            x = tl.load(x_ptr + start + cols, mask=col_mask, other=0.0).to(tl.float32)
            w = tl.load(w_ptrs + start, mask=mask, other=0.0)
            sums += w.to(tl.float32) * x[None, :]
            if ACTIVATION != 0:
                up = tl.load(up_ptrs + start, mask=mask, other=0.0)
                up_sums += up.to(tl.float32) * x[None, :]
            if HAS_NORM:
                squares += x * x
        out = tl.sum(sums, axis=1)
        factor = 1.0
        if HAS_NORM:
            factor = tl.rsqrt(tl.sum(squares, axis=0) / num_in + eps)
            out *= factor
        if HAS_BIAS:
            out += tl.load(bias_ptr + member * num_rows + rows, mask=row_mask, other=0.0).to(tl.float32)
        if ACTIVATION != 0:
            up_out = tl.sum(up_sums, axis=1) * factor
            if HAS_BIAS:
                up_out += tl.load(bias_ptr + num_out + rows, mask=row_mask, other=0.0).to(tl.float32)
            if ACTIVATION == 1:
                out = out * tl.sigmoid(out) * up_out
            else:
                inner = 0.7978845608028654 * (out + 0.044715 * out * out * out)
                out = 0.5 * out * (1 + _tanh(inner)) * up_out
        if HAS_RESIDUAL:
            out += tl.load(residual_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + member * num_out + rows, out.to(out_ptr.dtype.element_ty), mask=row_mask)

    @triton.jit
    def _load_rotated(
        base,
        norm_base,
        dims,
        partner,
        mask,
        cos,
        sin,
        eps,
        HEAD_DIM: tl.constexpr,
        HAS_NORM: tl.constexpr,
    ):
        # base: (heads, 1) pointers of the heads' first element; returns (heads, BLOCK_DIM) in float32.
        x = tl.load(base + dims[None, :], mask=mask, other=0.0).to(tl.float32)
        other = tl.load(base + partner[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_NORM:
            factor = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None]
            x *= factor * tl.load(norm_base + dims[None, :], mask=mask, other=0.0).to(tl.float32)
            other *= factor * tl.load(norm_base + partner[None, :], mask=mask, other=0.0).to(tl.float32)
        return x * cos[None, :] + other * sin[None, :]

    @triton.jit
    def _attend_row_kernel(
        qkv_ptr,
        keys_ptr,
        values_ptr,
        rope_ptr,
        partner_ptr,
        q_norm_ptr,
        k_norm_ptr,
        position_ptr,
        partial_ptr,
        weight_ptr,
        row_stride,
        capacity,
        num_kv_heads,
        scale,
        softcap,
        eps,
        WINDOW: tl.constexpr,
        HAS_NORM: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        QUERIES: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_DIM: tl.constexpr,
        BLOCK_QUERIES: tl.constexpr,
        BLOCK_LEN: tl.constexpr,
        PDL: tl.constexpr,
    ):
        head, sequence, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
        num_splits = tl.num_programs(2)
        dims = tl.arange(0, BLOCK_DIM)
        queries = tl.arange(0, BLOCK_QUERIES)
        dim_mask = dims < HEAD_DIM
        partner = tl.load(partner_ptr + dims, mask=dim_mask, other=0)
        position = tl.load(position_ptr)
        wait(PDL)
        release(PDL)
        first = 0
        if WINDOW > 0:
            first = tl.maximum(0, position - WINDOW + 1)
        chunk = tl.cdiv(tl.cdiv(position + 1 - first, num_splits), BLOCK_LEN) * BLOCK_LEN
        begin = first + split * chunk
        end = tl.minimum(begin + chunk, position + 1)
        cos = tl.load(rope_ptr + position * HEAD_DIM + dims, mask=dim_mask, other=0.0)
        sin = tl.load(rope_ptr + (capacity + position) * HEAD_DIM + dims, mask=dim_mask, other=0.0)
        row_ptr = qkv_ptr + sequence * row_stride
        q_mask = (queries < QUERIES)[:, None] & dim_mask[None, :]
        q_index = (head * QUERIES + queries)[:, None] * HEAD_DIM
        q = _load_rotated(
            row_ptr + q_index, q_norm_ptr + q_index, dims, partner, q_mask, cos, sin, eps, HEAD_DIM, HAS_NORM
        )
        element = keys_ptr.dtype.element_ty
        q = q.to(element)
        one = tl.zeros([1, 1], dtype=tl.int32)
        k_ptr = row_ptr + num_kv_heads * QUERIES * HEAD_DIM + head * HEAD_DIM
        new_k = _load_rotated(
            k_ptr + one,
            k_norm_ptr + head * HEAD_DIM + one,
            dims,
            partner,
            dim_mask[None, :],
            cos,
            sin,
            eps,
            HEAD_DIM,
            HAS_NORM,
        ).to(element)
        new_v = tl.load(k_ptr + num_kv_heads * HEAD_DIM + dims[None, :], mask=dim_mask[None, :], other=0.0)
        cache = (sequence * num_kv_heads + head) * capacity * HEAD_DIM
        if (begin <= position) & (position < end):
            at = cache + position * HEAD_DIM + dims[None, :]
            tl.store(keys_ptr + at, new_k, mask=dim_mask[None, :])
            tl.store(values_ptr + at, new_v, mask=dim_mask[None, :])
        high = tl.full([BLOCK_QUERIES], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_QUERIES], dtype=tl.float32)
        out = tl.zeros([BLOCK_QUERIES, BLOCK_DIM], dtype=tl.float32)
        for start in range(begin, end, BLOCK_LEN):
            entries = start + tl.arange(0, BLOCK_LEN)
            old = (entries < end) & (entries < position)
            at = cache + entries[:, None] * HEAD_DIM + dims[None, :]
            kv_mask = old[:, None] & dim_mask[None, :]
            new = (entries == position)[:, None]
            k = tl.where(new, new_k, tl.load(keys_ptr + at, mask=kv_mask, other=0.0))
            v = tl.where(new, new_v, tl.load(values_ptr + at, mask=kv_mask, other=0.0))
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if HAS_SOFTCAP:
                scores = softcap * _tanh(scores / softcap)
            scores = tl.where((entries < end)[None, :], scores, float("-inf"))
            higher = tl.maximum(high, tl.max(scores, axis=1))
            shrink = tl.exp(high - higher)
            shares = tl.exp(scores - higher[:, None])
            total = total * shrink + tl.sum(shares, axis=1)
            out = out * shrink[:, None] + tl.dot(shares.to(element), v, input_precision="ieee")
            high = higher
        slot = ((sequence * num_kv_heads + head) * QUERIES + queries) * num_splits + split
        at = slot[:, None] * HEAD_DIM + dims[None, :]
        used = begin < end
        share = tl.where(used, high + tl.log(total), float("-inf"))
        out = tl.where(used, out / total[:, None], 0.0)
        tl.store(partial_ptr + at, out, mask=q_mask)
        tl.store(weight_ptr + slot, share, mask=queries < QUERIES)

    @triton.jit
    def _combine_kernel(
        partial_ptr,
        weight_ptr,
        out_ptr,
        out_stride,
        NUM_SPLITS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_DIM: tl.constexpr,
        PDL: tl.constexpr,
    ):
        head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
        wait(PDL)
        release(PDL)
        slot = sequence * tl.num_programs(0) + head
        splits = tl.arange(0, NUM_SPLITS)
        dims = tl.arange(0, BLOCK_DIM)
        weights = tl.load(weight_ptr + slot * NUM_SPLITS + splits)
        weights = tl.exp(weights - tl.max(weights, axis=0))
        weights = weights / tl.sum(weights, axis=0)
        at = (slot * NUM_SPLITS + splits)[:, None] * HEAD_DIM + dims[None, :]
        mask = (dims < HEAD_DIM)[None, :] & (splits < NUM_SPLITS)[:, None]
        partial = tl.load(partial_ptr + at, mask=mask, other=0.0)
        out = tl.sum(partial * weights[:, None], axis=0)
        out_ptr += sequence * out_stride + head * HEAD_DIM
        tl.store(out_ptr + dims, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


def multiply_row(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_eps: float | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    launch: dict[str, Any] | None = None,
) -> Tensor:
    """Multiply each of P rows by its own matrix, with what stands around the product.

    Args:
        rows: (P, in).
        weight: (P, out, in), or (P, 2 x out, in) with an activation: gates, then ups.
        bias: (P, out) or, with P = 1, (out,); twice as long with an activation.
        norm_eps: epsilon of an RMSNorm without weight before the product; None for no norm.
        activation: ``silu`` or ``gelu_tanh`` of the gate, times the up; None for no gate.
        residual: (1, out), added at the end.
        launch: block sizes to use instead of those chosen by shape.

    Returns:
        (P, 1, out).
    """
    members, num_rows, num_in = weight.shape
    num_out = num_rows // 2 if activation else num_rows
    out = torch.empty((members, 1, num_out), dtype=rows.dtype, device=rows.device)
    options = launch or _choose_launch(num_out, num_in, gated=activation is not None)
    grid = (triton.cdiv(num_out, options["BLOCK_OUT"]), members)
    _multiply_row_kernel[grid](
        rows,
        weight,
        bias if bias is not None else rows,
        residual if residual is not None else rows,
        out,
        num_out,
        num_in,
        norm_eps or 0.0,
        HAS_NORM=norm_eps is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ACTIVATION=_ACTIVATIONS[activation],
        EVEN=num_in % options["BLOCK_IN"] == 0,
        **options,
        **dependent_launch(),
    )
    return out


def attend_row(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    *,
    rope: Tensor,
    partner: Tensor,
    position: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    norm_eps: float,
    num_heads: int,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> None:
    """Attend with one new token a sequence, which enters the cache.

    Args:
        qkv: (batch, (heads + 2 x kv_heads) x head_dim), a slice of the projections' output.
        keys: (batch, kv_heads, capacity, head_dim), likewise ``values``; written at ``position``.
        values: see ``keys``.
        out: (batch, heads x head_dim), a slice of what is attended.
        rope: (2, capacity, head_dim), float32.
        partner: (head_dim,), int64.
        position: tokens cached, a scalar on the device.
        q_norm: (heads, head_dim), likewise ``k_norm``; None without.
        k_norm: see ``q_norm``.
        norm_eps: epsilon of these norms.
        num_heads: query heads.
        scale: factor of the scores.
        softcap: tanh bound of the scores.
        window: tokens attended to at most; None for all.
    """
    batch_size, num_kv_heads, capacity, head_dim = keys.shape
    queries = num_heads // num_kv_heads
    longest = capacity if window is None else min(capacity, window)
    num_splits = _choose_num_splits(batch_size=batch_size, num_kv_heads=num_kv_heads, capacity=longest)
    partial = torch.empty((batch_size, num_heads, num_splits, head_dim), dtype=torch.float32, device=qkv.device)
    weights = torch.empty((batch_size, num_heads, num_splits), dtype=torch.float32, device=qkv.device)
    block_dim = max(16, triton.next_power_of_2(head_dim))  # the least that a product of tiles takes
    _attend_row_kernel[(num_kv_heads, batch_size, num_splits)](
        qkv,
        keys,
        values,
        rope,
        partner,
        q_norm if q_norm is not None else qkv,
        k_norm if k_norm is not None else qkv,
        position,
        partial,
        weights,
        qkv.stride(0),
        capacity,
        num_kv_heads,
        scale,
        softcap or 1.0,
        norm_eps,
        WINDOW=window or 0,
        HAS_NORM=q_norm is not None,
        HAS_SOFTCAP=softcap is not None,
        QUERIES=queries,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        BLOCK_QUERIES=max(16, triton.next_power_of_2(queries)),
        BLOCK_LEN=64 if block_dim <= 128 else 32,
        num_warps=4,
        **dependent_launch(),
    )
    _combine_kernel[(num_heads, batch_size)](
        partial,
        weights,
        out,
        out.stride(0),
        NUM_SPLITS=num_splits,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        num_warps=2,
        **dependent_launch(),
    )


def _choose_launch(num_out: int, num_in: int, *, gated: bool) -> dict[str, Any]:
    """Return block sizes by shape: the fastest of a sweep on an H100 (studies/LOG.md).

    Few outputs a block keep the tail short and leave room for many blocks, hence many loads under way.
    """
    if gated:
        whole = num_in % 4096 == 0
        return {"BLOCK_OUT": 1 if whole else 4, "BLOCK_IN": 4096 if whole else 1024, "num_warps": 8 if whole else 4}
    if num_out >= 6144:
        return {"BLOCK_OUT": 2, "BLOCK_IN": 1024, "num_warps": 4}
    return {"BLOCK_OUT": 1, "BLOCK_IN": 2048, "num_warps": 4}
