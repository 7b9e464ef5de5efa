"""How the ranks that share a model add up, as the runtime and the timing see it."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

__all__ = ["AllReduceKind", "OneRank", "Ranks"]

AllReduceKind = Literal["none", "gloo", "nccl", "one_shot", "push"]


class Ranks(Protocol):
    """The ranks that share a model, seen from one of them.

    Attributes:
        rank: this one.
        num_ranks: how many.
        kind: how sums are made.
    """

    rank: int
    num_ranks: int
    kind: AllReduceKind

    def begin_step(self) -> None:
        """Say that a forward begins; every rank makes the same sums in the same order."""

    def all_reduce(self, partial: Tensor) -> Tensor:
        """Return the sum of a tensor over ranks; the argument may be overwritten."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, (num_ranks, ...)."""

    def barrier(self) -> None:
        """Wait for all ranks."""


class OneRank:
    """A model on one device."""

    rank: int = 0
    num_ranks: int = 1
    kind: AllReduceKind = "none"

    def begin_step(self) -> None:
        """Do nothing."""

    def all_reduce(self, partial: Tensor) -> Tensor:
        """Return the tensor."""
        return partial

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensor, (1, ...)."""
        return tensor[None]

    def barrier(self) -> None:
        """Do nothing."""
