"""Decoders by shape: random weights, any plan, one plan's memory for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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

__all__ = ["ShapedDecoders"]

_SLACK = 1 << 16  # elements a layer that plans may need more than the baseline, for alignment


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

    Raises:
        ConfigError: if the ranks do not divide the model.
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
        architecture = self.architecture
        if layers is not None:  # of a layer only its kind matters here
            architecture = dataclasses.replace(architecture, kinds=tuple(architecture.kinds[i] for i in layers))
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
