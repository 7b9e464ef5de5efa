"""A fused model compiles to one graph, as the stock model does: ``generate`` compiles a model with a static cache."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from lpsearch.plan import Plan
from lpsearch.transform import fuse_plan
from tests.tiny_models import build_tiny_model
from tests.tolerances import FLOAT32_LOGITS

PLAN = Plan.from_groups([[0], [1, 2], [3], [4, 5]])


@pytest.mark.parametrize("family", ["gemma3_text", "llama", "olmo2", "qwen3", "smollm3"])
def test_a_decode_step_is_one_graph(family):
    model = fuse_plan(build_tiny_model(family), PLAN)
    prompt = torch.randint(3, 90, (1, 8), generator=torch.Generator().manual_seed(0))
    token = torch.tensor([[5]])
    logits = []
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")  # raises where the graph would break
    with torch.no_grad():
        for step in (model.forward, compiled):
            cache = StaticCache(config=model.config, max_cache_len=32)
            model(prompt, past_key_values=cache, use_cache=True)
            logits.append(step(token, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=FLOAT32_LOGITS)
