"""Which depths of a model are timed: enough of them to tell the cost of every kind of group apart.

Where plans only join layers, the costs are of groups. Where they may drop branches there are many more kinds of group,
and the costs are of stages: a group's attentions, and its MLPs, which no kernel spans. The cost of a kind is the sum of
its stages, so that the number of depths grows with the stages alone.

This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, product
from typing import Literal

from lpsearch.errors import ConfigError
from lpsearch.latency.allow import DROPS, JOINS
from lpsearch.latency.profile import LatencyProfile, ProfileGeometry
from lpsearch.plan import Group, Plan

__all__ = ["Depth", "check_profile_kinds", "choose_depths", "find_group_kinds"]


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

    @property
    def groups(self) -> list[Group]:
        """The groups, by layers of the model."""
        return [
            Group(self._name(group.layers), self._name(group.attention_layers), self._name(group.mlp_layers))
            for group in self.plan.groups
        ]

    def count_groups(self, geometry: ProfileGeometry) -> dict[str, int]:
        """Return the number of groups of each kind."""
        return geometry.count_groups(self.groups)

    def _name(self, positions: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.layers[position] for position in positions)


def find_group_kinds(geometry: ProfileGeometry, *, max_group: int, allow: Collection[str] = JOINS) -> dict[str, Group]:
    """Return every kind of group that consecutive layers can form, with the first such group.

    Args:
        geometry: shape of the model.
        max_group: largest group, where plans may join.
        allow: what plans may do, as in :data:`lpsearch.config.Allowed`.
    """
    windows = _list_windows(geometry, max_group if "joins" in allow else 1)
    examples: dict[str, Group] = {}
    for window in windows:
        examples.setdefault(geometry.describe_group(window), Group.whole(window))
    for window in windows:
        attentions = _list_stages(geometry, window, "attention", drops="drop-attention" in allow)
        mlps = _list_stages(geometry, window, "MLP", drops="drop-mlp" in allow)
        for kept_attentions, kept_mlps in product(attentions.values(), mlps.values()):
            group = Group(window, kept_attentions, kept_mlps)
            if kind := geometry.describe_group(group):
                examples.setdefault(kind, group)
    return examples


def check_profile_kinds(
    profile: LatencyProfile, *, max_group: int, allow: Collection[str] = JOINS, name: str, model: str = "MODEL"
) -> None:
    """Refuse a profile that lacks the cost of a group that a plan may have.

    Args:
        profile: the profile.
        max_group: largest group of a plan, where plans may join.
        allow: what plans may do, as in :data:`lpsearch.config.Allowed`.
        name: of the profile, for the message.
        model: the model as ``--model`` takes it.

    Raises:
        ConfigError: naming the kind, and the command that would measure it.
    """
    kinds = find_group_kinds(profile.geometry, max_group=max_group, allow=allow)
    for workload in profile.workloads:
        missing = next((kind for kind in kinds if kind not in workload.cost_ms), None)
        if missing is not None:
            words = ",".join(word for word in ("joins", "drop-attention", "drop-mlp") if word in allow)
            options = f"--allow {words.replace('drop-attention,drop-mlp', 'drops')}"
            options += f" --max-group {max_group}" if "joins" in allow else ""
            raise ConfigError(
                f"{name}: it has no cost of a group of {missing} (it has {', '.join(workload.cost_ms)}), which a plan "
                f"of this search may have; measure again with `lpsearch profile --model {model} {options}`"
            )


def choose_depths(
    geometry: ProfileGeometry, *, num_layers: int, max_group: int, allow: Collection[str] = JOINS
) -> list[Depth]:
    """Choose which depths to fit to and which to check on; the first is the unmodified model, or what fits of it.

    For each kind of group that drops nothing we fit to as many groups as fit, and to half as many, followed by the
    first layer repeated; of the first layer's own kind to all and half. So overhead and every kind's cost are told
    apart. Where branches may be dropped, we also fit, for each kind of stage, to groups of which one half lacks the
    other stage. In the equations of these depths the stage's own factor is the largest, so that they have one solution.
    We check on the model's own layers: some alone and some in groups of each size, one size after the other; and, where
    branches may be dropped, on the same without some branches.

    Args:
        geometry: shape of the model.
        num_layers: most layers of a depth.
        max_group: largest group, where plans may join.
        allow: what plans may do, as in :data:`lpsearch.config.Allowed`.
    """
    max_group = max_group if "joins" in allow else 1
    own = tuple(range(num_layers))
    depths = [Depth(own, Plan.baseline(num_layers), "fit")]

    def add(depth: Depth) -> bool:
        is_new = all(depth.count_groups(geometry) != other.count_groups(geometry) for other in depths)
        depths.extend([depth] * is_new)
        return is_new

    first_kind = geometry.describe_group(own[:1])
    for kind, group in find_group_kinds(geometry, max_group=max_group).items():
        most = num_layers // len(group)
        for count in dict.fromkeys((most, max(1, most // 2))):
            rest = num_layers - count * len(group) if kind != first_kind and count < most else 0
            plan = _cut([len(group)] * count + [1] * rest)
            add(Depth(group.layers * count + own[:1] * rest, plan, "fit"))
    drops = not DROPS.isdisjoint(allow)
    for depth in _list_stage_depths(geometry, num_layers, max_group) if drops else ():
        add(depth)
    mixtures = [list(_list_mixtures(num_layers, max_group))]
    if drops:
        mixtures = [*mixtures, list(_drop_some(num_layers, 1)), list(_drop_some(num_layers, max_group))]
    for candidates in mixtures:
        next(filter(add, candidates), None)
    return depths


def _list_windows(geometry: ProfileGeometry, max_group: int) -> list[tuple[int, ...]]:
    """Return runs of consecutive layers, at most so many, the first of each sequence of kinds."""
    found: dict[tuple[str, ...], tuple[int, ...]] = {}
    for size in range(1, max_group + 1):
        for first in range(geometry.num_layers - size + 1):
            found.setdefault(geometry.layer_kinds[first : first + size], tuple(range(first, first + size)))
    return list(found.values())


def _list_stages(
    geometry: ProfileGeometry, window: tuple[int, ...], branch: Literal["attention", "MLP"], *, drops: bool
) -> dict[str, tuple[int, ...]]:
    """Return the kinds of one stage of a group, by the layers that it keeps; no stage is the empty string."""
    sizes = range(len(window) + 1) if drops else (len(window),)
    found: dict[str, tuple[int, ...]] = {}
    for kept in chain.from_iterable(combinations(window, size) for size in sizes):
        group = Group(window, kept, ()) if branch == "attention" else Group(window, (), kept)
        found.setdefault("".join(geometry.describe_stages(group)), kept)
    return found


def _list_stage_depths(geometry: ProfileGeometry, num_layers: int, max_group: int) -> Iterator[Depth]:
    """Yield, for each kind of stage, groups that have it, one half of them without the other stage."""
    for branch, other in (("attention", "mlp"), ("MLP", "attention")):
        stages: dict[str, tuple[int, ...]] = {}
        for window in _list_windows(geometry, max_group):
            for stage, kept in _list_stages(geometry, window, branch, drops=True).items():  # type: ignore[arg-type]
                stages.setdefault(stage, kept)
        for kept in filter(None, stages.values()):
            count = num_layers // len(kept)
            half = max(1, count // 2) * len(kept)
            plan = _cut([len(kept)] * count)
            yield Depth(kept * count, plan.drop({other: range(plan.num_layers - half, plan.num_layers)}), "fit")


def _list_mixtures(num_layers: int, max_group: int) -> Iterator[Depth]:
    """Yield depths to check on, the best first: groups of every size, or three quarters of the layers alone."""
    if max_group == 1:
        num_layers -= num_layers // 4
        yield Depth(tuple(range(num_layers)), Plan.baseline(num_layers), "check")
        return
    for alone in (2, 1, 3, 4):
        yield Depth(tuple(range(num_layers)), _cut(list(_alternate(num_layers, max_group, alone))), "check")


def _drop_some(num_layers: int, max_group: int) -> Iterator[Depth]:
    """Yield depths to check on, the best first: layers alone and in groups, some of their branches dropped."""
    for attention_step, mlp_step, alone in ((3, 5, 2), (2, 5, 1), (2, 3, 1), (5, 4, 3)):
        sizes = [1] * num_layers if max_group == 1 else list(_alternate(num_layers, max_group, alone))
        dropped = {"attention": range(1, num_layers, attention_step), "mlp": range(2, num_layers, mlp_step)}
        yield Depth(tuple(range(num_layers)), _cut(sizes).drop(dropped), "check")


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
