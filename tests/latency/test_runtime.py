"""The runtime computes the model: every family, fused and not, prompt and steps, against transformers with the plan."""

from __future__ import annotations

import copy

import pytest
import torch

from lpsearch.errors import ConfigError, FamilyError
from lpsearch.latency.runtime.decoder import build_decoder
from lpsearch.models.traits import read_traits
from lpsearch.plan import Plan
from lpsearch.transform import applied_plan
from tests.tiny_models import RUNTIME_FAMILIES, VOCAB_SIZE, build_tiny_model
from tests.tolerances import BFLOAT16_LOGITS, FLOAT32_LOGITS

PLANS = {
    "unmodified": Plan.baseline(6),
    "pairs": Plan.from_groups([[0], [1, 2], [3, 4], [5]]),
    "three": Plan.from_groups([[0, 1, 2], [3], [4, 5]]),
    "four": Plan.from_groups([[0], [1, 2, 3, 4], [5]]),
}
DROPPING = {
    "branches": PLANS["unmodified"].drop({"attention": [0, 3], "mlp": [1, 3, 5]}),
    "unequal": PLANS["three"].drop({"attention": [1, 3, 4], "mlp": [0, 2]}),
    "one of each": PLANS["pairs"].drop({"attention": [1, 3, 4], "mlp": [2, 3, 4]}),
}
OPTIONS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "granite": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"attention_bias": True},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
}
CASES = [(family, {}) for family in RUNTIME_FAMILIES] + list(OPTIONS.items())
IDS = [family + ("-options" if options else "") for family, options in CASES]


