"""A plan on a model: against the written-out equations, with caches, and off again without a trace."""

from __future__ import annotations

import copy
import gc
import itertools
import re
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, PreTrainedModel, StaticCache

from lpsearch.errors import FamilyError, ModelError, PlanError
from lpsearch.models.families import get_decoder, get_decoder_layers
from lpsearch.models.fingerprint import fingerprint_model
from lpsearch.plan import ModelIdentity, Plan, PlanMetadata
from lpsearch.transform import applied_plan, apply_plan, check_plan_model, undo_plan
from tests.tiny_models import FAMILIES, VOCAB_SIZE, build_left_padded_batch, build_tiny_model
from tests.tolerances import FLOAT32_GRADIENTS, FLOAT32_LOGITS
from tests.transform.reference import run_reference

PLANS = {
    "pairs": [[0, 1], [2, 3], [4, 5]],
    "pair and triple": [[0], [1, 2], [3, 4, 5]],
    "quadruple": [[0, 1, 2, 3], [4], [5]],
    "triple and pair": [[0, 1, 2], [3], [4, 5]],
}
MIXED = Plan.from_groups([[0], [1, 2], [3, 4, 5]])
PAIRS = Plan.from_groups([[0, 1], [2, 3], [4, 5]])
DROPPING = Plan.from_groups([[0], [1, 2], [3], [4, 5]], dropped={"attention": [0, 1, 3], "mlp": [2, 3]})
"""Drops the attention that every mask is sized by, a branch of each member of a pair, and a layer as a whole."""

MLP_ONLY = Plan.from_groups([[i] for i in range(6)], dropped={"attention": range(6)})
DROPPING_PLANS = {
    "branches": DROPPING,
    "every attention": MLP_ONLY,
    "every MLP": Plan.from_groups([[0, 1], [2], [3], [4], [5]], dropped={"mlp": range(6)}),
    "whole layers": Plan.from_groups([[i] for i in range(6)], dropped={"attention": [0, 5], "mlp": [0, 5]}),
    "the second members": Plan.from_groups(PAIRS.groups, dropped={"attention": [1, 3, 5], "mlp": [1, 3, 5]}),
}


def last_hidden_states(model: PreTrainedModel, **inputs: Any) -> Tensor:
    return get_decoder(model)(**inputs, use_cache=False).last_hidden_state


def attributes_of_modules(model: nn.Module) -> dict[str, dict[str, int]]:
    """What every module holds, to see that nothing was left: names of attributes, and number of hooks."""
    return {
        name: {
            key: len(value) if "hooks" in key and hasattr(value, "__len__") else -1 for key, value in vars(m).items()
        }
        for name, m in model.named_modules()
    }


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def family_model(family: str) -> PreTrainedModel:
    return build_tiny_model(family)


@pytest.fixture
def llama() -> PreTrainedModel:
    return build_tiny_model("llama")


@pytest.mark.parametrize("groups", PLANS.values(), ids=PLANS.keys())
def test_a_plan_obeys_the_equations(family: str, family_model: PreTrainedModel, groups: list[list[int]]) -> None:
    batch = build_left_padded_batch()
    tokens = batch["attention_mask"].bool()
    expected = run_reference(family_model, family=family, groups=groups, **batch)
    with applied_plan(family_model, Plan.from_groups(groups)):
        actual = last_hidden_states(family_model, **batch)
    torch.testing.assert_close(actual[tokens], expected[tokens], rtol=0, atol=FLOAT32_LOGITS)
    alone = run_reference(family_model, family=family, groups=[[i] for i in range(6)], **batch)
    untouched = last_hidden_states(family_model, **batch)
    torch.testing.assert_close(untouched[tokens], alone[tokens], rtol=0, atol=FLOAT32_LOGITS)
    assert (expected - alone)[tokens].abs().max() > 0.1  # the plan matters on this model


