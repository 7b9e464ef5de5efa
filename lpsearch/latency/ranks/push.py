"""The all-reduce that writes to all ranks at once: every word travels with the number of its sum.

A rank that polls a word sees by the number whether it has arrived, so that no barrier is needed. NCCL's low-latency
protocol (LL) works like this: Hu et al., "Demystifying NCCL", arXiv 2507.04786.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpsearch.latency.runtime.launch import dependent_launch

try:
    import triton
    import triton.language as tl

    from lpsearch.latency.runtime.launch import release, wait
except ImportError:  # builds of torch for the CPU alone come without it
    triton = None

__all__ = ["push_sum"]

_MAX_POLLS = 1 << 24  # about ten seconds

if triton is not None:

    @triton.jit(do_not_specialize=["sum_index"])
    def _push_sum_kernel(
        words_ptr,
        out_ptr,
        buffer_ptr,
        pointers_ptr,
        epoch_ptr,
        sum_index,
        num_words,
        part,
        RANK: tl.constexpr,
        NUM_RANKS: tl.constexpr,
        MAX_POLLS: tl.constexpr,
        BLOCK: tl.constexpr,
        PDL: tl.constexpr,
    ):
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < num_words
        wait(PDL)
        release(PDL)
        epoch = tl.load(epoch_ptr)
        flag = (epoch * 1024 + sum_index + 1).to(tl.int64)
        slot = (((epoch & 1) * 2 + (sum_index & 1)) * NUM_RANKS).to(tl.int64) * part
        own = tl.load(words_ptr + offsets, mask=mask, other=0)
        message = (flag << 32) | (own.to(tl.int64) & 0xFFFFFFFF)
        for peer in tl.static_range(NUM_RANKS):
            if peer != RANK:
                peer_ptr = tl.load(pointers_ptr + peer).to(tl.pointer_type(tl.int64))
                tl.store(peer_ptr + slot + RANK * part + offsets, message, mask=mask)
        tl.debug_barrier()
        low = tl.zeros([BLOCK], dtype=tl.float32)
        high = tl.zeros([BLOCK], dtype=tl.float32)
        for source in tl.static_range(NUM_RANKS):  # in the same order everywhere: the same bits everywhere
            word = own
            if source != RANK:
                at = buffer_ptr + slot + source * part + offsets
                got = tl.load(at, mask=mask, other=flag << 32, volatile=True)
                missing = tl.max(((got >> 32) != flag).to(tl.int32), axis=0)
                polls = 0
                while (missing != 0) & (polls < MAX_POLLS):
                    got = tl.load(at, mask=mask, other=flag << 32, volatile=True)
                    missing = tl.max(((got >> 32) != flag).to(tl.int32), axis=0)
                    polls += 1
                # A rank that never came leaves no number behind, instead of a device that spins for ever.
                word = tl.where(missing != 0, 0x7FC07FC0, (got & 0xFFFFFFFF).to(tl.int32))
            low += (word << 16).to(tl.float32, bitcast=True)
            high += (word & -65536).to(tl.float32, bitcast=True)
        low_bits = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        high_bits = high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16
        tl.store(out_ptr + offsets, low_bits | high_bits, mask=mask)


def push_sum(partial: Tensor, *, buffer: Tensor, pointers: Tensor, epoch: Tensor, sum_index: int, rank: int) -> Tensor:
    """Add a tensor up over ranks by writing it to all of them.

    Args:
        partial: bfloat16, an even number of elements.
        buffer: (slots, ranks, words), int64, symmetric; this rank's.
        pointers: (ranks,), int64: addresses of every rank's buffer.
        epoch: number of the step, int32, a scalar on the device.
        sum_index: number of the sum within the step, below 1024.
        rank: this rank.

    Returns:
        The sum, shaped as ``partial``; the same bits on every rank.
    """
    out = torch.empty_like(partial)
    num_words = partial.numel() // 2
    block = 256 if num_words <= 4096 else 1024
    _push_sum_kernel[(triton.cdiv(num_words, block),)](
        partial.view(-1).view(torch.int32),
        out.view(-1).view(torch.int32),
        buffer,
        pointers,
        epoch,
        sum_index,
        num_words,
        buffer.shape[2],
        RANK=rank,
        NUM_RANKS=len(pointers),
        MAX_POLLS=_MAX_POLLS,
        BLOCK=block,
        num_warps=4,
        **dependent_launch(),
    )
    return out
