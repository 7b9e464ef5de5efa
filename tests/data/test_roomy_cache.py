"""A cache with room holds what transformers' own holds, and takes its memory once."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from lpsearch.data.roomy_cache import RoomyLayer, build_roomy_cache
from tests.tiny_models import build_tiny_model

SEQ_LEN = 24


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "mixtral", "qwen3"])
@torch.inference_mode()
def test_steps_are_those_with_the_cache_of_transformers(family: str) -> None:
    model = build_tiny_model(family)
    caches = build_roomy_cache(model.config, SEQ_LEN), DynamicCache(config=model.config)
    tokens = torch.randint(3, 90, (2, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    addresses = set()
    # A first part of several tokens, then one at a time up to the last that there is room for.
    for start, stop in [(0, 3), *((i, i + 1) for i in range(3, SEQ_LEN))]:
        logits = [
            model(input_ids=tokens[:, start:stop], past_key_values=cache, use_cache=True).logits for cache in caches
        ]
        assert torch.equal(*logits)
        roomy = [layer for layer in caches[0].layers if isinstance(layer, RoomyLayer)]
        addresses.add(tuple(layer.keys.data_ptr() for layer in roomy))
    assert roomy
    assert len(addresses) == 1
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
    assert caches[0].get_seq_length() == SEQ_LEN