@pytest.mark.parametrize("plan", DROPPING_PLANS.values(), ids=DROPPING_PLANS.keys())
def test_dropped_branches_are_in_no_sum(family: str, family_model: PreTrainedModel, plan: Plan) -> None:
    batch = build_left_padded_batch()
    tokens = batch["attention_mask"].bool()
    expected = run_reference(family_model, family=family, groups=plan.to_lists(), dropped=plan.dropped, **batch)
    before = attributes_of_modules(family_model)
    with applied_plan(family_model, plan):
        actual = last_hidden_states(family_model, **batch)
    assert attributes_of_modules(family_model) == before
    torch.testing.assert_close(actual[tokens], expected[tokens], rtol=0, atol=FLOAT32_LOGITS)
    whole = run_reference(family_model, family=family, groups=plan.to_lists(), **batch)
    assert (expected - whole)[tokens].abs().max() > 0.1  # what is dropped matters on this model


def test_a_whole_layer_beside_one_of_which_nothing_is_left_is_the_layer_alone(family_model: PreTrainedModel) -> None:
    batch = build_left_padded_batch()
    dropped = {"attention": [0, 3, 5], "mlp": [0, 3, 5]}
    plans = [
        Plan.from_groups(groups, dropped=dropped)
        for groups in ([[0], [1], [2], [3], [4], [5]], [[0, 1], [2, 3], [4, 5]], [[0], [1], [2, 3], [4, 5]])
    ]
    logits = []
    for plan in plans:
        with applied_plan(family_model, plan):
            logits.append(family_model(**batch).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_a_model_without_any_branch_returns_its_embeddings(family_model: PreTrainedModel) -> None:
    plan = Plan.from_groups(PAIRS.groups, dropped={"attention": range(6), "mlp": range(6)})
    with applied_plan(family_model, plan):
        hidden_states = family_model(**build_left_padded_batch(), output_hidden_states=True).hidden_states
    assert len(hidden_states) == 7
    for layer_idx in range(1, 6):  # the last ones are normed
        assert torch.equal(hidden_states[layer_idx], hidden_states[0])


def test_baseline_and_undone_models_are_the_untouched_one_bit_for_bit(family_model: PreTrainedModel) -> None:
    batch = build_left_padded_batch()
    before = attributes_of_modules(family_model)
    untouched = family_model(**batch).logits
    assert apply_plan(family_model, Plan.baseline(6)) is family_model
    assert torch.equal(family_model(**batch).logits, untouched)
    assert attributes_of_modules(family_model) == before
    apply_plan(family_model, MIXED)
    assert not torch.equal(family_model(**batch).logits, untouched)
    assert undo_plan(family_model) is family_model
    assert torch.equal(family_model(**batch).logits, untouched)
    assert attributes_of_modules(family_model) == before
    assert torch.equal(undo_plan(family_model)(**batch).logits, untouched)  # undoing nothing is allowed


def test_a_layer_alone_in_its_group_runs_bit_for_bit(family_model: PreTrainedModel) -> None:
    batch = build_left_padded_batch()
    untouched = family_model(**batch, output_hidden_states=True).hidden_states
    with applied_plan(family_model, Plan.from_groups([[0], [1], [2], [3], [4, 5]])):
        planned = family_model(**batch, output_hidden_states=True).hidden_states
    for before_layer in range(5):  # the inputs of layers 0 to 4, and so the outputs of layers 0 to 3
        assert torch.equal(planned[before_layer], untouched[before_layer])


@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("plan", "prefills"),
    [(MIXED, [9]), (DROPPING, [4, 9]), (MLP_ONLY, [9])],  # ends of parts that are read at once
    ids=["mixed", "dropping", "every attention dropped"],
)
def test_cached_decoding_equals_the_full_forward(
    family_model: PreTrainedModel, cache_kind: str, plan: Plan, prefills: list[int]
) -> None:
    batch = build_left_padded_batch(lengths=(16, 11))
    input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    if cache_kind == "static":
        cache = StaticCache(config=family_model.config, max_cache_len=24)
    else:
        cache = DynamicCache(config=family_model.config)
    with applied_plan(family_model, plan):
        full = family_model(**batch, use_cache=False).logits
        parts = []
        for start, end in itertools.pairwise([0, *prefills, *range(10, 17)]):  # the prefills, then one token at a time
            step = family_model(
                input_ids=input_ids[:, start:end],
                attention_mask=attention_mask[:, :end],
                past_key_values=cache,
                use_cache=True,
            )
            parts.append(step.logits)
    tokens = attention_mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[tokens], full[tokens], rtol=0, atol=FLOAT32_LOGITS)
    for layer_idx, slot in enumerate(cache.layers):
        assert int(cache.get_seq_length(layer_idx)) in (16, getattr(slot, "max_cache_len", 16))  # a full window of one
        is_dropped = layer_idx in plan.dropped["attention"]
        assert (slot.keys.numel() == 0, slot.values.numel() == 0) == (is_dropped, is_dropped)


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
@pytest.mark.parametrize("plan", [MIXED, DROPPING, MLP_ONLY], ids=["mixed", "dropping", "every attention dropped"])
def test_generate_equals_argmax_of_full_forwards(
    family_model: PreTrainedModel, cache_implementation: str, plan: Plan
) -> None:
    batch = build_left_padded_batch()
    with applied_plan(family_model, plan):
        generated = family_model.generate(
            **batch, max_new_tokens=6, do_sample=False, cache_implementation=cache_implementation
        )
        input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
        for _ in range(6):
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            logits = family_model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            ).logits
            input_ids = torch.cat([input_ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            attention_mask = torch.cat([attention_mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    assert torch.equal(generated, input_ids)


@pytest.mark.parametrize("family_name", ["llama", "gemma3_text", "gpt_neox"])
def test_beams_and_caches_of_every_make_follow_a_plan_that_drops(family_name: str) -> None:
    model = build_tiny_model(family_name)
    batch = build_left_padded_batch()
    with applied_plan(model, DROPPING):
        uncached = model.generate(**batch, max_new_tokens=6, num_beams=3, do_sample=False, use_cache=False)
        assert torch.equal(model.generate(**batch, max_new_tokens=6, num_beams=3, do_sample=False), uncached)
        greedy = model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=False)
        chunked = model.generate(**batch, max_new_tokens=6, do_sample=False, prefill_chunk_size=4)
        assert torch.equal(chunked, greedy)
    cache = DynamicCache()  # its slots are added when they are used
    rows = batch["input_ids"][:1]
    with applied_plan(model, DROPPING):
        full = model(input_ids=rows, use_cache=False).logits
        model(input_ids=rows[:, :3], past_key_values=cache)
        model(input_ids=rows[:, 3:9], past_key_values=cache)
        cache.crop(-5)
        assert [cache.get_seq_length(layer_idx) for layer_idx in range(6)] == [4] * 6
        rest = model(input_ids=rows[:, 4:], past_key_values=cache).logits
        torch.testing.assert_close(rest, full[:, 4:], rtol=0, atol=FLOAT32_LOGITS)
    cache.reset()
    untouched = model(input_ids=rows, use_cache=False).logits
    steps = [model(input_ids=rows[:, i : i + 1], past_key_values=cache).logits for i in range(rows.shape[1])]
    torch.testing.assert_close(torch.cat(steps, dim=1), untouched, rtol=0, atol=FLOAT32_LOGITS)


def test_a_plan_that_drops_goes_on_with_a_cache_of_the_unmodified_model(llama: PreTrainedModel) -> None:
    """What is kept of the first tokens is the unmodified model's; positions and masks count them."""
    rows = build_left_padded_batch()["input_ids"][:1]
    at_once, stepwise = DynamicCache(config=llama.config), DynamicCache(config=llama.config)
    for cache in (at_once, stepwise):
        llama(input_ids=rows[:, :9], past_key_values=cache)
    with applied_plan(llama, DROPPING):
        expected = llama(input_ids=rows[:, 9:], past_key_values=at_once).logits
        steps = [llama(input_ids=rows[:, i : i + 1], past_key_values=stepwise).logits for i in range(9, rows.shape[1])]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=0, atol=FLOAT32_LOGITS)
    for cache in (at_once, stepwise):
        assert [cache.get_seq_length(layer_idx) for layer_idx in range(6)] == [rows.shape[1]] * 6


@pytest.mark.parametrize("plan", [MIXED, DROPPING], ids=["mixed", "dropping"])
def test_gradients_are_those_of_the_equations(family: str, family_model: PreTrainedModel, plan: Plan) -> None:
    batch = build_left_padded_batch()
    tokens = batch["attention_mask"].bool()
    model = copy.deepcopy(family_model).requires_grad_(True)
    weights = torch.randn(32, generator=torch.Generator().manual_seed(3))

    def gradients(hidden_states: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        (hidden_states[tokens] @ weights).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(run_reference(model, family=family, groups=plan.to_lists(), dropped=plan.dropped, **batch))
    apply_plan(model, plan).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    actual = gradients(last_hidden_states(model, **batch))
    assert actual.keys() == expected.keys()
    assert any("layers.4" in name for name in actual)
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=FLOAT32_GRADIENTS * scale, msg=name)


@pytest.mark.parametrize(("name", "dropouts"), [("phi3", 2), ("phi", 1), ("gpt_neox", 2)])
def test_residual_dropout_is_applied_in_training(name: str, dropouts: int) -> None:
    model = apply_plan(build_tiny_model(name, num_layers=2), Plan.from_groups([[0, 1]])).train()
    layer_dropouts = [m for layer in get_decoder_layers(model) for m in layer.children() if isinstance(m, nn.Dropout)]
    assert len(layer_dropouts) == 2 * dropouts
    for dropout in layer_dropouts:
        dropout.p = 1.0  # drops both branches whole, so that the group returns its input
    received = []
    get_decoder_layers(model)[1].register_forward_hook(lambda layer, args, output: received.append((args[0], output)))
    get_decoder(model)(**build_left_padded_batch(), use_cache=False)
    [(group_input, group_output)] = received
    assert torch.equal(group_input, group_output)


def test_plans_nest_replace_and_come_off_after_exceptions(llama: PreTrainedModel) -> None:
    batch = build_left_padded_batch()
    untouched = llama(**batch).logits
    with applied_plan(llama, PAIRS):
        pairs = llama(**batch).logits
    with applied_plan(llama, MIXED):
        mixed = llama(**batch).logits
    assert not torch.equal(pairs, mixed)
    with applied_plan(llama, MIXED):
        with applied_plan(llama, DROPPING):
            assert not torch.equal(llama(**batch).logits, mixed)
        with applied_plan(llama, PAIRS):
            assert torch.equal(llama(**batch).logits, pairs)
            with applied_plan(llama, Plan.baseline(6)):
                assert torch.equal(llama(**batch).logits, untouched)
            assert torch.equal(llama(**batch).logits, pairs)
        assert torch.equal(llama(**batch).logits, mixed)
        with pytest.raises(ZeroDivisionError), applied_plan(llama, PAIRS):
            raise ZeroDivisionError
        assert torch.equal(llama(**batch).logits, mixed)
    assert torch.equal(llama(**batch).logits, untouched)
    apply_plan(llama, PAIRS)
    apply_plan(llama, MIXED)
    assert torch.equal(llama(**batch).logits, mixed)
    with applied_plan(llama, PAIRS):
        undo_plan(llama)  # within the block: what stood before comes back all the same
    assert torch.equal(llama(**batch).logits, mixed)
    assert torch.equal(undo_plan(llama)(**batch).logits, untouched)


@pytest.mark.parametrize("plan", [MIXED, DROPPING], ids=["mixed", "dropping"])
def test_a_deep_copy_is_an_independent_working_model(llama: PreTrainedModel, plan: Plan) -> None:
    batch = build_left_padded_batch()
    untouched = llama(**batch).logits
    before = attributes_of_modules(llama)
    apply_plan(llama, plan)
    mixed = llama(**batch).logits
    clone = copy.deepcopy(llama)
    undo_plan(llama)
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.zero_()
    assert torch.equal(clone(**batch).logits, mixed)  # runs on its own layers
    assert torch.equal(undo_plan(clone)(**batch).logits, untouched)
    assert attributes_of_modules(clone) == before
    assert attributes_of_modules(llama) == before


def test_state_dict_and_saved_model_are_the_unmodified_ones(llama: PreTrainedModel, tmp_path: Path) -> None:
    batch = build_left_padded_batch()
    untouched = llama(**batch).logits
    pointers = {name: tensor.data_ptr() for name, tensor in llama.state_dict().items()}
    apply_plan(llama, MIXED)
    assert {name: tensor.data_ptr() for name, tensor in llama.state_dict().items()} == pointers  # nothing was copied
    assert len(get_decoder_layers(llama)) == 6
    llama.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(reloaded(**batch).logits, untouched)


def test_hidden_states_repeat_within_a_group(llama: PreTrainedModel) -> None:
    batch = build_left_padded_batch()
    with applied_plan(llama, MIXED):
        hidden_states = llama(**batch, output_hidden_states=True).hidden_states
    assert len(hidden_states) == 7
    assert torch.equal(hidden_states[2], hidden_states[1])  # after slot 1, the first of [1, 2]
    assert not torch.equal(hidden_states[3], hidden_states[2])
    assert torch.equal(hidden_states[4], hidden_states[3])
    assert torch.equal(hidden_states[5], hidden_states[3])


def test_a_forward_broken_off_midway_leaves_nothing_behind(llama: PreTrainedModel) -> None:
    batch = build_left_padded_batch()
    apply_plan(llama, MIXED)
    expected = llama(**batch).logits
    kept: list[weakref.ref[Tensor]] = []

    def break_off(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        kept.append(weakref.ref(kwargs["attention_mask"]))
        raise KeyError("broken off")

    handle = get_decoder_layers(llama)[4].register_forward_hook(break_off, with_kwargs=True)  # second of [3, 4, 5]
    with pytest.raises(KeyError, match="broken off"):
        llama(**batch)
    handle.remove()
    gc.collect()
    assert kept[0]() is None, "the group still holds what a broken forward passed to it"
    assert torch.equal(llama(**batch).logits, expected)


def test_an_interrupted_forward_does_not_spoil_the_next(llama: PreTrainedModel) -> None:
    batch = build_left_padded_batch()
    apply_plan(llama, MIXED)
    expected = llama(**batch).logits

    def interrupt(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        raise KeyboardInterrupt  # no Exception, so that forward hooks are not called on the way out

    handle = get_decoder_layers(llama)[4].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        llama(**batch)
    handle.remove()
    assert torch.equal(llama(**batch).logits, expected)


def test_slots_out_of_order_are_refused(llama: PreTrainedModel) -> None:
    apply_plan(llama, PAIRS)
    with pytest.raises(RuntimeError, match="slot 1 of a group of 2 layers ran after 0 of its slots"):
        get_decoder_layers(llama)[1](torch.zeros(1, 2, 32))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # its name before transformers 5.23
@pytest.mark.parametrize("plan", [MIXED, DROPPING], ids=["mixed", "dropping"])
def test_gradient_checkpointing_recomputes_groups_as_a_whole(
    llama: PreTrainedModel, use_reentrant: bool, plan: Plan
) -> None:
    batch = build_left_padded_batch()
    apply_plan(llama, plan).requires_grad_(True)
    _backward(llama(**batch).logits)
    expected = {name: parameter.grad for name, parameter in llama.named_parameters()}
    running = [layer_idx for layer_idx in range(6) if layer_idx not in plan.dropped["mlp"]]
    llama.zero_grad(set_to_none=True)

    llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    llama.train()
    num_runs: Counter[int] = Counter()
    for layer_idx, layer in enumerate(get_decoder_layers(llama)):
        layer.mlp.register_forward_pre_hook(lambda *_, layer_idx=layer_idx: num_runs.update([layer_idx]))
    first, second = (llama(**batch).logits for _ in range(2))  # both before either is recomputed
    _backward(first)
    assert num_runs == dict.fromkeys(running, 3)
    _backward(second)
    for name, parameter in llama.named_parameters():
        if expected[name] is None:  # of a branch that is dropped
            assert parameter.grad is None, name
        else:
            assert torch.equal(parameter.grad, 2 * expected[name]), name
    assert all(layer.gradient_checkpointing for layer in get_decoder_layers(llama))

    num_runs.clear()
    llama.eval()
    _backward(llama(**batch, use_cache=False).logits)  # it plays no part in eval mode
    assert num_runs == dict.fromkeys(running, 1)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_an_interrupted_forward_leaves_gradient_checkpointing_on(llama: PreTrainedModel) -> None:
    apply_plan(llama, MIXED).requires_grad_(True).train()
    llama.gradient_checkpointing_enable()
    layers = get_decoder_layers(llama)

    def interrupt(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        raise KeyboardInterrupt

    handle = layers[4].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        llama(**build_left_padded_batch(), use_cache=False)
    handle.remove()
    undo_plan(llama)
    assert all(layer.gradient_checkpointing for layer in layers)


def _backward(logits: Tensor) -> None:
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.zeros(logits[..., 0].numel(), dtype=torch.long)
    ).backward()


def test_plans_for_other_models_are_refused(llama: PreTrainedModel) -> None:
    before = attributes_of_modules(llama)
    with pytest.raises(PlanError, match=re.escape("its groups cover 4 layers and this model (LlamaForCausalLM) has 6")):
        apply_plan(llama, Plan.from_groups([[0], [1, 2], [3]]))
    identity = ModelIdentity(id="owner/other", revision="abc", num_layers=6, fingerprint="0-0")
    for_another = Plan.from_groups(MIXED.groups, metadata=PlanMetadata(model=identity))
    with (
        pytest.raises(
            PlanError, match=r"the plan is for owner/other, but this model.*load owner/other at revision abc"
        ),
        applied_plan(llama, for_another),
    ):
        pass
    assert attributes_of_modules(llama) == before


def test_a_plan_with_a_fingerprint_runs_on_its_own_model_in_any_dtype(llama: PreTrainedModel) -> None:
    identity = ModelIdentity(id="owner/this", num_layers=6, fingerprint=fingerprint_model(llama))
    plan = Plan.from_groups(MIXED.groups, metadata=PlanMetadata(model=identity))
    apply_plan(llama, plan)
    check_plan_model(plan, llama)  # a plan does not change which model it is
    for dtype in (torch.bfloat16, torch.float16):
        check_plan_model(plan, build_tiny_model("llama").to(dtype))
    with pytest.raises(PlanError, match=r"the plan is for owner/this, but this model .* has other weights"):
        check_plan_model(plan, build_tiny_model("llama", seed=1))


def test_a_failed_apply_leaves_the_standing_plan(llama: PreTrainedModel) -> None:
    batch = build_left_padded_batch()
    apply_plan(llama, MIXED)
    expected = llama(**batch).logits
    with pytest.raises(PlanError):
        apply_plan(llama, Plan.baseline(7))
    assert torch.equal(llama(**batch).logits, expected)


def test_a_replaced_forward_is_refused(llama: PreTrainedModel) -> None:
    layer = get_decoder_layers(llama)[3]
    layer.forward = lambda hidden_states, **kwargs: hidden_states  # type: ignore[method-assign]
    with pytest.raises(ModelError, match=r"layer 3 \(LlamaDecoderLayer\) has a forward that is not its class's"):
        apply_plan(llama, MIXED)
    del layer.forward
    apply_plan(llama, MIXED)


def test_unknown_families_are_refused_before_anything_changes() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=6, n_embd=32, n_head=4, vocab_size=VOCAB_SIZE))
    before = attributes_of_modules(model)
    with pytest.raises(FamilyError, match="gpt2"):
        apply_plan(model, MIXED)
    assert attributes_of_modules(model) == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_models_follow_the_plan(llama: PreTrainedModel) -> None:
    batch = build_left_padded_batch()
    compiled = torch.compile(llama, backend="eager", fullgraph=True)
    for plan in (MIXED, PAIRS, Plan.baseline(6)):
        with applied_plan(llama, plan):
            expected = llama(**batch, use_cache=False).logits
            actual = compiled(**batch, use_cache=False).logits
        torch.testing.assert_close(actual, expected, rtol=0, atol=FLOAT32_LOGITS)


def test_one_module_in_two_places_is_refused() -> None:
    model = build_tiny_model("llama")
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[i] for i in (0, 1, 1, 2, 3, 4)])
    for groups in ([[0], [1, 2], [3], [4], [5]], [[0, 1], [2], [3], [4], [5]], [[0], [1], [2], [3], [4, 5]]):
        with pytest.raises(FamilyError, match=r"decoder layer 2 is the same module as an earlier one.*copy\.deepcopy"):
            apply_plan(model, Plan.from_groups(groups))
    layers[1] = copy.deepcopy(layers[1])
    model.model.layers[2] = copy.deepcopy(layers[1])
    apply_plan(model, Plan.from_groups([[0], [1, 2], [3], [4], [5]]))
