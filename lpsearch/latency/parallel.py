"""Tensor-parallel ranks: their all-reduce, and how a function is started on each of them.

Every rank holds a part of every head group and of every MLP; the partial outputs are added up over ranks, once for
attention and once for the MLP of a group. NVLink multicast is never used.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import socket
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lpsearch.errors import ConfigError, LpsearchError

__all__ = [
    "AllReduceKind",
    "EmulatedRanks",
    "GroupRanks",
    "OneRank",
    "Ranks",
    "get_torchrun_size",
    "join_ranks",
    "run_ranks",
]

AllReduceKind = Literal["none", "gloo", "nccl", "one_shot", "push"]

_TIMEOUT_S = 600


class Ranks(Protocol):
    """What the runtime needs of the ranks that share a model.

    Attributes:
        rank: this one.
        num_ranks: how many.
        kind: how sums are made.
    """

    rank: int
    num_ranks: int
    kind: AllReduceKind

    def begin_step(self) -> None:
        """Say that a forward begins; every rank makes the same sums in the same order."""

    def all_reduce(self, partial: Tensor) -> Tensor:
        """Return the sum of a tensor over ranks; the argument may be overwritten."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, (num_ranks, ...)."""

    def barrier(self) -> None:
        """Wait for all ranks."""


class OneRank:
    """A model on one device."""

    rank: int = 0
    num_ranks: int = 1
    kind: AllReduceKind = "none"

    def begin_step(self) -> None:
        """Do nothing."""

    def all_reduce(self, partial: Tensor) -> Tensor:
        """Return the tensor."""
        return partial

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensor, (1, ...)."""
        return tensor[None]

    def barrier(self) -> None:
        """Do nothing."""


class EmulatedRanks(OneRank):
    """One rank of several that are not there: its share of the work, without any sums."""

    def __init__(self, num_ranks: int) -> None:
        """Stand for the first of so many ranks."""
        self.num_ranks = num_ranks

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensor once for every rank."""
        return tensor.expand(self.num_ranks, *tensor.shape)


class GroupRanks:
    """The ranks of a process group of torch.distributed, by its own all-reduce (NCCL or gloo)."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Wrap a process group."""
        self._group = group
        self.rank = dist.get_rank(group)
        self.num_ranks = dist.get_world_size(group)
        self.kind: AllReduceKind = "nccl" if dist.get_backend(group) == "nccl" else "gloo"

    def begin_step(self) -> None:
        """Do nothing."""

    def all_reduce(self, partial: Tensor) -> Tensor:
        """Sum over ranks, in place."""
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


def get_torchrun_size() -> int | None:
    """Return how many ranks ``torchrun`` started, this process among them; None if it did not."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def join_ranks(backend: str) -> dist.ProcessGroup:
    """Join the process group that the environment describes, as ``torchrun`` and :func:`run_ranks` set it.

    Args:
        backend: ``nccl`` or ``gloo``.
    """
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group(backend, device_id=device)
    else:
        dist.init_process_group(backend)
    group = dist.group.WORLD
    assert group is not None
    return group


def run_ranks(
    function: Callable[..., Any],
    *,
    num_ranks: int,
    backend: str,
    arguments: Sequence[Any] = (),
    on_progress: Callable[[float], None] | None = None,
) -> Any:
    """Run ``function(group, *arguments)`` on so many new processes, and return what the first one returns.

    Args:
        function: importable by name.
        num_ranks: processes to start.
        backend: ``nccl``, one GPU a rank, or ``gloo``.
        arguments: what to pass; picklable, as what comes back, and without tensors, whose memory ends with a rank.
        on_progress: if given, the function also gets the keyword ``on_progress`` to call with the share done; what the
            first rank says is passed on.

    Raises:
        ConfigError: for more ranks than GPUs.
        LpsearchError: if a rank fails: its message; all others are ended.
    """
    if backend == "nccl" and num_ranks > torch.cuda.device_count():
        raise ConfigError(
            f"{num_ranks} ranks need {num_ranks} GPUs, and {torch.cuda.device_count()} are here; "
            "choose a smaller --tp, or --emulate-tp to estimate from one GPU"
        )
    context = torch.multiprocessing.get_context("spawn")
    port = _find_free_port()
    connections, processes = [], []
    for rank in range(num_ranks):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_run_rank,
            args=(sender, function, tuple(arguments), rank, num_ranks, backend, port, on_progress is not None),
            daemon=True,
        )
        process.start()
        sender.close()
        connections.append(receiver)
        processes.append(process)
    try:
        return _collect(connections, processes, on_progress)
    finally:
        for process in processes:
            process.join(timeout=0 if process.is_alive() and any(p.exitcode for p in processes) else 10)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(connections: list[Any], processes: list[Any], on_progress: Callable[[float], None] | None) -> Any:
    """Return the first rank's result once all have reported; raise the message of the first to fail."""
    results: dict[int, Any] = {}
    while len(results) < len(connections):
        waiting = [c for rank, c in enumerate(connections) if rank not in results]
        for ready in multiprocessing.connection.wait(waiting):
            rank = next(index for index, c in enumerate(connections) if c is ready)
            try:
                kind, value = connections[rank].recv()
            except EOFError:
                processes[rank].join(timeout=10)
                kind, value = "failure", f"ended without a word, exit code {processes[rank].exitcode}"
            if kind == "progress":
                if on_progress is not None:
                    on_progress(value)
                continue
            if kind == "failure":
                for process in processes:
                    process.kill()
                raise (
                    value
                    if isinstance(value, LpsearchError)
                    else LpsearchError(f"rank {rank} of {len(connections)} failed: {value}")
                )
            results[rank] = value
    return results[0]


def _run_rank(
    sender: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    rank: int,
    num_ranks: int,
    backend: str,
    port: int,
    with_progress: bool,
) -> None:
    """Run one rank in its own process and report how it went: pairs of what is said and its value."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
    }
    torch.set_num_threads(max(1, torch.get_num_threads() // num_ranks))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        group = join_ranks(backend)
        options = {"on_progress": lambda share: sender.send(("progress", share)) if rank == 0 else None}
        result = function(group, *arguments, **(options if with_progress else {}))
        sender.send(("result", result if rank == 0 else None))
        dist.destroy_process_group()
    except LpsearchError as error:
        sender.send(("failure", error))
        raise SystemExit(1) from None
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        sender.send(("failure", f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"))
        raise SystemExit(1) from None


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, however it ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
