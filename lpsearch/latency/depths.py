"""Which depths of a model are timed: enough of them to tell the cost of every kind of group apart.

This module imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lpsearch.latency.profile import ProfileGeometry
from lpsearch.plan import Plan

__all__ = ["Depth", "choose_depths", "find_group_kinds"]


@dataclass(frozen=True)
class Depth:
    """A depth to time: a plan over some of the model's layers.

    Attributes:
        layers: layers of the model, in any order and number.
        plan: groups over them.
        use: whether the costs are fitted to it, or only checked on it.
    """

    layers: tuple[int, ...]
    plan: Plan
    use: Literal["fit", "check"]

    def count_groups(self, geometry: ProfileGeometry) -> dict[str, int]:
        """Return the number of groups of each kind."""
        groups = [[self.layers[position] for position in group] for group in self.plan.groups]
        return dict(Counter(geometry.describe_group(group) for group in groups))


def find_group_kinds(geometry: ProfileGeometry, *, max_group: int) -> dict[str, tuple[int, ...]]:
    """Return every kind of group that consecutive layers can form, with the first such group."""
    examples: dict[str, tuple[int, ...]] = {}
    for size in range(1, max_group + 1):
        for first in range(geometry.num_layers - size + 1):
            group = tuple(range(first, first + size))
            examples.setdefault(geometry.describe_group(group), group)
    return examples


def choose_depths(geometry: ProfileGeometry, *, num_layers: int, max_group: int) -> list[Depth]:
    """Choose which depths to fit to and which to check on; the first is the unmodified model, or what fits of it.

    For each kind of group we fit to as many groups as fit, and to half as many, followed by the first layer repeated;
    of the first layer's own kind to all and half. So overhead and every kind's cost are told apart. We check on the
    model's own layers, some alone and some in groups of each size, one size after the other.

    Args:
        geometry: shape of the model.
        num_layers: most layers of a depth.
        max_group: largest group.
    """
    own = tuple(range(num_layers))
    depths = [Depth(own, Plan.baseline(num_layers), "fit")]
    first_kind = geometry.describe_group(own[:1])
    for kind, group in find_group_kinds(geometry, max_group=max_group).items():
        most = num_layers // len(group)
        for count in dict.fromkeys((most, max(1, most // 2))):
            rest = num_layers - count * len(group) if kind != first_kind and count < most else 0
            plan = _cut([len(group)] * count + [1] * rest)
            depth = Depth(group * count + own[:1] * rest, plan, "fit")
            if all(depth.count_groups(geometry) != other.count_groups(geometry) for other in depths):
                depths.append(depth)
    known = [depth.count_groups(geometry) for depth in depths]
    checks = (depth for depth in _list_mixtures(num_layers, max_group) if depth.count_groups(geometry) not in known)
    return [*depths, *([check] if (check := next(checks, None)) else [])]


def _list_mixtures(num_layers: int, max_group: int) -> Iterator[Depth]:
    """Yield depths to check on, the best first: groups of every size, or three quarters of the layers alone."""
    if max_group == 1:
        num_layers -= num_layers // 4
        yield Depth(tuple(range(num_layers)), Plan.baseline(num_layers), "check")
        return
    for alone in (2, 1, 3, 4):
        yield Depth(tuple(range(num_layers)), _cut(list(_alternate(num_layers, max_group, alone))), "check")


def _alternate(num_layers: int, max_group: int, alone: int) -> Iterator[int]:
    """Yield group sizes, e.g. 1 1 2 1 1 3 ..., that add up to the layers, with so many layers alone in between."""
    left, size = num_layers, 2
    while left:
        for wanted in (*[1] * alone, size):
            taken = min(wanted, left)
            left -= taken
            if taken:
                yield taken
        size = size + 1 if size < max_group else 2


def _cut(sizes: Sequence[int]) -> Plan:
    """Return the plan of groups of these sizes."""
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return Plan.from_groups([range(start, start + size) for start, size in zip(starts, sizes, strict=True)])