def build_prompt(length: int = 11) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (2, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def continue_greedily(decoder, prompt: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the new tokens (batch, num) and the logits that chose them (batch, num, vocab)."""
    logits, tokens = [decoder.prefill(prompt)], [decoder.tokens.clone()]
    for _ in range(num_tokens - 1):
        logits.append(decoder.decode_logits())
        tokens.append(decoder.tokens.clone())
    return torch.cat(tokens, dim=1), torch.stack(logits, dim=1)


@torch.no_grad()
def reference_logits(model, plan: Plan, prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return transformers' logits, under the plan, at the positions that chose the tokens, in one forward.

    If the largest of each is the token that followed, greedy decoding would have chosen the same ones.
    """
    if model.config.model_type == "gemma2":
        model.set_attn_implementation("eager")  # older transformers default to one that leaves the softcap out
    with applied_plan(model, plan):
        read = torch.cat([prompt, tokens[:, :-1]], dim=1)
        return model(input_ids=read, use_cache=False).logits[:, prompt.shape[1] - 1 :]


@pytest.mark.parametrize(("family", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("name", PLANS)
def test_the_runtime_is_the_model_with_the_plan(family, options, name):
    model = build_tiny_model(family, **options)
    prompt = build_prompt()
    tokens, logits = continue_greedily(build_decoder(model, PLANS[name], batch_size=2, capacity=80), prompt, 64)
    expected = reference_logits(model, PLANS[name], prompt, tokens)
    assert torch.equal(expected.argmax(-1), tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=FLOAT32_LOGITS)


def drop_by_zeros(model, plan: Plan):
    """Return a copy of a model whose dropped branches add nothing, since their last product gives zero."""
    model = copy.deepcopy(model)
    outputs = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}
    for branch, layers in plan.dropped.items():
        for layer_idx in layers:
            for parameter in model.model.layers[layer_idx].get_submodule(outputs[branch]).parameters():
                parameter.zero_()
    return model


@pytest.mark.parametrize(("family", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("name", DROPPING)
def test_a_branch_that_is_dropped_adds_nothing(family, options, name):
    model, plan = build_tiny_model(family, **options), DROPPING[name]
    prompt = build_prompt()
    tokens, logits = continue_greedily(build_decoder(model, plan, batch_size=2, capacity=40), prompt, 24)
    joined = Plan.from_groups(plan.to_lists())
    expected = reference_logits(drop_by_zeros(model, plan), joined, prompt, tokens)
    assert torch.equal(expected.argmax(-1), tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=FLOAT32_LOGITS)


def test_a_branch_that_is_dropped_reads_nothing():
    model = build_tiny_model("llama")
    decoder = build_decoder(model, PLANS["pairs"], batch_size=2, capacity=16)
    plan = PLANS["pairs"].drop({"attention": [1, 3, 4], "mlp": [0, 5]})
    fewer = build_decoder(model, plan, batch_size=2, capacity=16)
    for each in (decoder, fewer):
        each.prefill(build_prompt())
    weights = [model.model.layers[layer_idx].self_attn for layer_idx in (1, 3, 4)]
    weights += [model.model.layers[layer_idx].mlp for layer_idx in (0, 5)]
    num_weights = sum(parameter.numel() for module in weights for parameter in module.parameters())
    num_cached = 3 * 2 * 2 * 2 * 12 * 8  # layers, keys and values, sequences, heads, tokens, elements
    assert decoder.count_step_bytes() - fewer.count_step_bytes() == 4 * (num_weights + num_cached)


def test_a_model_of_which_nothing_is_left_is_its_embedding_and_head():
    model = build_tiny_model("llama")
    nothing = PLANS["pairs"].drop({"attention": range(6), "mlp": range(6)})
    prompt = build_prompt()
    logits = build_decoder(model, nothing, batch_size=2, capacity=16).prefill(prompt)
    expected = model.lm_head(model.model.norm(model.model.embed_tokens(prompt[:, -1])))
    torch.testing.assert_close(logits, expected, rtol=0, atol=FLOAT32_LOGITS)


@pytest.mark.parametrize("family", RUNTIME_FAMILIES)
def test_bfloat16_stays_near_float32(family):
    model = build_tiny_model(family)
    prompt = build_prompt()
    for plan in (PLANS["unmodified"], PLANS["pairs"]):
        with torch.no_grad(), applied_plan(model, plan):
            expected = model(input_ids=prompt, use_cache=False).logits
        rounded = build_tiny_model(family).to(torch.bfloat16)
        logits = build_decoder(rounded, plan, batch_size=2, capacity=16).prefill(prompt).float()
        error = (logits - expected[:, -1]).norm() / expected[:, -1].norm()
        assert error < BFLOAT16_LOGITS


def test_a_step_runs_at_any_length_it_is_told():
    model = build_tiny_model("mistral")
    decoder = build_decoder(model, PLANS["pairs"], batch_size=2, capacity=40)
    decoder.prefill(build_prompt())
    decoder.run_step()
    assert decoder.length == 11
    decoder.step()
    assert decoder.length == 12
    held = decoder.count_step_bytes()
    decoder.set_length(30)  # attention slides over 5 tokens, which were held before
    assert decoder.count_step_bytes() == held
    with pytest.raises(ConfigError, match="40 tokens cannot hold 40"):
        decoder.set_length(40)


def test_what_the_runtime_does_not_compute_is_refused():
    with pytest.raises(FamilyError, match="mixtral: the runtime computes"):
        read_traits(build_tiny_model("mixtral").config).check_runtime()
    with pytest.raises(FamilyError, match="activation 'relu'"):
        read_traits(build_tiny_model("llama", hidden_act="relu").config).check_runtime()
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        build_decoder(build_tiny_model("llama"), PLANS["pairs"], batch_size=1, capacity=8, mode="graph")


def test_members_that_attend_differently_keep_separate_attentions():
    traits = read_traits(build_tiny_model("gemma3_text").config)
    assert [kind.name for kind in traits.kinds] == ["sliding", "sliding", "full"] * 2
    assert [part.layers for part in traits.split_group([1, 2, 3])] == [(1, 3), (2,)]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["graph", "compiled"])
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(("family", "options"), CASES, ids=IDS)
def test_captured_steps_are_eager_steps(family, options, batch_size, mode):
    """Graph against eager bit for bit; fused kernels against transformers in float32."""
    model = build_tiny_model(family, **options).to("cuda")
    prompt = build_prompt()[:batch_size].to("cuda")
    for plan in (PLANS["unmodified"], PLANS["three"], DROPPING["unequal"]):
        eager, captured = (
            build_decoder(model, plan, batch_size=batch_size, capacity=80, mode=m) for m in ("eager", mode)
        )
        eager.prefill(prompt)
        captured.prefill(prompt)
        tokens = [captured.tokens.clone()]
        for _ in range(63):
            eager.step()
            captured.step()
            tokens.append(captured.tokens.clone())
            assert torch.equal(captured.tokens, eager.tokens)
        logits = captured.decode_logits()
        tokens = torch.cat(tokens, dim=1)
        joined, read = Plan.from_groups(plan.to_lists()), torch.cat([tokens, tokens[:, :1]], dim=1)
        expected = reference_logits(drop_by_zeros(model, plan), joined, prompt, read)
        assert torch.equal(expected[:, :-1].argmax(-1), tokens)
        torch.testing.assert_close(logits, expected[:, -1], rtol=0, atol=FLOAT32_LOGITS)


@pytest.mark.gpu
def test_whichever_attention_is_captured_computes_the_same():
    model = build_tiny_model("llama").to("cuda")
    prompt = build_prompt().to("cuda")
    eager, fused, chosen = (
        build_decoder(model, PLANS["three"], batch_size=len(prompt), capacity=24, mode=mode)
        for mode in ("eager", "compiled", "compiled")
    )
    for decoder in (eager, fused, chosen):
        decoder.prefill(prompt)
    chosen.capture_fastest()
    for fused_attention in (True, False):
        fused.fused_attention = fused_attention
        fused.capture()
        for decoder in (eager, fused, chosen):
            decoder.step()
        assert torch.equal(fused.tokens, eager.tokens)
        assert torch.equal(chosen.tokens, eager.tokens)


@pytest.mark.gpu
def test_fused_steps_in_bfloat16_stay_near_float32():
    for family in RUNTIME_FAMILIES:
        model = build_tiny_model(family)
        prompt = build_prompt()[:1]
        tokens, expected = continue_greedily(build_decoder(model, PLANS["pairs"], batch_size=1, capacity=24), prompt, 2)
        rounded = build_tiny_model(family).to("cuda", torch.bfloat16)
        decoder = build_decoder(rounded, PLANS["pairs"], batch_size=1, capacity=24, mode="compiled")
        decoder.prefill(prompt.to("cuda"))
        decoder.tokens.copy_(tokens[:, :1])
        error = (decoder.decode_logits().cpu().float() - expected[:, 1]).norm() / expected[:, 1].norm()
        assert error < BFLOAT16_LOGITS, family
