"""What training takes of a device's memory, and what would fit."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lpsearch.errors import LpsearchError
from lpsearch.models.memory import find_free_bytes

__all__ = ["check_memory", "choose_micro_batch", "describe_exhaustion", "estimate_state_bytes"]

BYTES_PER_TRAINED = 4 + 4 + 8
"""A float32 master, its gradient, and AdamW's two averages."""

_BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
_USED_SHARE = 0.85
"""Of the free memory, so much is planned with: the allocator cannot use every hole."""


def estimate_state_bytes(num_trained: int) -> int:
    """Estimate the bytes that training takes above the loaded model, without what a batch takes.

    Args:
        num_trained: values that are trained.
    """
    return num_trained * BYTES_PER_TRAINED


def check_memory(device: torch.device, *, num_trained: int, num_grouped: int, uses_lora: bool) -> None:
    """Refuse to train what cannot fit on a device, before anything is allocated.

    Args:
        device: with the model on it.
        num_trained: values to train.
        num_grouped: values that ``--train grouped`` would train.
        uses_lora: whether adapters are what is trained.

    Raises:
        LpsearchError: saying what would fit.
    """
    needed, free = estimate_state_bytes(num_trained), find_free_bytes(device)
    if needed <= free:
        return
    grouped = estimate_state_bytes(num_grouped)
    advice = [f"--train grouped takes {_gib(grouped)}"] if num_grouped < num_trained and grouped <= free else []
    advice += ["a smaller --lora rank"] if uses_lora else ["--lora 16 takes little above the model itself"]
    raise LpsearchError(
        f"{device} has {_gib(free)} free, and training {num_trained:,} values takes {_gib(needed)} (float32 weights, "
        f"gradients and AdamW's averages) before any batch; {', '.join(advice)}, or use a larger device"
    )


def choose_micro_batch(
    device: torch.device, *, seq_len: int, num_windows: int, num_trained: int, run: Callable[[int], None]
) -> int:
    """Choose how many windows go through the model at once.

    On a GPU, a forward and backward pass of one and of two windows are run, and what the second window took decides.

    Args:
        device: where the model is.
        seq_len: tokens in a window.
        num_windows: most windows that are of use, those of a step.
        num_trained: values that are trained; their gradients and averages are still to come.
        run: runs forward and backward on so many windows, and leaves nothing behind.
    """
    most = max(1, min(num_windows, _BATCH_TOKENS.get(device.type, _BATCH_TOKENS["cpu"]) // seq_len))
    if device.type != "cuda" or most == 1:
        return most
    peaks = []
    for count in (1, 1, 2):  # the first warms up
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(count)
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    a_window = max(peaks[2] - peaks[1], peaks[2] // 4, 1)
    still_to_come = estimate_state_bytes(num_trained) - 4 * num_trained
    room = _USED_SHARE * find_free_bytes(device) - still_to_come - (peaks[1] - a_window)
    return max(1, min(most, int(room // a_window)))


def describe_exhaustion(
    device: torch.device, message: str, *, micro_batch: int, seq_len: int, options: set[str]
) -> str:
    """Say what to do when a device ran out of memory during training.

    Args:
        device: the device.
        message: the library's.
        micro_batch: windows that went through at once.
        seq_len: tokens in a window.
        options: of ``checkpointing``, ``grouped`` and ``lora``, those that are in use.
    """
    advice = [f"--micro-batch {micro_batch // 2}"] if micro_batch > 1 else [f"--seq-len {seq_len // 2}"]
    advice += ["--checkpointing"] if "checkpointing" not in options else []
    advice += ["--train grouped"] if not options & {"grouped", "lora"} else []
    advice += ["--lora 16"] if "lora" not in options else []
    return (
        f"{device} ran out of memory on {micro_batch} windows of {seq_len} tokens at once ({message}); try "
        f"{', '.join(advice)}, or use a larger device"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
