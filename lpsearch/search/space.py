"""The space of plans: the choices that make one, which exclude each other, and the parameters that stand for them.

Optuna sees one boolean category a choice, the same for every sampler and every trial. Samplers that know nothing of
groups may set overlong runs of joins; :meth:`PlanSpace.decode` cuts these, so every point names a valid plan.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from optuna.distributions import CategoricalDistribution

from lpsearch.errors import ConfigError, PlanError
from lpsearch.plan import Plan

__all__ = ["Choice", "PlanSpace"]


@dataclass(frozen=True)
class Choice:
    """One bit of a plan.

    Attributes:
        kind: what it does to its layers: ``join`` puts them into one group.
        layers: the layers.
    """

    kind: Literal["join"]
    layers: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of its parameter, e.g. ``join_000`` for layers 0 and 1."""
        return f"{self.kind}_{self.layers[0]:03d}"


@dataclass(frozen=True)
class PlanSpace:
    """Every plan of a model whose groups have at most ``max_group`` layers and leave frozen layers alone.

    Attributes:
        num_layers: number of decoder layers.
        max_group: most layers in a group; 2 means pairs.
        frozen_layers: layers that stay groups of their own, ascending.
    """

    num_layers: int
    max_group: int = 2
    frozen_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse impossible spaces and put the frozen layers in order.

        Raises:
            ConfigError: for no layers, groups of fewer than two layers or more than there are, or a frozen layer that
                does not exist.
        """
        if self.num_layers < 1:
            raise ConfigError(f"num_layers is {self.num_layers}; a model has at least one layer")
        if self.max_group < 2:
            raise ConfigError(f"max_group is {self.max_group}; a group that saves depth has at least 2 layers")
        if self.max_group > max(2, self.num_layers):
            raise ConfigError(f"max_group is {self.max_group}; the model has only {self.num_layers} layers")
        for layer_idx in self.frozen_layers:
            if not 0 <= layer_idx < self.num_layers:
                raise ConfigError(
                    f"frozen layer {layer_idx} does not exist; the model has layers 0 to {self.num_layers - 1}"
                )
        object.__setattr__(self, "frozen_layers", tuple(sorted(set(self.frozen_layers))))

    @property
    def num_join_positions(self) -> int:
        """Number of neighbouring layers that could be joined, frozen ones included: ``num_layers - 1``."""
        return self.num_layers - 1

    @cached_property
    def free_joins(self) -> tuple[int, ...]:
        """Joins that touch no frozen layer, ascending; every plan of the space is a subset of these."""
        frozen = set(self.frozen_layers)
        return tuple(i for i in range(self.num_join_positions) if i not in frozen and i + 1 not in frozen)

    @cached_property
    def _free_join_set(self) -> frozenset[int]:
        return frozenset(self.free_joins)

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """Every choice, frozen ones included: the joins from the first layer on."""
        return tuple(Choice("join", (i, i + 1)) for i in range(self.num_join_positions))

    @cached_property
    def constraints(self) -> tuple[tuple[int, ...], ...]:
        """Sets of places in ``choices`` of which a plan may not make all: frozen joins, joins of too long a group."""
        frozen = [(i,) for i in range(self.num_join_positions) if i not in self._free_join_set]
        runs = [tuple(range(i, i + self.max_group)) for i in range(self.num_join_positions - self.max_group + 1)]
        return (*frozen, *runs)

    @cached_property
    def distributions(self) -> dict[str, CategoricalDistribution]:
        """One boolean category a choice: the same search space for every sampler."""
        return {choice.name: CategoricalDistribution((False, True)) for choice in self.choices}

    def encode(self, plan: Plan) -> tuple[bool, ...]:
        """Return which of the ``choices`` a plan makes."""
        joined = set(plan.joins)
        return tuple(choice.layers[0] in joined for choice in self.choices)

    def decode(self, bits: Iterable[bool]) -> Plan:
        """Return the plan of a point of the space, repaired where the point obeys no constraint.

        Args:
            bits: for each of the ``choices`` whether it is made.
        """
        made = [choice for choice, bit in zip(self.choices, bits, strict=True) if bit]
        return Plan.from_joins(self.num_layers, self.repair(choice.layers[0] for choice in made))

    def build_params(self, plan: Plan) -> dict[str, bool]:
        """Return the parameters that stand for a plan."""
        return dict(zip(self.distributions, self.encode(plan), strict=True))

    def build_plan(self, params: Mapping[str, Any]) -> Plan:
        """Return the plan of parameters, repaired; see :meth:`decode`.

        Args:
            params: the value of every choice's parameter.
        """
        return self.decode(params[name] for name in self.distributions)

    def __contains__(self, plan: Plan) -> bool:
        """Say whether a plan is one of this space."""
        return plan.num_layers == self.num_layers and not plan.num_dropped and self.is_valid(plan.joins)

    def is_valid(self, joins: Collection[int]) -> bool:
        """Say whether a set of joins is a plan of this space."""
        return set(joins) <= self._free_join_set and all(
            last - first + 2 <= self.max_group for first, last in _iterate_runs(joins)
        )

    def check_plan(self, plan: Plan, *, where: str) -> None:
        """Refuse a plan that is not one of this space.

        Args:
            plan: the plan.
            where: what it is, for the message, e.g. ``--enqueue plan.json``.

        Raises:
            PlanError: if it is for another number of layers, or outside the space.
        """
        if plan.num_layers != self.num_layers:
            raise PlanError(
                f"{where} has {plan.num_layers} layers, the model {self.num_layers}; name a plan of this model"
            )
        if plan not in self:
            raise PlanError(
                f"{where} is outside the space: groups have at most {self.max_group} layers and leave layers "
                f"{list(self.frozen_layers)} alone, got {plan.key}; "
                "raise --max-group, freeze fewer layers or name another plan"
            )

    def repair(self, joins: Iterable[int]) -> tuple[int, ...]:
        """Return the plan nearest in spirit: frozen joins dropped, overlong runs cut into full groups from the left.

        Idempotent and deterministic; a set of joins that :meth:`is_valid` comes back unchanged, ascending.

        Args:
            joins: joins in any order; frozen ones and overlong runs are allowed.
        """
        return tuple(
            first + offset
            for first, last in _iterate_runs(self._free_join_set.intersection(joins))
            for offset in range(last - first + 1)
            if offset % self.max_group != self.max_group - 1
        )

    @property
    def max_joins(self) -> int:
        """Most joins that a plan of the space can have."""
        return len(self._suffix_counts[0]) - 1

    @property
    def plan_counts(self) -> tuple[int, ...]:
        """Number of plans with exactly k joins, for k = 0 to ``max_joins``; no entry is zero."""
        return self._suffix_counts[0]

    def count_plans(self) -> int:
        """Count the plans of the space exactly, the baseline included."""
        return sum(self.plan_counts)

    def enumerate_plans(self) -> Iterator[Plan]:
        """Yield every plan once, lazily: fewest joins first, so the baseline leads."""
        for num_joins in range(self.max_joins + 1):
            yield from self.enumerate_plans_with(num_joins)

    def enumerate_plans_with(self, num_joins: int) -> Iterator[Plan]:
        """Yield every plan with exactly ``num_joins`` joins once, lazily."""
        for groups in self._enumerate_groups(0, num_joins):
            yield Plan.from_groups(groups)

    def draw_plan(self, num_joins: int, rng: random.Random) -> Plan:
        """Draw uniformly among the plans with exactly ``num_joins`` joins.

        Args:
            num_joins: between 0 and ``max_joins``.
            rng: source of the draw.
        """
        groups: list[tuple[int, ...]] = []
        layer_idx, joins_left = 0, num_joins
        while layer_idx < self.num_layers:
            rank = rng.randrange(self._count_suffixes(layer_idx, joins_left))
            for size in self._group_sizes(layer_idx):
                count = self._count_suffixes(layer_idx + size, joins_left - size + 1)
                if rank < count:
                    break
                rank -= count
            groups.append(tuple(range(layer_idx, layer_idx + size)))
            layer_idx += size
            joins_left -= size - 1
        return Plan.from_groups(groups)

    def _group_sizes(self, first_layer: int) -> Iterator[int]:
        """Yield the sizes that a group beginning at a layer may have."""
        yield 1
        for size in range(2, self.max_group + 1):
            if first_layer + size - 2 not in self._free_join_set:
                return
            yield size

    @cached_property
    def _suffix_counts(self) -> tuple[tuple[int, ...], ...]:
        """Entry [l][k]: how many ways the layers from l on can be grouped with k joins."""
        counts: list[list[int]] = [[] for _ in range(self.num_layers)] + [[1]]
        for layer_idx in reversed(range(self.num_layers)):
            total = counts[layer_idx]
            for size in self._group_sizes(layer_idx):
                for joins_after, count in enumerate(counts[layer_idx + size]):
                    num_joins = joins_after + size - 1
                    total.extend([0] * (num_joins + 1 - len(total)))
                    total[num_joins] += count
        return tuple(tuple(row) for row in counts)

    def _count_suffixes(self, layer_idx: int, num_joins: int) -> int:
        row = self._suffix_counts[layer_idx]
        return row[num_joins] if 0 <= num_joins < len(row) else 0

    def _enumerate_groups(self, layer_idx: int, num_joins: int) -> Iterator[tuple[tuple[int, ...], ...]]:
        if layer_idx == self.num_layers:
            yield ()
            return
        for size in self._group_sizes(layer_idx):
            if self._count_suffixes(layer_idx + size, num_joins - size + 1):
                group = tuple(range(layer_idx, layer_idx + size))
                for rest in self._enumerate_groups(layer_idx + size, num_joins - size + 1):
                    yield (group, *rest)


def _iterate_runs(joins: Collection[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and last join of every run of consecutive joins, ascending."""
    ordered = sorted(joins)
    first = 0
    for i in range(1, len(ordered) + 1):
        if i == len(ordered) or ordered[i] != ordered[i - 1] + 1:
            yield ordered[first], ordered[i - 1]
            first = i
