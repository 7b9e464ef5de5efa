"""All-reduces over symmetric memory, for the few kilobytes that a decode step adds up.

Each rank can write into a buffer of every other. ``one_shot`` is torch's own kernel: wait for all, read all, add up.
``push`` (:mod:`lpsearch.latency.ranks.push`) writes each 32-bit word to the other ranks together with the number of its
sum, and needs no barrier. Neither uses NVLink multicast.
"""

from __future__ import annotations

import logging
import statistics
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lpsearch.latency.ranks.parallel import ProcessGroupRanks
from lpsearch.latency.ranks.push import push_sum
from lpsearch.latency.runtime.graphs import capture_graph
from lpsearch.latency.sums import AllReduceKind, Ranks

__all__ = ["SymmetricRanks", "choose_ranks", "measure_all_reduce_ms"]

logger = logging.getLogger(__name__)

_MAX_ELEMENTS = 1 << 17
_NUM_SLOTS = 4
_SUMS_PER_GRAPH = 64
_CHECKED_SUMS = 5
_CHECKED_REPLAYS = 4
_ROUNDING = 2**-7
_REPEATS = 20


class SymmetricRanks(ProcessGroupRanks):
    """Ranks on one host whose small bfloat16 sums go over symmetric memory, all others over NCCL.

    A slot of the ``push`` buffer is written again only two sums later. By then every rank has finished the sum between,
    which needed what this rank sent after it had read the slot.

    All ranks construct this together, since they share a buffer.

    Args:
        group: an NCCL process group of ranks that reach each other's memory.
        kind: ``one_shot`` or ``push``.
    """

    def __init__(self, group: dist.ProcessGroup, kind: AllReduceKind) -> None:
        super().__init__(group)
        import torch.distributed._symmetric_memory as symmetric_memory

        self.kind = kind
        device = torch.device("cuda", torch.cuda.current_device())
        self._name = group.group_name
        empty: Any = symmetric_memory.empty
        if kind == "one_shot":
            self._buffer = empty(_MAX_ELEMENTS, dtype=torch.bfloat16, device=device)
        else:
            # One word is two elements; each slot has a part for every rank that writes.
            self._buffer = empty((_NUM_SLOTS, self.num_ranks, _MAX_ELEMENTS // 2), dtype=torch.int64, device=device)
            self._buffer.zero_()
        self._handle = symmetric_memory.rendezvous(self._buffer, group)
        self._pointers = torch.tensor(self._handle.buffer_ptrs, dtype=torch.int64, device=device)
        self._epoch = torch.zeros((), dtype=torch.int32, device=device)
        self._num_sums = 0
        self.barrier()

    def begin_step(self) -> None:
        """Count the step on the device, so that a replayed graph counts too."""
        if self.kind == "push":
            self._epoch += 1
            self._num_sums = 0

    def all_reduce(self, partial: Tensor) -> Tensor:
        """Sum over ranks."""
        if partial.dtype != torch.bfloat16 or partial.numel() > _MAX_ELEMENTS or partial.numel() % 8:
            return super().all_reduce(partial)
        partial = partial.contiguous()  # both kinds below read memory in order
        if self.kind == "one_shot":
            buffer = self._buffer[: partial.numel()].view(partial.shape)
            summed: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(buffer, partial, "sum", self._name)
            return summed
        summed = push_sum(
            partial,
            buffer=self._buffer,
            pointers=self._pointers,
            epoch=self._epoch,
            sum_index=self._num_sums,
            rank=self.rank,
        )
        self._num_sums += 1
        return summed


def measure_all_reduce_ms(ranks: Ranks, *, num_elements: int) -> float:
    """Return the time of one sum of bfloat16 elements among many in a captured graph, on the slowest rank."""
    data = torch.ones(num_elements, dtype=torch.bfloat16, device="cuda")

    def run() -> None:
        ranks.begin_step()
        for _ in range(_SUMS_PER_GRAPH):
            ranks.all_reduce(data.clone())

    graph = capture_graph(run)
    times = []
    for _ in range(_REPEATS):
        ranks.barrier()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / _SUMS_PER_GRAPH)
    return float(ranks.all_gather(torch.tensor([statistics.median(times)], device="cuda")).max())


def choose_ranks(group: dist.ProcessGroup, *, num_elements: int) -> tuple[ProcessGroupRanks, dict[str, float]]:
    """Choose how a group of ranks adds up, by measurement.

    Args:
        group: an NCCL or gloo process group; gloo leaves no choice.
        num_elements: bfloat16 elements of the sums.

    Returns:
        The ranks, and the time of one sum in us of each kind that was tried, the choice the fastest.
    """
    plain = ProcessGroupRanks(group)
    if plain.kind == "gloo":
        return plain, {}
    candidates: dict[str, ProcessGroupRanks] = {"nccl": plain}
    if num_elements <= _MAX_ELEMENTS and _reach_each_other(plain):
        kinds: tuple[AllReduceKind, ...] = ("one_shot", "push")
        candidates |= {kind: SymmetricRanks(group, kind) for kind in kinds}
    for kind in [kind for kind in candidates if kind != "nccl" and not _agrees(candidates[kind], plain, num_elements)]:
        logger.warning("%s gives sums on these GPUs that NCCL does not; it is not used", kind)
        del candidates[kind]
    times = {kind: 1e3 * measure_all_reduce_ms(ranks, num_elements=num_elements) for kind, ranks in candidates.items()}
    return candidates[min(times, key=lambda kind: times[kind])], times


def _agrees(ranks: ProcessGroupRanks, plain: ProcessGroupRanks, num_elements: int) -> bool:
    """Tell whether sums in a graph that is replayed are NCCL's but for rounding, on every rank."""
    generator = torch.Generator().manual_seed(ranks.rank)
    data = torch.randn((_CHECKED_SUMS, num_elements), generator=generator).to("cuda", torch.bfloat16)
    found = torch.zeros_like(data)

    def run() -> None:
        ranks.begin_step()
        for index in range(_CHECKED_SUMS):
            found[index].copy_(ranks.all_reduce(data[index].clone()))

    graph = capture_graph(run)
    agree = True
    for _ in range(_CHECKED_REPLAYS):
        data.mul_(-1)  # so that what an earlier replay left behind is wrong
        ranks.barrier()
        graph.replay()
        expected = plain.all_reduce(data.float())
        error = (found.float() - expected).abs().max() / expected.abs().max()
        agree = agree and bool(error < _ROUNDING)
    return bool(plain.all_gather(torch.tensor([float(agree)], device="cuda")).min() > 0)


def _reach_each_other(ranks: ProcessGroupRanks) -> bool:
    """Tell whether every rank's GPU is on this host and can read the others' memory."""
    mine = torch.cuda.current_device()
    others = [index for index in range(ranks.num_ranks) if index != mine]
    reach = ranks.num_ranks <= torch.cuda.device_count() and all(
        torch.cuda.can_device_access_peer(mine, index) for index in others
    )
    return bool(ranks.all_gather(torch.tensor([float(reach)], device="cuda")).min() > 0)
