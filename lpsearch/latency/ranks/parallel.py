"""Ranks that share a model by tensor parallelism: those of a process group, and one that stands for all.

Every rank holds a part of every head group and of every MLP (Shoeybi et al., "Megatron-LM", arXiv 1909.08053); the
partial outputs are added up over ranks, once for attention and once for the MLP of a group. NVLink multicast is never
used.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lpsearch.latency.sums import AllReduceKind, OneRank

__all__ = ["EmulatedRanks", "ProcessGroupRanks"]


class EmulatedRanks(OneRank):
    """One rank of several that are not there: its share of the work, without any sums."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensor once for every rank."""
        return tensor.expand(self.num_ranks, *tensor.shape)


class ProcessGroupRanks:
    """The ranks of a process group of torch.distributed, by its own all-reduce (NCCL or gloo)."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.num_ranks = dist.get_world_size(group)
        self.kind: AllReduceKind = "nccl" if dist.get_backend(group) == "nccl" else "gloo"

    def begin_step(self) -> None:
        """Do nothing."""

    def all_reduce(self, partial: Tensor) -> Tensor:
        """Sum over ranks, in place if the tensor is contiguous; a process group takes no other."""
        partial = partial.contiguous()
        dist.all_reduce(partial, group=self._group)
        return partial

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Gather from all ranks."""
        gathered = tensor.new_empty((self.num_ranks, *tensor.shape))
        dist.all_gather(list(gathered.unbind(0)), tensor.contiguous(), group=self._group)
        return gathered

    def barrier(self) -> None:
        """Wait for all ranks, and for the device."""
        if self.kind == "nccl":
            torch.cuda.synchronize()
        dist.barrier(group=self._group)
