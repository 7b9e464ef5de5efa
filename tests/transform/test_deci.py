"""A plan as blocks of llama.cpp's ``deci``: their sizes, and the models that it computes otherwise."""

from __future__ import annotations

import re

import pytest

from lpsearch.models.traits import read_traits
from lpsearch.plan import Plan
from lpsearch.transform.deci import find_deci_obstacle, lay_out_blocks
from tests.fusing import MIXED
from tests.tiny_models import FAMILIES, build_tiny_config

UNCHANGED = Plan.baseline(6)

REFUSED = {
    "qwen3": ("qwen3", {"use_sliding_window": False}, "queries and keys are normed by head"),
    "gemma2": ("gemma2", {}, "norms what its attention and MLP put out"),
    "gemma3": ("gemma3_text", {}, "norms what its attention and MLP put out"),
    "olmo2": ("olmo2", {}, "norms what its attention and MLP put out"),
    "olmo3": ("olmo3", {}, "norms what its attention and MLP put out"),
    "glm4": ("glm4", {}, "norms what its attention and MLP put out"),
    "mistral with a window": ("mistral", {}, "slides over a window of 5 tokens"),
    "qwen2 with a window": ("qwen2", {}, "slides over a window of 5 tokens"),
    "smollm3": ("smollm3", {"use_sliding_window": False, "layer_types": None, "sliding_window": None}, "NoPE"),
    "mixtral": ("mixtral", {}, "mixture of experts"),
    "qwen3_moe": ("qwen3_moe", {}, "mixture of experts"),
    "gemma": ("gemma", {}, "activation 'gelu_pytorch_tanh', not SiLU"),
    "llama with GELU": ("llama", {"hidden_act": "gelu"}, "activation 'gelu', not SiLU"),
    "starcoder2": ("starcoder2", {}, "LayerNorms"),
    "phi": ("phi", {}, "read the same input"),
    "gpt_neox": ("gpt_neox", {}, "read the same input"),
    "cohere": ("cohere", {}, "read the same input"),
    "gpt_neox without parallel residual": ("gpt_neox_sequential", {}, "LayerNorms"),
    "dynamic scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        r"rotary embedding \(dynamic\) depend on the length",
    ),
}  # fmt: skip


COMPUTED = ("granite", "llama", "seed_oss")


@pytest.mark.parametrize("name", REFUSED)
def test_what_deci_computes_otherwise_is_named(name: str) -> None:
    family, options, reason = REFUSED[name]
    obstacle = find_deci_obstacle(read_traits(build_tiny_config(family, **options)))
    assert obstacle is not None
    assert re.search(reason, obstacle)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_computed_or_refused(family: str) -> None:
    """The tiny Mistral, Phi-3 and Qwen2 slide."""
    assert (find_deci_obstacle(read_traits(build_tiny_config(family))) is None) == (family in COMPUTED)


def test_a_window_as_long_as_the_context_is_none() -> None:
    for window, is_computed in ((128, True), (127, False)):
        config = build_tiny_config("mistral", sliding_window=window, max_position_embeddings=128)
        assert (find_deci_obstacle(read_traits(config)) is None) == is_computed


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (UNCHANGED, [(4, 2, 48)] * 6),
        (MIXED, [(4, 2, 48), (8, 4, 96), (12, 6, 144)]),
        (
            UNCHANGED.drop({"attention": [0, 3], "mlp": [2, 5]}),
            [
                (1, 1, 48),  # the first block must attend
                (4, 2, 48),
                (4, 2, 48),  # an attention and the MLP of the next layer
                (4, 2, 48),
                (4, 2, 32),  # an MLP of length 0 would take the attention along
            ],
        ),
        (UNCHANGED.drop({"attention": [1]}), [(4, 2, 48), (0, 0, 48), *[(4, 2, 48)] * 4]),
        (UNCHANGED.drop({"attention": range(6), "mlp": range(6)}), [(1, 1, 32)]),
    ],
)
def test_the_sizes_of_blocks(plan: Plan, expected: list[tuple[int, int, int]]) -> None:
    """Tiny layers have 4 heads, 2 key-value heads and 48 inner elements."""
    blocks = lay_out_blocks(read_traits(build_tiny_config("llama")), plan)
    assert [(block.num_heads, block.num_kv_heads, block.feed_forward_length) for block in blocks] == expected
