"""Plans: which consecutive layers of a model run in parallel, and which branches of a layer are left out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

from lpsearch.errors import PlanError
from lpsearch.plan.metadata import PlanMetadata

__all__ = ["Group", "Plan"]

BRANCHES = ("attention", "mlp")
"""What a layer is made of, and a plan can drop."""


@dataclass(frozen=True, slots=True)
class Group(Sequence[int]):
    """Consecutive layers that run in parallel: their attentions together, then their MLPs. A sequence of its layers.

    A layer whose two branches are dropped is still one of a group, so that every layer stands in exactly one.

    Attributes:
        layers: layer numbers, ascending.
        attention_layers: those of them whose attention runs.
        mlp_layers: those of them whose MLP runs.
    """

    layers: tuple[int, ...]
    attention_layers: tuple[int, ...]
    mlp_layers: tuple[int, ...]

    @classmethod
    def whole(cls, layers: Iterable[int]) -> Group:
        """Build a group that drops nothing."""
        frozen = tuple(layers)
        return cls(frozen, frozen, frozen)

    @property
    def num_stages(self) -> int:
        """Steps that it takes one after the other: one for its attentions, one for its MLPs, if any are left."""
        return bool(self.attention_layers) + bool(self.mlp_layers)

    @property
    def is_changed(self) -> bool:
        """Whether it is anything but one whole layer."""
        return len(self.layers) > 1 or self.num_stages < 2

    def drop(self, attention: Iterable[int], mlp: Iterable[int]) -> Group:
        """Return the group without some branches.

        Args:
            attention: layers whose attention goes; those of other groups do not count.
            mlp: layers whose MLP goes.
        """
        without_attention, without_mlp = set(attention), set(mlp)
        return Group(
            self.layers,
            tuple(layer_idx for layer_idx in self.attention_layers if layer_idx not in without_attention),
            tuple(layer_idx for layer_idx in self.mlp_layers if layer_idx not in without_mlp),
        )

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.layers)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[int, ...]: ...
    def __getitem__(self, index: int | slice) -> int | tuple[int, ...]:
        """Return a layer by its place in the group."""
        return self.layers[index]

    def __iter__(self) -> Iterator[int]:
        """Iterate over the layers."""
        return iter(self.layers)


@dataclass(frozen=True)
class Plan:
    """An ordered partition of a model's layers into groups that run in parallel.

    *Join i* means that layers i and i + 1 are in the same group, so a plan that drops nothing is equally a set of
    joins. Two plans are equal when their groups are; metadata does not count. Build one with :meth:`from_groups` or
    :meth:`from_joins`; the bare constructor validates too.

    Attributes:
        groups: every layer once, in order.
        metadata: the model it is for and what was measured; None for a plan made by hand.
    """

    groups: tuple[Group, ...]
    metadata: PlanMetadata | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse anything but an ordered partition of ``range(num_layers)``.

        Raises:
            PlanError: naming the first layer that is out of place.
        """
        _check_partition([group.layers for group in self.groups])

    @classmethod
    def from_groups(
        cls,
        groups: Iterable[Iterable[int]],
        *,
        dropped: Mapping[str, Iterable[int]] | None = None,
        metadata: PlanMetadata | None = None,
    ) -> Plan:
        """Build a plan from its groups.

        Args:
            groups: every layer once, in order, e.g. ``[[0], [1, 2], [3]]``; what a :class:`Group` drops stays dropped.
            dropped: layers without their ``attention``, and layers without their ``mlp``.
            metadata: the model it is for and what was measured.

        Raises:
            PlanError: on overlaps, gaps, wrong order, empty groups or anything that is not a layer number.
        """
        try:
            frozen = tuple(group if isinstance(group, Group) else Group.whole(group) for group in groups)
        except TypeError as error:
            raise PlanError(
                f"groups must be a list of lists of layer numbers, e.g. [[0], [1, 2], [3]]: {error}"
            ) from None
        plan = cls(frozen, metadata)
        return plan if dropped is None else plan.drop(dropped)

    @classmethod
    def from_joins(cls, num_layers: int, joins: Iterable[int]) -> Plan:
        """Build a plan from its joins.

        Args:
            num_layers: number of decoder layers.
            joins: layer numbers i such that layers i and i + 1 share a group, in any order.

        Raises:
            PlanError: for fewer than one layer or a join outside ``[0, num_layers - 1)``.
        """
        if num_layers < 1:
            raise PlanError(f"a plan needs at least one layer, got num_layers = {num_layers}")
        joined = set(joins)
        for join in sorted(joined):
            if not 0 <= join < num_layers - 1:
                raise PlanError(f"join {join} is outside [0, {num_layers - 1}): a join i ties layers i and i + 1")
        groups: list[list[int]] = [[0]]
        for layer_idx in range(1, num_layers):
            if layer_idx - 1 in joined:
                groups[-1].append(layer_idx)
            else:
                groups.append([layer_idx])
        return cls(tuple(map(Group.whole, groups)))

    @cached_property
    def running_groups(self) -> tuple[Group, ...]:
        """The groups, each together with those behind it of which nothing is left.

        They compute the same. Those at the beginning of which nothing is left are taken together with the next group.
        """
        running: list[Group] = []
        for group in self.groups:
            if running and (group.num_stages == 0 or running[-1].num_stages == 0):
                before = running.pop()
                group = Group(
                    before.layers + group.layers,
                    before.attention_layers + group.attention_layers,
                    before.mlp_layers + group.mlp_layers,
                )
            running.append(group)
        return tuple(running)

    def without_recovery(self) -> Plan:
        """Return the plan as it is for the unmodified weights."""
        if self.metadata is None or self.metadata.provenance.recovery is None:
            return self
        provenance = self.metadata.provenance.model_copy(update={"recovery": None})
        return dataclasses.replace(self, metadata=self.metadata.model_copy(update={"provenance": provenance}))

    def without_metadata(self) -> Plan:
        """Return the groups alone: with repaired weights the model is no longer the one that the metadata names."""
        return dataclasses.replace(self, metadata=None)

    @classmethod
    def from_key(cls, key: str) -> Plan:
        """Build the plan of a :attr:`key`."""
        content = json.loads(key)
        if isinstance(content, list):
            return cls.from_groups(content)
        return cls.from_groups(content["groups"], dropped=content["dropped"])

    @classmethod
    def baseline(cls, num_layers: int) -> Plan:
        """Build the plan that changes nothing: every layer alone."""
        return cls.from_joins(num_layers, ())

    def drop(self, dropped: Mapping[str, Iterable[int]]) -> Plan:
        """Return the plan without some branches of layers.

        Args:
            dropped: layers without their ``attention``, and layers without their ``mlp``.

        Raises:
            PlanError: for another branch, or a layer that does not exist.
        """
        layers = {branch: sorted(dropped.get(branch, ())) for branch in BRANCHES}
        if unknown := sorted(set(dropped) - set(BRANCHES)):
            raise PlanError(f"dropped names {unknown[0]!r}; a layer has the branches {' and '.join(BRANCHES)}")
        for branch, chosen in layers.items():
            for layer_idx in chosen:
                if layer_idx not in range(self.num_layers):
                    raise PlanError(
                        f"dropped {branch} of layer {layer_idx!r}: the plan has layers 0 to {self.num_layers - 1}"
                    )
        groups = tuple(group.drop(layers["attention"], layers["mlp"]) for group in self.groups)
        return dataclasses.replace(self, groups=groups)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.groups[-1][-1] + 1

    @cached_property
    def depth(self) -> float:
        """Sequential steps that remain, in layers: half for every attention stage and half for every MLP stage.

        The number of groups where nothing is dropped.
        """
        whole, half = divmod(sum(group.num_stages for group in self.groups), 2)
        return whole + 0.5 if half else whole

    @property
    def depth_reduction(self) -> float:
        """Share of the depth that the plan removes: ``1 - depth / num_layers``."""
        return 1 - self.depth / self.num_layers

    @cached_property
    def joins(self) -> tuple[int, ...]:
        """Every i whose layers i and i + 1 share a group, ascending."""
        return tuple(layer_idx for group in self.groups for layer_idx in group[:-1])

    @property
    def num_joins(self) -> int:
        """Number of joins."""
        return self.num_layers - len(self.groups)

    @property
    def max_group(self) -> int:
        """Layers in the largest group."""
        return max(len(group) for group in self.groups)

    @cached_property
    def num_dropped(self) -> int:
        """Number of branches that are left out."""
        return sum(2 * len(group) - len(group.attention_layers) - len(group.mlp_layers) for group in self.groups)

    @property
    def dropped(self) -> dict[str, list[int]]:
        """Layers without their ``attention``, and layers without their ``mlp``, as JSON has them."""
        return {
            "attention": [i for group in self.groups for i in group if i not in group.attention_layers],
            "mlp": [i for group in self.groups for i in group if i not in group.mlp_layers],
        }

    def to_lists(self) -> list[list[int]]:
        """Return the layers of every group, as JSON has them."""
        return [list(group) for group in self.groups]

    @cached_property
    def key(self) -> str:
        """The plan as one compact JSON string, by which a study knows it: the groups, e.g. ``[[0],[1,2],[3]]``.

        Where branches are dropped it is an object of ``groups`` and ``dropped``.
        """
        groups: Any = self.to_lists()
        content = {"groups": groups, "dropped": self.dropped} if self.num_dropped else groups
        return json.dumps(content, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """SHA-256 of the key, in hexadecimal."""
        return hashlib.sha256(self.key.encode()).hexdigest()

    def __hash__(self) -> int:
        """Return a hash of the key, which is computed once."""
        return hash(self.key)


def _check_partition(groups: Sequence[tuple[int, ...]]) -> None:
    """Refuse groups that are not an ordered partition of the layers, naming the first one out of place."""
    if not groups:
        raise PlanError("groups is empty; list every layer once, e.g. [[0], [1, 2], [3]]")
    expected = 0
    group_of: dict[int, tuple[int, ...]] = {}
    for group in groups:
        if not group:
            raise PlanError(f"an empty group stands before layer {expected}; remove it")
        for layer_idx in group:
            if isinstance(layer_idx, bool) or not isinstance(layer_idx, int):
                raise PlanError(f"group {list(group)} holds {layer_idx!r}; layers are whole numbers from 0")
            if layer_idx in group_of:
                raise PlanError(
                    f"layer {layer_idx} is in groups {list(group_of[layer_idx])} and {list(group)}; "
                    "each layer appears once"
                )
            if layer_idx != expected:
                raise PlanError(
                    f"layer {layer_idx} in group {list(group)} stands where layer {expected} belongs; "
                    "list every layer from 0 once, in order, without gaps"
                )
            group_of[layer_idx] = group
            expected += 1
