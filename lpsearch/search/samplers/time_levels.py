"""Levels of plans of a space with drops: what each group saves, on a grid of time saved, and the cheapest plan of each.

An attention, an MLP and a join save unlike times, so plans are compared by time. The dynamic program goes from group to
group (Bellman's recursion over layers). Its state is what later costs depend on: which branches the last layer keeps,
whether it was joined to the one before, and the time saved, in whole units.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray

from lpsearch.plan import Group, Plan
from lpsearch.search.samplers.dynamic_program import PlanCosts
from lpsearch.search.space import PlanSpace

__all__ = ["TimeLevels"]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

UNITS = 8
"""Whole units of saving that a level is cut into where there is one a layer."""

LEAST_LEVELS = 8
"""Fewest levels in the useful range."""

MAX_OPTIONS = 1 << 12
"""More groups than may begin at a layer; a place in one whole number is kept for them."""

ROUNDING = 1e-6
"""Part of a level that a plan may lack because of rounding."""

SAVING_TOLERANCE = 0.05
"""Part of a level that a choice may save less than the one that it is exchanged for."""

DEEP_WEIGHT = 0.01
"""Weight in the front of levels above the useful range, whose losses are many times larger."""

DEEP_AFTER = 4
"""Evaluations a choice after which these have ``LATE_DEEP_WEIGHT``."""

LATE_DEEP_WEIGHT = 0.2

_STATES = np.array(list(product((False, True), repeat=3)))
"""(states, 3) whether the last join is made, and the attention and the MLP of the last layer are dropped."""


@dataclass(frozen=True)
class _Option:
    """A group that may begin at a layer: its layers' number, its choices, its saving, and the state it leads to."""

    group: Group
    places: IntArray
    saving: float
    units: int
    state: int


