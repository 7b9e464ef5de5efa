"""Levels of plans that save about as much: by the number of joins, or by the time that a latency model promises.

Where layers are alike, time is a function of the groups' sizes; where they differ (sliding and full attention, dense
and sparse), joins save unlike times, and comparing plans with as many joins would pass over the ones worth having.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lpsearch.plan import Plan
from lpsearch.search.samplers.dynamic_program import solve_dynamic_program
from lpsearch.search.space import PlanSpace

__all__ = ["SavingLevels", "build_levels"]

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

MAX_UNITS = 8
"""Most units that a level is cut into for the dynamic program, which counts in whole units."""

ROUNDING = 1e-6
"""Part of a level that a plan may lack because of rounding."""


@dataclass(frozen=True)
class SavingLevels:
    """Sorts plans by what they save: level s holds those that save s to s + 1 times what one level is wide.

    Attributes:
        group_savings: (max_group - 1, num_joins) what the group of m + 2 layers from layer i on saves, in levels.
        group_units: the same in whole units, rounded.
        units: units in a level.
        num_levels: the number of levels but for the lowest, that of the baseline.
    """

    group_savings: FloatArray
    group_units: IntArray
    units: int
    num_levels: int

    def classify(self, joined: BoolArray) -> IntArray:
        """Return the (plans,) levels of (plans, num_joins) plans."""
        if self._counts_joins:
            return np.asarray(joined.sum(axis=1, dtype=np.int64))
        saving = np.zeros(len(joined))
        run = np.zeros(len(joined), dtype=np.int64)  # joins of the open group
        for join in range(joined.shape[1]):
            is_set = joined[:, join]
            start = join - run
            extended = np.minimum(run, len(self.group_savings) - 1)
            step = self.group_savings[extended, start] - np.where(run > 0, self.group_savings[extended - 1, start], 0.0)
            saving += np.where(is_set, step, 0.0)
            run = np.where(is_set, run + 1, 0)
        return np.clip(np.floor(saving + ROUNDING).astype(np.int64), 0, self.num_levels)

    @cached_property
    def _counts_joins(self) -> bool:
        """Whether every join saves one level, so that a plan's level is its number of joins."""
        sizes = np.arange(1.0, len(self.group_savings) + 1)
        return bool((self.group_savings == sizes[:, None]).all())


def build_levels(space: PlanSpace, estimate_latency_ms: Callable[[Plan], float] | None = None) -> SavingLevels:
    """Lay levels over a space: as many as a plan can have joins, the uppermost for the most that any plan saves.

    Where every join saves the same, a plan's level is its number of joins.

    Args:
        space: the plans.
        estimate_latency_ms: latency of a plan in ms, additive over its groups; None counts joins.
    """
    sizes, num_joins = space.max_group - 1, space.num_layers - 1
    by_count = np.repeat(np.arange(1.0, sizes + 1)[:, None], num_joins, axis=1)
    savings = by_count
    if estimate_latency_ms is not None and space.max_choices:
        savings = _estimate_group_savings_ms(space, estimate_latency_ms)
        most_ms = _find_largest_saving(space, savings)
        if most_ms > 0:
            savings = savings * (space.max_choices / most_ms)
        else:
            logger.warning("no plan is estimated to be faster than the unmodified model; the search goes by depth")
            savings = by_count
    units = min(range(1, MAX_UNITS + 1), key=lambda units: _measure_rounding(savings, units))
    return SavingLevels(savings, np.rint(savings * units).astype(np.int64), units, space.max_choices)


def _estimate_group_savings_ms(space: PlanSpace, estimate_latency_ms: Callable[[Plan], float]) -> FloatArray:
    """Return (max_group - 1, num_joins) times that each group alone saves; zero for groups outside the space."""
    savings = np.zeros((space.max_group - 1, space.num_layers - 1))
    base_ms = estimate_latency_ms(Plan.baseline(space.num_layers))
    free = set(space.free_joins)
    for row, first in np.ndindex(savings.shape):
        joins = range(first, first + row + 1)
        if free.issuperset(joins):
            savings[row, first] = base_ms - estimate_latency_ms(Plan.from_joins(space.num_layers, joins))
    return savings


def _find_largest_saving(space: PlanSpace, savings: FloatArray) -> float:
    result = solve_dynamic_program(-savings[None], free_joins=space.free_joins, max_saving=space.max_choices)
    return -float(result.cost.min())


def _measure_rounding(savings: FloatArray, units: int) -> float:
    """Return the largest error of a group's saving in whole units, in levels, but for differences that do not count."""
    error = np.abs(np.rint(savings * units) / units - savings).max(initial=0.0)
    return float(error) if error > ROUNDING else 0.0
