"""Which beginnings of plans to keep, under a budget of bytes; imports no torch.

Two plans whose first groups are the same compute the same hidden states up to the first group that differs. The tree
holds states at group boundaries, each under the batch of windows and the groups that led to it. Over its budget it
gives up the boundary that is worth least: the chance that the next plan would resume there, times the layers that it
would then have to run again. A plan resumes at its deepest boundary held, so a boundary is worth only what lies between
it and the boundary held above it, and only to the plans that leave between it and those held below.

The chance of a beginning takes its groups as independent: a product, over its groups, of how often the last few plans
had this group at this layer. A search stays among neighbours of its best plans for a while and moves on, so counts are
halved every few plans.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from lpsearch.plan import Group

__all__ = ["Boundary", "PrefixTree", "Visit"]

State = TypeVar("State")

HALF_LIFE_PLANS = 8
"""Plans after which an observed group counts half; 4 to 15 were within 1 % of each other (studies/LOG.md)."""

UNSEEN_COUNT = 0.5
"""What a group never seen at a layer counts as."""


@dataclass(eq=False, slots=True)
class Boundary(Generic[State]):
    """A beginning of plans on one batch: what lies before one group boundary.

    Attributes:
        parent: the same beginning without its last group; None for the batch itself.
        step: the last group, or for the batch itself the batch.
        num_layers: layers before the boundary.
        nbytes: bytes that its state takes, or will take when it is computed; 0 where none is held.
        state: the hidden states there; None where none is held.
    """

    parent: Boundary[State] | None
    step: Hashable
    num_layers: int
    nbytes: int = 0
    state: State | None = None
    children: dict[Hashable, Boundary[State]] = field(default_factory=dict)


@dataclass(frozen=True)
class Visit(Generic[State]):
    """How to run a plan on a batch.

    Attributes:
        resume: the deepest boundary of the plan whose state is held; None to begin at the first layer.
        state: the state there. It stays valid during the visit, even where the boundary itself had to make room.
        keep: boundaries after it whose states :meth:`PrefixTree.hold` takes during the visit, ascending.
    """

    resume: Boundary[State] | None
    state: State | None
    keep: tuple[Boundary[State], ...]


class PrefixTree(Generic[State]):
    """States at the group boundaries of plans, the most useful ones within a budget.

    What is worth keeping of a plan is decided before it runs, so that the budget holds at every moment; only the state
    that a visit resumes from can be an extra one.

    Args:
        budget_bytes: most bytes to hold; 0 holds nothing.
    """

    def __init__(self, *, budget_bytes: int) -> None:
        """Begin empty."""
        self._budget_bytes = budget_bytes
        self._batches: dict[Hashable, Boundary[State]] = {}
        self._held: dict[Boundary[State], None] = {}
        self._held_bytes = 0
        self._num_plans = 0
        self._longest_group = 2
        self._last_groups: Sequence[Group] | None = None
        # What was seen: the count and the plan number that it was last brought up to.
        self._counts: dict[Hashable, tuple[float, int]] = {}

    def __len__(self) -> int:
        """Return the number of boundaries held."""
        return len(self._held)

    @property
    def held_bytes(self) -> int:
        """Bytes of the states held."""
        return self._held_bytes

    @property
    def budget_bytes(self) -> int:
        """Most bytes to hold."""
        return self._budget_bytes

    def list_states(self) -> list[State]:
        """Return every state held."""
        return [boundary.state for boundary in self._held if boundary.state is not None]

    def clear(self, *, budget_bytes: int | None = None) -> None:
        """Give up every state.

        Args:
            budget_bytes: a new budget; None leaves it.
        """
        self._batches.clear()
        self._held.clear()
        self._held_bytes = 0
        if budget_bytes is not None:
            self._budget_bytes = budget_bytes

    @contextmanager
    def visit(self, batch: Hashable, groups: Sequence[Group], *, state_bytes: int) -> Iterator[Visit[State]]:
        """Look up a plan that is about to run on a batch, and make room for those of its states worth keeping.

        Args:
            batch: names the windows that run together; states are shared within the same batch only.
            groups: the groups of the plan. Its last boundary is the end of the model, where nothing is left to save.
            state_bytes: bytes of one state of this batch.

        Yields:
            Where to resume and what to hold. What is not held by the end of the block is given up.
        """
        if self._budget_bytes <= 0:
            yield Visit(None, None, ())
            return
        self._count(batch, groups)
        boundary = self._batches.setdefault(batch, Boundary(None, batch, 0))
        resume, beyond = None, list[Boundary[State]]()
        for group in groups[:-1]:
            if group not in boundary.children:
                boundary.children[group] = Boundary(boundary, group, boundary.num_layers + len(group))
            boundary = boundary.children[group]
            beyond.append(boundary)
            if boundary.state is not None:
                resume = boundary
                beyond.clear()
        state = None if resume is None else resume.state
        for boundary in beyond:
            self._reserve(boundary, state_bytes)
        self._make_room()
        keep = tuple(boundary for boundary in beyond if boundary.nbytes)
        try:
            yield Visit(resume, state, keep)
        finally:
            for boundary in keep:
                if boundary in self._held and boundary.state is None:
                    self._give_up(boundary)

    def hold(self, boundary: Boundary[State], state: State, *, nbytes: int) -> None:
        """Keep the state at a boundary that the visit asked for.

        Args:
            boundary: one of the visit's ``keep``.
            state: the hidden states there.
            nbytes: bytes that they really take.
        """
        if boundary in self._held:  # otherwise the tree was cleared meanwhile
            self._held_bytes += nbytes - boundary.nbytes
            boundary.nbytes, boundary.state = nbytes, state

    def _reserve(self, boundary: Boundary[State], nbytes: int) -> None:
        self._held[boundary] = None
        boundary.nbytes = nbytes
        self._held_bytes += nbytes

    def _give_up(self, boundary: Boundary[State]) -> None:
        """Release a boundary's state, and the branch of the tree that led to nothing else."""
        del self._held[boundary]
        self._held_bytes -= boundary.nbytes
        boundary.nbytes, boundary.state = 0, None
        while not boundary.nbytes and not boundary.children:
            if boundary.parent is None:
                del self._batches[boundary.step]
                return
            del boundary.parent.children[boundary.step]
            boundary = boundary.parent

    def _make_room(self) -> None:
        """Give up the boundaries worth least until the rest fits."""
        if self._held_bytes <= self._budget_bytes:
            return
        worth = _Worth(self)
        # Giving one up only raises the worth of those beside it, so a stale least is found by looking again.
        heap = [(worth.compute(boundary), order, boundary) for order, boundary in enumerate(self._held)]
        heapq.heapify(heap)
        while self._held_bytes > self._budget_bytes:
            stale, order, boundary = heapq.heappop(heap)
            current = worth.compute(boundary)
            if current > stale:
                heapq.heappush(heap, (current, order, boundary))
            else:
                worth.remove(boundary)
                self._give_up(boundary)

    # ---- What the next plan may begin with ---------------------------------------------------------------------------

    def _count(self, batch: Hashable, groups: Sequence[Group]) -> None:
        if groups != self._last_groups:  # the batches of one plan are one moment
            self._num_plans += 1
            self._last_groups = groups
            self._longest_group = max(self._longest_group, *map(len, groups))
        for key in (batch, *((batch, group) for group in groups), *((batch, group[0]) for group in groups)):
            self._counts[key] = (self._read_count(key) + 1, self._num_plans)

    def _read_count(self, key: Hashable) -> float:
        count, counted_at = self._counts.get(key, (0.0, self._num_plans))
        return count * float(0.5 ** ((self._num_plans - counted_at) / HALF_LIFE_PLANS))

    def _compute_chance(self, count: float, started: float) -> float:
        """Return the chance of a group where the plans that start one there are ``started``.

        The chances of all groups that may start there add up to 1. If they added up to more, a boundary whose branches
        are all held would seem worse than useless, and those that most plans share would be given up first.
        """
        return (count + UNSEEN_COUNT) / (started + self._longest_group * UNSEEN_COUNT)

    def _walk(self) -> Iterator[tuple[Boundary[State], float, Boundary[State] | None]]:
        """Yield every boundary held, the chance that a plan begins with it, and the boundary held above it."""
        chances: dict[Hashable, float] = {}
        for batch, root in self._batches.items():
            stack = [(root, self._read_count(batch), root)]
            while stack:
                boundary, chance, above = stack.pop()
                if boundary.nbytes:
                    yield boundary, chance, above if above.nbytes else None
                    above = boundary
                for group, child in boundary.children.items():
                    key = (batch, group)
                    if key not in chances:
                        started = self._read_count((batch, boundary.num_layers))
                        chances[key] = self._compute_chance(self._read_count(key), started)
                    stack.append((child, chance * chances[key], above))


class _Worth(Generic[State]):
    """What each boundary held would save, kept up to date while boundaries are removed."""

    def __init__(self, tree: PrefixTree[State]) -> None:
        self._chance: dict[Boundary[State], float] = {}
        self._above: dict[Boundary[State], Boundary[State] | None] = {}
        self._below: dict[Boundary[State], dict[Boundary[State], None]] = {}
        for boundary, chance, above in tree._walk():
            self._chance[boundary] = chance
            self._above[boundary] = above
            self._below[boundary] = {}
            if above is not None:
                self._below[above][boundary] = None

    def compute(self, boundary: Boundary[State]) -> float:
        """Return the layers that the next plan is expected to save by this boundary."""
        above = self._above[boundary]
        layers = boundary.num_layers - (0 if above is None else above.num_layers)
        return layers * (self._chance[boundary] - sum(self._chance[below] for below in self._below[boundary]))

    def remove(self, boundary: Boundary[State]) -> None:
        """Let the boundary above take over the plans of one that is given up."""
        above = self._above.pop(boundary)
        below = self._below.pop(boundary)
        for child in below:
            self._above[child] = above
        if above is not None:
            del self._below[above][boundary]
            self._below[above].update(below)
