"""Levels of plans that drop as many attentions as MLPs, the space in which EvoPress prunes the depth of a model.

Level s holds the plans that drop at least s attentions and s MLPs. The dynamic program goes from layer to layer
(Bellman's recursion). Its state is what the last layer drops and how many attentions and MLPs are dropped by then.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import product

import numpy as np
from numpy.typing import NDArray

from lpsearch.search import PlanSpace
from lpsearch.search.samplers.dynamic_program import PlanCosts

__all__ = ["CountLevels"]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

LEAST_LOSS = 1e-3
"""Losses below this weigh as much as this, in nats per token."""

_OPTIONS = tuple(product((0, 1), repeat=2))
"""Whether a layer drops its attention and its MLP."""


class CountLevels:
    """Sorts plans by the fewer of their dropped attentions and dropped MLPs; of :class:`.mixed.Levels`.

    Args:
        space: plans that drop attentions and MLPs and join nothing.
        targets: numbers of both that the search is for; the others have no weight in the front.

    Attributes:
        num_levels: the largest target.
        useful_level: the same.
        exchangeable: (leaving, entering) choices of one kind.
    """

    def __init__(self, space: PlanSpace, targets: Collection[int]) -> None:
        kinds = np.array([choice.kind for choice in space.choices])
        if set(kinds) != {"drop_attention", "drop_mlp"} or space.frozen_layers:
            raise ValueError("plans are compared by their numbers of drops where they drop both kinds and nothing else")
        if not 1 <= min(targets) <= max(targets) < space.num_layers:
            raise ValueError(f"targets {sorted(targets)} are outside [1, {space.num_layers})")
        self.num_levels = self.useful_level = max(targets)
        self.exchangeable: BoolArray = kinds[:, None] == kinds[None, :]
        self._is_target = np.isin(np.arange(self.num_levels + 1), list(targets))
        self._is_attention = kinds == "drop_attention"
        self._places = np.array([np.flatnonzero(self._is_attention), np.flatnonzero(~self._is_attention)])

    def classify(self, made: BoolArray) -> IntArray:
        """Return the (plans,) levels of (plans, choices) plans."""
        counts = np.minimum(made[:, self._is_attention].sum(axis=1), made[:, ~self._is_attention].sum(axis=1))
        return np.minimum(counts, self.num_levels)

    def weigh(self, front: FloatArray, *, num_evaluated: int) -> FloatArray:
        """Weigh every target by the inverse of its loss, so that a part of any of them counts as much."""
        return np.where(self._is_target, 1 / np.maximum(front, LEAST_LOSS), 0.0)

    def solve(self, costs: PlanCosts) -> BoolArray:
        """Return (batch, num_levels, choices): the cheapest plan that drops s attentions and s MLPs, s from 1 on.

        Products of choices of layers that are not neighbours are ignored.
        """
        batch, size = len(costs.join_costs), self.num_levels + 1
        num_layers = self._places.shape[1]
        best = np.full((batch, len(_OPTIONS), size, size), np.inf)
        best[:, 0, 0, 0] = 0.0
        came_by = np.zeros((num_layers, batch, len(_OPTIONS), size, size), dtype=np.int8)
        for layer_idx in range(num_layers):
            after = np.full_like(best, np.inf)
            for state, drops in enumerate(_OPTIONS):
                sources = best + self._price(costs, layer_idx, drops)[:, :, None, None]
                source = sources.argmin(axis=1)  # (batch, attentions, MLPs)
                least = np.take_along_axis(sources, source[:, None], axis=1)[:, 0]
                attention, mlp = drops
                after[:, state, attention:, mlp:] = least[:, : size - attention, : size - mlp]
                came_by[layer_idx, :, state, attention:, mlp:] = source[:, : size - attention, : size - mlp]
            best = after
        made = np.zeros((batch, self.num_levels, costs.join_costs.shape[1]), dtype=bool)
        for row, level in product(range(batch), range(1, size)):
            attention, mlp = level, level
            state = int(best[row, :, level, level].argmin())
            for layer_idx in reversed(range(num_layers)):
                source = came_by[layer_idx, row, state, attention, mlp]
                for dropped, place in zip(_OPTIONS[state], self._places[:, layer_idx], strict=True):
                    made[row, level - 1, place] = bool(dropped)
                attention, mlp = attention - _OPTIONS[state][0], mlp - _OPTIONS[state][1]
                state = int(source)
        return made

    def _price(self, costs: PlanCosts, layer_idx: int, drops: tuple[int, int]) -> FloatArray:
        """Return (batch, states): what the drops of a layer cost, after each state of the layer before."""
        places = self._places[np.array(drops, dtype=bool), layer_idx]
        cost = costs.join_costs[:, places].sum(axis=1)
        cost = cost + 0.5 * costs.product_costs[:, places[:, None], places].sum(axis=(1, 2))
        total = np.repeat(cost[:, None], len(_OPTIONS), axis=1)
        if layer_idx:
            for state, before in enumerate(_OPTIONS):
                others = self._places[np.array(before, dtype=bool), layer_idx - 1]
                total[:, state] += costs.product_costs[:, places[:, None], others].sum(axis=(1, 2))
        return total
