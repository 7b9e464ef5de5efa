"""A KV cache for windows whose length is known: it takes its memory once, and a step writes one token."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

__all__ = ["RoomyLayer", "build_roomy_cache"]


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call,unused-ignore]
    """The cache of one layer, with room for a whole window.

    transformers' own joins what it has and the new token into a new tensor, so that every step copies the whole cache.
    The values are the same, as views of a larger tensor.

    Args:
        capacity: tokens of a window at most.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self._capacity, self._length = capacity, 0
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens, (batch, heads, new, head_dim), behind the others; return all of them."""
        new = key_states, value_states
        if self._room is None:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            first, second = (states.new_empty((*states.shape[:2], self._capacity, states.shape[3])) for states in new)
            self._room = first, second
        start, self._length = self._length, self._length + key_states.shape[-2]
        for room, states in zip(self._room, new, strict=True):
            room[:, :, start : self._length] = states
        self.keys, self.values = (room[:, :, : self._length] for room in self._room)
        return self.keys, self.values


def build_roomy_cache(config: PretrainedConfig, capacity: int) -> DynamicCache:
    """Build an empty cache whose layers of full attention have room for windows of so many tokens.

    Layers of other kinds, which keep less than a window, stay as they are.
    """
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
