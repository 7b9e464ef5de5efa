"""The space of plans: the choices that make one, which exclude each other, and the parameters that stand for them.

Optuna sees one boolean category a choice, the same for every sampler and every trial. Samplers that know nothing of
groups may set overlong runs of joins; :meth:`PlanSpace.decode` cuts these, so every point names a valid plan.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise, product
from typing import Any, Literal, get_args

from optuna.distributions import CategoricalDistribution

from lpsearch.config import Allowed
from lpsearch.errors import ConfigError, PlanError
from lpsearch.plan import Group, Plan

__all__ = ["Choice", "PlanSpace"]

MAX_GROUP_WITH_DROPS = 4
"""Most layers in a group where branches may be dropped: each of them keeps one of four sets of branches."""


@dataclass(frozen=True)
class Choice:
    """One bit of a plan.

    Attributes:
        kind: what it does to its layers: ``join`` puts them into one group, the others drop a branch of one layer.
        layers: the layers.
    """

    kind: Literal["join", "drop_attention", "drop_mlp"]
    layers: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of its parameter, e.g. ``join_000`` for layers 0 and 1."""
        return f"{self.kind}_{self.layers[0]:03d}"


@dataclass(frozen=True)
class PlanSpace:
    """Every plan of a model whose groups have at most ``max_group`` layers and leave frozen layers alone.

    Where branches may be dropped, neighbours are joined only where both still have their attention, or both their
    MLP: any other join saves no step. The plan that drops every branch of the model is left out.

    Attributes:
        num_layers: number of decoder layers.
        max_group: most layers in a group; 2 means pairs.
        frozen_layers: layers that stay whole groups of their own, ascending.
        allow: what a plan may do: ``joins``, ``drop-attention``, ``drop-mlp``.
    """

    num_layers: int
    max_group: int = 2
    frozen_layers: tuple[int, ...] = ()
    allow: tuple[Allowed, ...] = ("joins",)

    def __post_init__(self) -> None:
        """Refuse impossible spaces, and put the frozen layers and what is allowed in order.

        Raises:
            ConfigError: for no layers, groups of fewer than two layers or more than there are, a frozen layer that
                does not exist, nothing that is allowed, or groups too large to drop branches in.
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
        unknown = sorted(set(self.allow) - set(get_args(Allowed)))
        if unknown or not self.allow:
            raise ConfigError(
                f"allow is {list(self.allow)}; a plan may do one or more of {', '.join(get_args(Allowed))}"
            )
        if set(self.allow) > {"joins"} and self.max_group > MAX_GROUP_WITH_DROPS:
            raise ConfigError(
                f"max_group is {self.max_group}; where plans also drop branches it is at most {MAX_GROUP_WITH_DROPS}"
            )
        object.__setattr__(self, "frozen_layers", tuple(sorted(set(self.frozen_layers))))
        object.__setattr__(self, "allow", tuple(kind for kind in get_args(Allowed) if kind in self.allow))

    @property
    def num_join_positions(self) -> int:
        """Number of neighbouring layers that could be joined, frozen ones included: ``num_layers - 1``."""
        return self.num_layers - 1

    @property
    def allows_drops(self) -> bool:
        """Whether a plan may drop a branch."""
        return self.allow != ("joins",)

    @cached_property
    def free_joins(self) -> tuple[int, ...]:
        """Joins that touch no frozen layer, ascending; the joins of every plan of the space are a subset of these."""
        frozen = set(self.frozen_layers)
        joins = range(self.num_join_positions if "joins" in self.allow else 0)
        return tuple(i for i in joins if i not in frozen and i + 1 not in frozen)

    @cached_property
    def _free_join_set(self) -> frozenset[int]:
        return frozenset(self.free_joins)

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """Every choice, frozen ones included: of each allowed kind, from the first layer on."""
        joins = range(self.num_join_positions if "joins" in self.allow else 0)
        attention = range(self.num_layers if "drop-attention" in self.allow else 0)
        mlp = range(self.num_layers if "drop-mlp" in self.allow else 0)
        return (
            *(Choice("join", (i, i + 1)) for i in joins),
            *(Choice("drop_attention", (i,)) for i in attention),
            *(Choice("drop_mlp", (i,)) for i in mlp),
        )

    @cached_property
    def _places(self) -> dict[tuple[str, int], int]:
        """Place in ``choices`` by kind and first layer."""
        return {(choice.kind, choice.layers[0]): place for place, choice in enumerate(self.choices)}

    @cached_property
    def constraints(self) -> tuple[tuple[int, ...], ...]:
        """Sets of places in ``choices`` of which a plan may not make all.

        They are choices of frozen layers; joins of too long a group; a join with drops that leave its two layers no
        branch in common; all drops.
        """
        frozen_layers = set(self.frozen_layers)
        frozen = [(place,) for place, choice in enumerate(self.choices) if frozen_layers.intersection(choice.layers)]
        joins = range(self.num_join_positions if "joins" in self.allow else 0)
        runs = [tuple(range(i, i + self.max_group)) for i in joins[: max(0, len(joins) - self.max_group + 1)]]
        useless, everything = [], []
        if {"drop-attention", "drop-mlp"} <= set(self.allow):
            drops = [place for place, choice in enumerate(self.choices) if choice.kind != "join"]
            everything = [tuple(drops)]
            useless = [
                (self._places["join", i], self._places["drop_attention", left], self._places["drop_mlp", right])
                for i in joins
                for left, right in product((i, i + 1), repeat=2)
            ]
        return (*frozen, *runs, *useless, *everything)

    @cached_property
    def distributions(self) -> dict[str, CategoricalDistribution]:
        """One boolean category a choice: the same search space for every sampler."""
        return {choice.name: CategoricalDistribution((False, True)) for choice in self.choices}

    def encode(self, plan: Plan) -> tuple[bool, ...]:
        """Return which of the ``choices`` a plan makes."""
        dropped = plan.dropped
        made = {"join": set(plan.joins), "drop_attention": set(dropped["attention"]), "drop_mlp": set(dropped["mlp"])}
        return tuple(choice.layers[0] in made[choice.kind] for choice in self.choices)

    def decode(self, bits: Iterable[bool]) -> Plan:
        """Return the plan of a point of the space, repaired where the point obeys no constraint.

        What touches frozen layers is left out. Where every branch of the model would be dropped, the first layer keeps
        its own. Then come the joins, of which :meth:`repair` cuts overlong runs.

        Args:
            bits: for each of the ``choices`` whether it is made.
        """
        made: dict[str, set[int]] = {"join": set(), "drop_attention": set(), "drop_mlp": set()}
        for choice, bit in zip(self.choices, bits, strict=True):
            if bit:
                made[choice.kind].add(choice.layers[0])
        attention, mlp = (made[kind].difference(self.frozen_layers) for kind in ("drop_attention", "drop_mlp"))
        if len(attention) + len(mlp) == 2 * self.num_layers:
            attention, mlp = attention - {0}, mlp - {0}
        useless = {i for i in made["join"] if {i, i + 1} & attention and {i, i + 1} & mlp}
        plan = Plan.from_joins(self.num_layers, self.repair(made["join"] - useless))
        return plan.drop({"attention": attention, "mlp": mlp}) if attention or mlp else plan

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
        return plan.num_layers == self.num_layers and self._find_problem(plan) is None

    def is_valid(self, joins: Collection[int]) -> bool:
        """Say whether a set of joins is a plan of this space."""
        return set(joins) <= self._free_join_set and all(
            last - first + 2 <= self.max_group for first, last in _iterate_runs(joins)
        )

    def _find_problem(self, plan: Plan) -> str | None:
        """Return why a plan of the model is outside the space; None where it is inside."""
        if not self.is_valid(plan.joins):
            if plan.num_joins and "joins" not in self.allow:
                return "it joins layers"
            frozen = ", ".join(map(str, self.frozen_layers))
            alone = f", and --freeze keeps {frozen} out of them" if frozen else ""
            return f"groups have at most {self.max_group} layers{alone}"
        if not plan.num_dropped:
            return None
        dropped = {branch: set(layers) for branch, layers in plan.dropped.items()}
        for branch, layers in dropped.items():
            if layers and f"drop-{branch}" not in self.allow:
                return f"it drops the {branch} of layers {sorted(layers)}"
            if not layers.isdisjoint(self.frozen_layers):
                return f"it drops the {branch} of layers {sorted(layers.intersection(self.frozen_layers))}, frozen ones"
        if plan.num_dropped == 2 * plan.num_layers:
            return "it drops every branch of the model"
        for i in plan.joins:
            if all(layers.intersection((i, i + 1)) for layers in dropped.values()):
                return (
                    f"it joins layers {i} and {i + 1}, which have no branch in common, so that the join saves nothing"
                )
        return None

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
        problem = self._find_problem(plan)
        if problem is not None:
            mend = "raise --max-group, freeze fewer layers"
            if problem.startswith("it "):
                problem += f" (--allow is {','.join(self.allow)})"
                mend = "allow it with --allow, freeze fewer layers"
            raise PlanError(f"{where} is outside the space: {problem}, got {plan.key}; {mend} or name another plan")

    def repair(self, joins: Iterable[int]) -> tuple[int, ...]:
        """Return the joins nearest in spirit: frozen joins dropped, overlong runs cut into full groups from the left.

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

    # ---- Counting and listing ----------------------------------------------------------------------------------------

    @property
    def max_choices(self) -> int:
        """Most choices that a plan of the space can make."""
        return len(self.plan_counts) - 1

    @cached_property
    def plan_counts(self) -> tuple[int, ...]:
        """Number of plans that make exactly k choices, for k = 0 to ``max_choices``; the last entry is not zero."""
        counts = list(self._suffix_counts[0])
        if self._can_drop_everything:
            counts[2 * self.num_layers] -= 1
            while not counts[-1]:
                counts.pop()
        return tuple(counts)

    def count_plans(self) -> int:
        """Count the plans of the space exactly, the baseline included."""
        return sum(self.plan_counts)

    def enumerate_plans(self) -> Iterator[Plan]:
        """Yield every plan once, lazily: fewest choices first, so the baseline leads."""
        for num_choices in range(self.max_choices + 1):
            yield from self.enumerate_plans_with(num_choices)

    def enumerate_plans_with(self, num_choices: int) -> Iterator[Plan]:
        """Yield every plan that makes exactly ``num_choices`` choices once, lazily."""
        for groups in self._enumerate_groups(0, num_choices):
            plan = Plan.from_groups(groups)
            if plan.num_dropped < 2 * self.num_layers:
                yield plan

    def draw_plan(self, num_choices: int, rng: random.Random) -> Plan:
        """Draw uniformly among the plans that make exactly ``num_choices`` choices.

        Args:
            num_choices: between 0 and ``max_choices``.
            rng: source of the draw.
        """
        while True:
            plan = self._draw_groups(num_choices, rng)
            if plan.num_dropped < 2 * self.num_layers:
                return plan

    def list_groups(self, first_layer: int) -> tuple[Group, ...]:
        """Return every group of a plan that may begin at a layer, fewest layers first, and the whole ones before."""
        return self._groups[first_layer]

    @property
    def _can_drop_everything(self) -> bool:
        """Whether the groups alone would let every branch of the model be dropped."""
        return {"drop-attention", "drop-mlp"} <= set(self.allow) and not self.frozen_layers

    def _draw_groups(self, num_choices: int, rng: random.Random) -> Plan:
        groups: list[Group] = []
        layer_idx, choices_left = 0, num_choices
        while layer_idx < self.num_layers:
            rank = rng.randrange(self._count_suffixes(layer_idx, choices_left))
            for group in self._groups[layer_idx]:
                count = self._count_suffixes(layer_idx + len(group), choices_left - _count_choices(group))
                if rank < count:
                    break
                rank -= count
            groups.append(group)
            layer_idx += len(group)
            choices_left -= _count_choices(group)
        return Plan.from_groups(groups)

    @cached_property
    def _groups(self) -> tuple[tuple[Group, ...], ...]:
        """By the first layer, the groups that may begin there."""
        return tuple(
            tuple(group for size in self._group_sizes(layer_idx) for group in self._vary_group(layer_idx, size))
            for layer_idx in range(self.num_layers)
        )

    def _group_sizes(self, first_layer: int) -> Iterator[int]:
        """Yield the sizes that a group beginning at a layer may have."""
        yield 1
        for size in range(2, self.max_group + 1):
            if first_layer + size - 2 not in self._free_join_set:
                return
            yield size

    def _vary_group(self, first_layer: int, size: int) -> Iterator[Group]:
        """Yield the groups of some layers, by what they keep: everything first."""
        whole = Group.whole(range(first_layer, first_layer + size))
        drops = [branch for branch in ("attention", "mlp") if f"drop-{branch}" in self.allow]
        if not drops or first_layer in self.frozen_layers:
            yield whole
            return
        subsets = [layers for num in range(size + 1) for layers in combinations(whole, num)]
        for attention in subsets if "attention" in drops else [()]:
            for mlp in subsets if "mlp" in drops else [()]:
                kept = [(i not in attention, i not in mlp) for i in whole]
                if all(any(map(min, left, right)) for left, right in pairwise(kept)):
                    yield whole.drop(attention, mlp)

    @cached_property
    def _suffix_counts(self) -> tuple[tuple[int, ...], ...]:
        """Entry [l][k]: how many ways the layers from l on can be grouped with k choices."""
        counts: list[list[int]] = [[] for _ in range(self.num_layers)] + [[1]]
        for layer_idx in reversed(range(self.num_layers)):
            total = counts[layer_idx]
            for group in self._groups[layer_idx]:
                made = _count_choices(group)
                for choices_after, count in enumerate(counts[layer_idx + len(group)]):
                    num_choices = choices_after + made
                    total.extend([0] * (num_choices + 1 - len(total)))
                    total[num_choices] += count
        return tuple(tuple(row) for row in counts)

    def _count_suffixes(self, layer_idx: int, num_choices: int) -> int:
        row = self._suffix_counts[layer_idx]
        return row[num_choices] if 0 <= num_choices < len(row) else 0

    def _enumerate_groups(self, layer_idx: int, num_choices: int) -> Iterator[tuple[Group, ...]]:
        if layer_idx == self.num_layers:
            yield ()
            return
        for group in self._groups[layer_idx]:
            choices_left = num_choices - _count_choices(group)
            if self._count_suffixes(layer_idx + len(group), choices_left):
                for rest in self._enumerate_groups(layer_idx + len(group), choices_left):
                    yield (group, *rest)


def _count_choices(group: Group) -> int:
    """Return the number of choices that make a group: its joins and its drops."""
    return len(group) - 1 + 2 * len(group) - len(group.attention_layers) - len(group.mlp_layers)


def _iterate_runs(joins: Collection[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and last join of every run of consecutive joins, ascending."""
    ordered = sorted(joins)
    first = 0
    for i in range(1, len(ordered) + 1):
        if i == len(ordered) or ordered[i] != ordered[i - 1] + 1:
            yield ordered[first], ordered[i - 1]
            first = i
