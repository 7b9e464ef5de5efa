"""Starting a function on ranks: new processes on this host, or those that ``torchrun`` started."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import socket
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from lpsearch.errors import ConfigError, LpsearchError

__all__ = ["get_torchrun_size", "join_ranks", "run_ranks"]


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
