"""What a walk through a plan knows at the ends of its groups, kept for other plans that begin alike.

What a pass of a refit finds at a group depends on the groups up to there alone: on the states that reach it, on what
the unmodified model computes, and on the weights that were fitted before it. A plan that begins like an earlier one
therefore walks from the first difference, to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from lpsearch.evaluation.prefix_tree import PrefixTree
from lpsearch.plan import Group

__all__ = ["Beginning", "BeginningCache", "TargetStates"]

Product = TypeVar("Product")


@dataclass(frozen=True)
class Beginning(Generic[Product]):
    """What is known after the first groups of a plan.

    Attributes:
        num_layers: layers of these groups.
        states: for each batch of windows, the hidden states there along the plan, (batch, seq, hidden).
        weights: the parameters that were fitted by then, by name.
        products: the regressions by then.
    """

    num_layers: int
    states: tuple[Tensor, ...]
    weights: Mapping[str, Tensor]
    products: tuple[Product, ...]


class TargetStates:
    """What the unmodified model computes at the boundaries of its layers, on every batch of the windows.

    Some boundaries are kept, evenly spread, as many as fit; the others are computed again from the nearest one before.

    Args:
        entered: for each batch the first layer's input, (batch, seq, hidden).
        num_layers: of the model.
        run_layer: runs a layer on a batch, by their numbers.
        budget_bytes: most bytes of states to keep besides the latest; 0 keeps none.
    """

    def __init__(
        self,
        entered: Sequence[Tensor],
        *,
        num_layers: int,
        run_layer: Callable[[int, int, Tensor], Tensor],
        budget_bytes: int,
    ) -> None:
        self._entered = tuple(entered)
        self._run_layer = run_layer
        state_bytes = sum(state.nbytes for state in entered)
        num_kept = min(num_layers, budget_bytes // max(1, state_bytes))
        self._spacing = -(-num_layers // num_kept) if num_kept else 0
        self._kept: dict[int, tuple[Tensor, ...]] = {}
        self._latest: tuple[int, tuple[Tensor, ...]] = (0, self._entered)

    def get(self, num_layers: int) -> tuple[Tensor, ...]:
        """Return the states after the first ``num_layers`` layers, (batch, seq, hidden) for each batch."""
        known = {0: self._entered, **self._kept, self._latest[0]: self._latest[1]}
        begun = max(count for count in known if count <= num_layers)
        states = known[begun]
        for layer_idx in range(begun, num_layers):
            states = tuple(self._run_layer(layer_idx, batch, state) for batch, state in enumerate(states))
            if self._spacing and (layer_idx + 1) % self._spacing == 0:
                self._kept[layer_idx + 1] = states
        self._latest = (num_layers, states)
        return states

    def clear(self) -> None:
        """Give up what is kept, and keep nothing from now on."""
        self._spacing = 0
        self._kept.clear()
        self._latest = (0, self._entered)


class BeginningCache(Generic[Product]):
    """Beginnings of the plans that were walked, within a budget of bytes.

    The weights of a beginning count at each of its boundaries, although these share them, so that less is held than is
    counted. A walk itself may exceed the budget by the weights that it finds.

    Args:
        budget_bytes: most bytes to keep; 0 keeps nothing.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._tree: PrefixTree[Beginning[Product]] = PrefixTree(budget_bytes=budget_bytes)

    @property
    def num_held(self) -> int:
        """Beginnings that are kept."""
        return len(self._tree)

    def clear(self) -> None:
        """Give up what is kept, and keep nothing from now on."""
        self._tree.clear(budget_bytes=0)

    @contextmanager
    def visit(
        self, groups: Sequence[Group], *, state_bytes: int
    ) -> Iterator[tuple[Beginning[Product] | None, Callable[[Beginning[Product]], None]]]:
        """Look up a plan that is about to be walked.

        Args:
            groups: of the plan.
            state_bytes: bytes of the states of one boundary.

        Yields:
            Its longest beginning that is kept, if any, and a function to call with each further one.
        """
        with self._tree.visit(None, groups, state_bytes=state_bytes) as visit:
            wanted = {boundary.num_layers: boundary for boundary in visit.keep}

            def keep(beginning: Beginning[Product]) -> None:
                boundary = wanted.get(beginning.num_layers)
                if boundary is not None:
                    num_bytes = state_bytes + sum(weight.nbytes for weight in beginning.weights.values())
                    self._tree.hold(boundary, beginning, nbytes=num_bytes)

            yield visit.state, keep
