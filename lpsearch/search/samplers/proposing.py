"""What the proposers behind ``pairset`` share: the scan, the front as far as known, its expected fall, the draws."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from lpsearch.search.samplers.evaluated import WORST_DELTA_NATS

__all__ = [
    "CANDIDATES_PER_LEVEL",
    "INCUMBENTS_PER_LEVEL",
    "NUM_DRAWS",
    "build_rng",
    "compute_expected_improvement",
    "estimate_front",
    "find_least_by_level",
    "order_coarse_to_fine",
    "shorten_scan",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

FULL_SCAN_SHARE = 0.75
"""Largest share of the budget that a scan may take; a longer one is thinned to half of the budget."""

EVALUATIONS_PER_CHOICE = 4
"""The budget that is assumed where none is known."""

NUM_DRAWS = 4
"""Draws from the surrogate whose minimisers are candidates."""

INCUMBENTS_PER_LEVEL = 2
"""Best plans of a level whose neighbours are candidates."""

CANDIDATES_PER_LEVEL = 16
"""Candidates of least mean of a level whose expected improvement is computed."""


def order_coarse_to_fine(joins: Sequence[int]) -> tuple[int, ...]:
    """Return the joins so that every beginning is spread evenly: by halving strides."""
    order: dict[int, None] = {}
    stride = 1 << max(len(joins) - 1, 0).bit_length()
    while stride:
        order.update(dict.fromkeys(joins[::stride]))
        stride //= 2
    return tuple(order)


def shorten_scan(scan: Sequence[int], budget: int | None) -> tuple[tuple[int, ...], int]:
    """Thin a scan to what a budget has room for.

    Args:
        scan: what to evaluate alone, in its order.
        budget: evaluations of the whole study, the baseline included; None when unknown.

    Returns:
        The beginning of the scan, and the budget.
    """
    budget = EVALUATIONS_PER_CHOICE * (len(scan) + 1) if budget is None else budget
    if len(scan) + 1 > FULL_SCAN_SHARE * budget:
        scan = scan[: max(1, budget // 2)]
    return tuple(scan), budget


def estimate_front(
    num_levels: int, evaluated: tuple[IntArray, FloatArray], pending: tuple[IntArray, FloatArray]
) -> FloatArray:
    """Return (num_levels + 1,): the least loss of plans that save at least as much as each level.

    Args:
        num_levels: levels but for the lowest, that of the baseline.
        evaluated: levels and losses of the finished plans.
        pending: levels, and losses that are expected, of those that are being evaluated.
    """
    front = np.full(num_levels + 1, WORST_DELTA_NATS)
    front[0] = 0.0
    for levels, losses in (evaluated, pending):
        np.minimum.at(front, levels, losses)
    return np.minimum.accumulate(front[::-1])[::-1]


def compute_expected_improvement(
    mean: FloatArray, deviation: FloatArray, levels: IntArray, *, front: FloatArray, weights: FloatArray
) -> FloatArray:
    """Return (plans,): the expected fall of the weighted front; a plan bears on its level and those below.

    This is the expected improvement of Jones, Schonlau and Welch (Efficient Global Optimization, 1998, equation 15),
    summed over the levels that a plan reaches.
    """
    fall = front[None, :] - mean[:, None]
    standard = fall / deviation[:, None]
    gain = fall * ndtr(standard) + deviation[:, None] * np.exp(-0.5 * standard**2) / np.sqrt(2 * np.pi)
    bears = (np.arange(len(front)) > 0) & (np.arange(len(front)) <= levels[:, None])
    return np.asarray((gain * bears) @ weights)


def find_least_by_level(values: FloatArray, levels: IntArray, per_level: int) -> IntArray:
    """Return the indices of the least few values of every level."""
    order = np.lexsort((values, levels))
    rank = np.arange(len(order)) - np.searchsorted(levels[order], levels[order])
    return order[rank < per_level]


def build_rng(seed: int, taken: Collection[tuple[int, ...]]) -> np.random.Generator:
    """Return a generator that depends on a seed and on which plans are taken, in no order."""
    digest = hashlib.sha256(json.dumps([seed, sorted(taken)]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))
