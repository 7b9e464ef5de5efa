"""Timing several steps fairly: interleaved in one process, in blocks, on the slowest rank.

Steps run in the order ABBA, so that a drift of the machine's speed meets all of them alike, and ratios come from the
same rounds. Before each block its step runs once untimed, since a model that is served follows itself too. Otherwise
the first and the last step alone would do so, every second round: small models in llama.cpp were 20 % faster there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from lpsearch.latency.sums import OneRank, Ranks

__all__ = ["StepTiming", "bootstrap_ratio", "measure_interleaved"]

WARM_UP_S = 0.5
MIN_BLOCKS = 30
_MAX_BLOCKS = 300
_BLOCK_S = 0.01
_MAX_STEPS_PER_BLOCK = 10
_MAX_WARM_UPS = 500
_RESAMPLES = 1000


@dataclass(frozen=True)
class StepTiming:
    """Times of one step, a mean over the block's steps for each block.

    Attributes:
        blocks_ms: (blocks,), of the slowest rank.
    """

    blocks_ms: NDArray[np.float64]

    @property
    def median_ms(self) -> float:
        """Median over blocks."""
        return float(np.median(self.blocks_ms))

    @property
    def p10_ms(self) -> float:
        """10th percentile over blocks."""
        return float(np.percentile(self.blocks_ms, 10))

    @property
    def p90_ms(self) -> float:
        """90th percentile over blocks."""
        return float(np.percentile(self.blocks_ms, 90))


def measure_interleaved(
    steps: Sequence[Callable[[], object]],
    *,
    device: torch.device,
    ranks: Ranks | None = None,
    budget_s: float = 10.0,
    min_blocks: int = MIN_BLOCKS,
    warm_up_s: float = WARM_UP_S,
    are_clocked: bool = False,
    on_progress: Callable[[float], None] | None = None,
) -> list[StepTiming]:
    """Time steps in blocks: each round runs one block of every step, forwards in one round and backwards in the next.

    Args:
        steps: what to time; each leaves the device as it found it. All ranks pass the same.
        device: CUDA steps are timed by events, others by the clock.
        ranks: wait for each other before each block; the slowest counts.
        budget_s: about how long the blocks take; at least ``min_blocks`` are run.
        min_blocks: least number of blocks of each step.
        warm_up_s: how long all steps run first.
        are_clocked: whether steps time themselves, and a block is what one call returns, in milliseconds.
        on_progress: called with the share done.
    """
    ranks = ranks or OneRank()
    lengths = [_warm_up(step, device, ranks, warm_up_s / len(steps)) for step in steps]
    most = 1 if are_clocked else _MAX_STEPS_PER_BLOCK
    counts = [int(min(most, max(1, round(_BLOCK_S * 1e3 / length)))) for length in lengths]
    round_ms = sum((count + 1) * length for count, length in zip(counts, lengths, strict=True))
    num_blocks = int(min(_MAX_BLOCKS, max(min_blocks, budget_s * 1e3 / round_ms)))
    times = np.empty((len(steps), num_blocks))
    for block in range(num_blocks):
        order = range(len(steps)) if block % 2 == 0 else reversed(range(len(steps)))
        for index in order:
            ranks.barrier()
            step, count = steps[index], counts[index]
            step()
            times[index, block] = float(cast("float", step())) if are_clocked else _time_ms(step, device, count)
        if on_progress is not None:
            on_progress((block + 1) / num_blocks)
    slowest = ranks.all_gather(torch.tensor(times, dtype=torch.float32, device=device)).amax(0)
    return [StepTiming(row.astype(np.float64)) for row in slowest.cpu().numpy()]


def bootstrap_ratio(first: StepTiming, second: StepTiming, *, seed: int = 0) -> tuple[float, float, float]:
    """Return the ratio of two steps' medians and its 95 % bootstrap interval (Efron 1979), resampling rounds.

    Args:
        first: the numerator, e.g. the baseline.
        second: the denominator, timed in the same rounds.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(first.blocks_ms), size=(_RESAMPLES, len(first.blocks_ms)))
    ratios = np.median(first.blocks_ms[rows], axis=1) / np.median(second.blocks_ms[rows], axis=1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return first.median_ms / second.median_ms, float(low), float(high)


def _warm_up(step: Callable[[], object], device: torch.device, ranks: Ranks, seconds: float) -> float:
    """Run a step for about so long, equally often on every rank, and return its time in ms on the slowest."""
    step()  # which may compile
    ranks.barrier()
    mine = torch.tensor([_time_ms(step, device, 1)], dtype=torch.float32, device=device)
    length = float(ranks.all_gather(mine).max())
    for _ in range(int(min(_MAX_WARM_UPS, seconds * 1e3 / length))):
        step()
    ranks.barrier()
    mine = torch.tensor([_time_ms(step, device, 1)], dtype=torch.float32, device=device)
    return float(ranks.all_gather(mine).max())


def _time_ms(step: Callable[[], object], device: torch.device, count: int) -> float:
    """Return the mean time of so many steps in a row."""
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(count):
            step()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / count
    began = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - began) * 1e3 / count