class TimeLevels:
    """Sorts the plans of a space by the time that they save: level s holds those that save s to s + 1 widths.

    The useful range, a third of the most that any plan saves, has ``levels_per_layer`` times as many levels as there
    are free layers. Above it they go on to half of the most; what saves more counts as the last.

    Args:
        space: the plans.
        estimate_latency_ms: of a plan, additive over its groups; None takes its depth.
        levels_per_layer: 1, 2, 4 or 8.

    Attributes:
        num_levels: the number of levels but for the lowest, that of the baseline.
        useful_level: the last level of the useful range.
        single_savings: (choices,) what each choice alone saves, in levels; 0 for choices of frozen layers.
        exchangeable: (leaving, entering) choices of which the second alone saves about as much as the first, or more.
    """

    def __init__(
        self,
        space: PlanSpace,
        estimate_latency_ms: Callable[[Plan], float] | None = None,
        *,
        levels_per_layer: int = 1,
    ) -> None:
        self._space = space
        self._units = UNITS // levels_per_layer
        estimate = estimate_latency_ms if estimate_latency_ms is not None else (lambda plan: float(plan.depth))
        self.useful_level = max(LEAST_LEVELS, levels_per_layer * (space.num_layers - len(space.frozen_layers)))
        self.num_levels = math.ceil(1.5 * self.useful_level)
        savings_ms = [[self._measure_saving(group, estimate) for group in row] for row in self._list_groups()]
        most = [0.0] * (space.num_layers + 1)
        for first in reversed(range(space.num_layers)):
            groups = space.list_groups(first)
            most[first] = max(
                saving + most[first + len(group)] for group, saving in zip(groups, savings_ms[first], strict=True)
            )
        self._width_ms = most[0] / 3 / self.useful_level if most[0] > 0 else 1.0
        self._options = [
            [self._build_option(group, saving / self._width_ms) for group, saving in zip(row, savings, strict=True)]
            for row, savings in zip(self._list_groups(), savings_ms, strict=True)
        ]
        self._saving_of = {option.group: option.saving for row in self._options for option in row}
        self.single_savings = np.zeros(len(space.choices))
        for option in (option for row in self._options for option in row):
            if len(option.places) == 1:
                self.single_savings[option.places] = option.saving
        self.exchangeable: BoolArray = self.single_savings[None, :] >= self.single_savings[:, None] - SAVING_TOLERANCE

    def weigh(self, front: FloatArray, *, num_evaluated: int) -> FloatArray:
        """Return the (num_levels + 1,) weights of the levels in the front; those of deep levels rise late."""
        is_late = num_evaluated >= DEEP_AFTER * len(self._space.choices)
        deep_weight = LATE_DEEP_WEIGHT if is_late else DEEP_WEIGHT
        return np.where(np.arange(self.num_levels + 1) <= self.useful_level, 1.0, deep_weight)

    def find_level(self, plan: Plan) -> int:
        """Return the level of a plan of the space."""
        saving = sum(self._saving_of[group] for group in plan.groups)
        return min(max(math.floor(saving + ROUNDING), 0), self.num_levels)

    def classify(self, made: BoolArray) -> IntArray:
        """Return the (plans,) levels of (plans, choices) plans of the space."""
        num_layers = self._space.num_layers
        saving = np.zeros(len(made))
        start = np.zeros(len(made), dtype=np.int64)
        code = np.zeros(len(made), dtype=np.int64)
        for layer_idx in range(num_layers):
            join, attention, mlp = self._places[layer_idx]
            code = 4 * code + 2 * self._read(made, attention) + self._read(made, mlp)
            ends = ~self._read(made, join).astype(bool) if layer_idx < num_layers - 1 else np.ones(len(made), bool)
            rows = np.flatnonzero(ends)
            saving[rows] += self._table[layer_idx - start[rows], start[rows], code[rows]]
            start = np.where(ends, layer_idx + 1, start)
            code = np.where(ends, 0, code)
        return np.clip(np.floor(saving + ROUNDING).astype(np.int64), 0, self.num_levels)

    def solve(self, costs: PlanCosts) -> BoolArray:
        """Return (batch, num_levels, choices): the cheapest plan of each level from the first on.

        Products of choices of groups that are not neighbours are ignored. Where no plan saves so much, no choice is
        made.
        """
        num_layers, num_units = self._space.num_layers, (self.num_levels + 1) * self._units
        batch = len(costs.join_costs)
        best = np.full((num_layers + 1, batch, len(_STATES), num_units), np.inf)
        best[0, :, 0, 0] = 0.0
        came_by = np.zeros((num_layers + 1, batch, len(_STATES), num_units), dtype=np.int32)  # size, option, source
        for first, row in enumerate(self._options):
            reached = np.isfinite(best[first]).any(axis=(0, 2))
            for index, option in enumerate(row):
                places, units = option.places, option.units
                if not 0 <= units < num_units:
                    continue
                cost = costs.join_costs[:, places].sum(axis=1)
                cost = cost + 0.5 * costs.product_costs[:, places[:, None], places].sum(axis=(1, 2))
                sources = best[first] + (cost[:, None] + self._cross(costs, first, places))[:, :, None]
                sources[:, ~reached] = np.inf
                source = sources.argmin(axis=1)  # (batch, units)
                least = np.take_along_axis(sources, source[:, None], axis=1)[:, 0]
                after = best[first + len(option.group), :, option.state]
                better = least[:, : num_units - units] < after[:, units:]
                after[:, units:][better] = least[:, : num_units - units][better]
                noted = came_by[first + len(option.group), :, option.state]
                code = (len(option.group) * MAX_OPTIONS + index) * len(_STATES)
                noted[:, units:][better] = (code + source[:, : num_units - units])[better]
        return self._trace_back(best[-1], came_by)

    def count_plans(self) -> tuple[int, ...]:
        """Count the plans by level, by their savings in whole units; those that save more than the last are left out.

        :meth:`draw_plan` draws by these levels.
        """
        starts = range(0, (self.num_levels + 1) * self._units, self._units)
        return tuple(sum(self._counts[0][start : start + self._units]) for start in starts)

    def draw_plan(self, level: int, rng: random.Random) -> Plan:
        """Draw uniformly among the plans of a level of :meth:`count_plans` that is not empty."""
        weights = self._counts[0][level * self._units : (level + 1) * self._units]
        while True:
            rank = rng.randrange(sum(weights))
            offset = 0
            while rank >= weights[offset]:
                rank -= weights[offset]
                offset += 1
            plan = self._draw_exactly(level * self._units + offset, rng)
            if plan.num_dropped < 2 * plan.num_layers:
                return plan

    def find_drawn_level(self, plan: Plan) -> int | None:
        """Return the level of a plan as :meth:`count_plans` has it; None where it saves more than the last."""
        units = sum(self._units_of[group] for group in plan.groups)
        return units // self._units if units < (self.num_levels + 1) * self._units else None

    def iterate_level(self, level: int) -> Iterator[Plan]:
        """Yield every plan of a level of :meth:`count_plans`."""
        for units in range(level * self._units, (level + 1) * self._units):
            for groups in self._enumerate(0, units):
                yield Plan.from_groups(groups)

    # ---- Counting ----------------------------------------------------------------------------------------------------

    @cached_property
    def _units_of(self) -> dict[Group, int]:
        return {option.group: max(0, option.units) for row in self._options for option in row}

    @cached_property
    def _counts(self) -> list[list[int]]:
        """Entry [l][u]: how many ways the layers from l on can be grouped so that they save u units."""
        num_units = (self.num_levels + 1) * self._units
        counts = [np.zeros(num_units, dtype=object) for _ in range(self._space.num_layers + 1)]
        counts[-1][0] = 1
        for first in reversed(range(self._space.num_layers)):
            for option in self._options[first]:
                units = max(0, option.units)
                if units < num_units:
                    counts[first][units:] += counts[first + len(option.group)][: num_units - units]
        return [list(row) for row in counts]

    def _count(self, first: int, units: int) -> int:
        return self._counts[first][units] if units >= 0 else 0

    def _draw_exactly(self, units: int, rng: random.Random) -> Plan:
        groups: list[Group] = []
        first = 0
        while first < self._space.num_layers:
            rank = rng.randrange(self._count(first, units))
            for option in self._options[first]:
                saved = self._units_of[option.group]
                count = self._count(first + len(option.group), units - saved)
                if rank < count:
                    break
                rank -= count
            groups.append(option.group)
            first, units = first + len(option.group), units - saved
        return Plan.from_groups(groups)

    def _enumerate(self, first: int, units: int) -> Iterator[tuple[Group, ...]]:
        if first == self._space.num_layers:
            yield ()
            return
        for option in self._options[first]:
            left = units - self._units_of[option.group]
            if self._count(first + len(option.group), left):
                for rest in self._enumerate(first + len(option.group), left):
                    yield (option.group, *rest)

    # ---- Groups ------------------------------------------------------------------------------------------------------

    def _list_groups(self) -> list[tuple[Group, ...]]:
        return [self._space.list_groups(first) for first in range(self._space.num_layers)]

    def _measure_saving(self, group: Group, estimate: Callable[[Plan], float]) -> float:
        """Return what one group alone saves."""
        num_layers = self._space.num_layers
        layers = [[i] for i in range(num_layers)]
        plan = Plan.from_groups([*layers[: group[0]], group, *layers[group[-1] + 1 :]])
        return estimate(Plan.baseline(num_layers)) - estimate(plan)

    def _build_option(self, group: Group, saving: float) -> _Option:
        made = []
        for layer_idx in group:
            join, attention, mlp = self._places[layer_idx]
            made += [join] if layer_idx < group[-1] else []
            made += [attention] if layer_idx not in group.attention_layers else []
            made += [mlp] if layer_idx not in group.mlp_layers else []
        last = group[-1]
        state = 4 * (len(group) > 1) + 2 * (last not in group.attention_layers) + (last not in group.mlp_layers)
        return _Option(group, np.array(made, dtype=np.int64), saving, round(saving * self._units), int(state))

    @cached_property
    def _places(self) -> list[tuple[int, int, int]]:
        """By layer, the places of the join after it, of dropping its attention, and its MLP; -1 where there is none."""
        place_of = {(choice.kind, choice.layers[0]): place for place, choice in enumerate(self._space.choices)}
        return [
            (
                place_of.get(("join", layer_idx), -1),
                place_of.get(("drop_attention", layer_idx), -1),
                place_of.get(("drop_mlp", layer_idx), -1),
            )
            for layer_idx in range(self._space.num_layers)
        ]

    @cached_property
    def _table(self) -> FloatArray:
        """(sizes, layers, codes) savings in levels by a group's size less one, first layer and what it drops."""
        max_group = self._space.max_group
        table = np.zeros((max_group, self._space.num_layers, 4**max_group))
        for first, row in enumerate(self._options):
            for option in row:
                code = 0
                for layer_idx in option.group:
                    dropped = [layer_idx not in option.group.attention_layers, layer_idx not in option.group.mlp_layers]
                    code = 4 * code + 2 * dropped[0] + dropped[1]
                table[len(option.group) - 1, first, code] = option.saving
        return table

    @staticmethod
    def _read(made: BoolArray, place: int) -> IntArray:
        return np.zeros(len(made), dtype=np.int64) if place < 0 else made[:, place].astype(np.int64)

    def _cross(self, costs: PlanCosts, first: int, places: IntArray) -> FloatArray:
        """Return (batch, states): the products of a group's choices with those at the end of the group before."""
        total = np.zeros((len(costs.join_costs), len(_STATES)))
        if first and len(places):
            before = (self._places[first - 2][0] if first > 1 else -1, *self._places[first - 1][1:])
            for flag, place in enumerate(before):
                if place >= 0:
                    total += costs.product_costs[:, place, places].sum(axis=1)[:, None] * _STATES[:, flag]
        return total

    def _trace_back(self, best: FloatArray, came_by: NDArray[np.int32]) -> BoolArray:
        """Follow what was noted from the last group to the first, for the cheapest plan of every level."""
        batch = len(best)
        made = np.zeros((batch, self.num_levels, len(self._space.choices)), dtype=bool)
        for row, level in product(range(batch), range(1, self.num_levels + 1)):
            part = best[row, :, level * self._units : (level + 1) * self._units]
            state, offset = map(int, np.unravel_index(part.argmin(), part.shape))
            if not np.isfinite(part[state, offset]):
                continue
            after, units = self._space.num_layers, level * self._units + offset
            while after:
                code, source = divmod(int(came_by[after, row, state, units]), len(_STATES))
                size, index = divmod(code, MAX_OPTIONS)
                after -= size
                option = self._options[after][index]
                made[row, level - 1, option.places] = True
                units, state = units - option.units, source
        return made
