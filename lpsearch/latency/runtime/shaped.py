"""Decoders by shape: random weights, any plan, one plan's memory for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lpsearch.errors import LpsearchError
from lpsearch.latency.architecture import Architecture
from lpsearch.latency.runtime.decoder import Decoder, RunMode
from lpsearch.latency.runtime.memory import Workspace
from lpsearch.latency.sums import OneRank, Ranks
from lpsearch.latency.weights import (
    count_cache_elements,
    count_weight_elements,
    split_vocabulary,
    take_random_weights,
)
from lpsearch.plan import Plan

__all__ = ["ShapedDecoders", "count_fitting_layers", "select_layers"]

_SLACK = 1 << 16  # elements a layer that plans may need more than the baseline, for alignment


def select_layers(architecture: Architecture, layers: Sequence[int]) -> Architecture:
    """Return an architecture with some of the layers, in any order and number; only their kinds matter."""
    return dataclasses.replace(architecture, kinds=tuple(architecture.kinds[layer_idx] for layer_idx in layers))


class ShapedDecoders:
    """Builds decoders of one shape under many plans, which share weights, cache and graph memory and run in turn.

    Args:
        architecture: the shape.
        batch_size: sequences.
        capacity: tokens that the cache holds.
        device: where to run.
        dtype: of weights and cache.
        num_layers: most layers that a plan may have; None for the model's.
        ranks: the ranks that share the model.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        num_layers: int | None = None,
        batch_size: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        ranks: Ranks | None = None,
    ) -> None:
        """Take the memory of the unmodified model, or of so many of its layers.

        Raises:
            ConfigError: if the ranks do not divide the model.
        """
        self.ranks = ranks or OneRank()
        self.architecture = architecture
        self.device = device
        self._batch_size, self._capacity = batch_size, capacity
        num_ranks = self.ranks.num_ranks
        architecture.check_ranks(num_ranks)
        num_layers = num_layers or architecture.num_layers
        baseline = Plan.baseline(num_layers)
        num_weights = count_weight_elements(architecture, baseline, num_ranks) + _SLACK
        self._weights = Workspace(num_elements=num_weights, dtype=dtype, device=device)
        self._caches = Workspace(
            num_elements=num_layers
            * count_cache_elements(architecture, batch_size=batch_size, capacity=capacity, num_ranks=num_ranks)
            + _SLACK,
            dtype=dtype,
            device=device,
        )
        rows = split_vocabulary(architecture, num_ranks)
        ends = Workspace(
            num_elements=2 * architecture.vocab_size * architecture.hidden_size + 128, dtype=dtype, device=device
        )
        self._embedding = ends.take((architecture.vocab_size, architecture.hidden_size))
        self._head = ends.take((rows, architecture.hidden_size))
        self._head = self._head[: architecture.vocab_size - self.ranks.rank * rows]
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def build(
        self, plan: Plan, *, length: int, mode: RunMode, layers: Sequence[int] | None = None, ranks: Ranks | None = None
    ) -> Decoder:
        """Build a decoder with a cache that is taken to hold ``length`` tokens.

        Args:
            plan: groups over the layers.
            length: tokens cached.
            mode: how steps run.
            layers: layers of the architecture that the plan is over; None for all.
            ranks: another way of adding up over the same ranks.
        """
        architecture = self.architecture if layers is None else select_layers(self.architecture, layers)
        ranks = ranks or self.ranks
        weights = take_random_weights(
            architecture,
            plan,
            self._weights,
            embedding=self._embedding,
            head=self._head,
            rank=ranks.rank,
            num_ranks=ranks.num_ranks,
        )
        self._caches.rewind()
        decoder = Decoder(
            architecture,
            weights,
            batch_size=self._batch_size,
            capacity=self._capacity,
            mode=mode,
            ranks=ranks,
            cache_workspace=self._caches,
            pool=self._pool,
        )
        decoder.set_length(length)
        return decoder

    def build_prefill(self, decoder: Decoder, *, num_tokens: int) -> Callable[[], object]:
        """Return a function that prefills so many random tokens a sequence."""
        generator = torch.Generator().manual_seed(0)
        shape = (self._batch_size, num_tokens)
        tokens: Tensor = torch.randint(self.architecture.vocab_size, shape, generator=generator).to(self.device)
        return decoder.capture_prefill(tokens)


def count_fitting_layers(
    architecture: Architecture,
    *,
    batch_size: int,
    capacity: int,
    num_rows: int,
    dtype: torch.dtype,
    num_ranks: int,
    usable_bytes: int,
    least: int,
) -> int:
    """Return how many layers fit into a rank's memory, at most those of the model.

    Args:
        architecture: the shape.
        batch_size: sequences.
        capacity: tokens that the cache holds.
        num_rows: tokens of all sequences that run at once.
        dtype: of weights and cache.
        num_ranks: ranks that share the model.
        usable_bytes: memory of a rank.
        least: fewest layers that are of use.

    Raises:
        LpsearchError: if fewer than that fit: how many sequences or tokens would.
    """
    baseline = Plan.baseline(architecture.num_layers)
    layer = count_weight_elements(architecture, baseline, num_ranks) // architecture.num_layers
    token = count_cache_elements(architecture, batch_size=1, capacity=1, num_ranks=num_ranks)
    ends = 2 * architecture.vocab_size * architecture.hidden_size
    # What one group's activations take, gate and up the most of it, and float32 copies in plain attention.
    row = 8 * architecture.hidden_size + 8 * architecture.intermediate_size // num_ranks
    working = batch_size * 2 * architecture.vocab_size + num_rows * row
    room = usable_bytes // dtype.itemsize - ends - working
    fitting = min(architecture.num_layers, room // (layer + batch_size * capacity * token))
    if fitting >= min(architecture.num_layers, least):
        return int(fitting)
    needed = (ends + working + least * (layer + batch_size * capacity * token)) * dtype.itemsize
    tokens = max(0, (room // least - layer) // token)
    mend = (
        f"what fits is {tokens} tokens over all sequences, e.g. batch {batch_size} with context {tokens // batch_size}"
        if tokens > batch_size
        else "not even the weights fit: use more ranks (--tp), or --latency off"
    )
    raise LpsearchError(
        f"not enough memory to measure latency: {least} layers with batch {batch_size} and {capacity} tokens need "
        f"{needed / 1e9:.1f} GB a rank, {usable_bytes / 1e9:.1f} GB can be used; {mend}"
    )
