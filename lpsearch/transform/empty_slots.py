"""The cache slot of an attention that a plan drops: it counts tokens and keeps none of them.

Transformers asks a cache for its length at the first slot, and for the sizes of a mask at the first slot of each kind
of attention (``Cache.get_seq_length``, ``Cache.get_mask_sizes``). A slot that nobody writes to would say 0 for ever, so
a dropped attention writes keys and values of width 0 to its own. They take no memory, and every kind of slot (growing,
sliding, static) goes on counting in its own way, also when the cache is cropped, reordered or reset.
"""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["count_tokens"]


class _EmptySlot(DynamicLayer):  # type: ignore[no-untyped-call]  # its base registers every class
    """A growing slot of keys of width 0; the class above takes one without numbers for one without tokens."""

    def get_seq_length(self) -> int:
        """Return the number of tokens."""
        return self.keys.shape[-2] if self.is_initialized and self.keys is not None and self.keys.dim() > 1 else 0


def count_tokens(cache: Cache, layer_idx: int, hidden_states: Tensor) -> None:
    """Let the slot of a dropped attention count the tokens that it would have kept.

    Args:
        cache: of the forward under way.
        layer_idx: the slot.
        hidden_states: what the attention would have read, (batch, seq, hidden).
    """
    if cache.layer_class_to_replicate is not None:  # slots are added when they are first used
        while len(cache.layers) <= layer_idx:
            cache.layers.append(cache.layer_class_to_replicate())
    batch, seq, _ = hidden_states.shape
    slot = cache.layers[layer_idx]
    if isinstance(slot, DynamicLayer) and not isinstance(slot, (DynamicSlidingWindowLayer, _EmptySlot)):
        cache.layers[layer_idx] = _EmptySlot()  # type: ignore[no-untyped-call]
        seq += slot.get_seq_length()  # which another plan kept
    states = hidden_states.new_empty((batch, 1, seq, 0))
    cache.update(states, states, layer_idx)
