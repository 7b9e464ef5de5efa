"""The prefix cache changes no bit of any result, runs the layers it must and no others, and keeps to its budget."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from lpsearch.data import Windows
from lpsearch.errors import LpsearchError
from lpsearch.evaluation import ModelEvaluator
from lpsearch.evaluation.prefix_cache import choose_cache_bytes
from lpsearch.models.families import get_decoder_layers
from lpsearch.plan import Plan
from tests.tiny_models import FAMILIES, VOCAB_SIZE, build_tiny_model

NUM_LAYERS = 6
SEQ_LEN = 13
STATE_BYTES = 2 * SEQ_LEN * 32 * 4  # two windows of float32 hidden states
UNBOUNDED = 1 << 40


@pytest.fixture(scope="module")
def windows() -> Windows:
    tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, size=(4, SEQ_LEN), dtype=np.int32)
    return Windows(tokens, "random")


def _draw_plans(count: int, *, seed: int) -> list[Plan]:
    """Draw different plans with groups of up to three layers, the baseline first."""
    rng = random.Random(seed)
    plans = {Plan.baseline(NUM_LAYERS): None}
    while len(plans) < count:
        plan = Plan.from_joins(NUM_LAYERS, [join for join in range(NUM_LAYERS - 1) if rng.random() < 0.4])
        if plan.max_group <= 3:
            plans[plan] = None
    return list(plans)


PLANS = _draw_plans(9, seed=0)


def _draw_dropping_plans(count: int) -> list[Plan]:
    """Plans that drop branches, each behind the same plan without; many drop whole groups."""
    rng = random.Random(3)
    plans: list[Plan] = []
    for plan in _draw_plans(count, seed=1):
        layers = [layer_idx for layer_idx in range(NUM_LAYERS) if rng.random() < 0.4]
        both = [layer_idx for layer_idx in layers if rng.random() < 0.5]
        plans += [plan, plan.drop({"attention": layers}), plan.drop({"attention": both, "mlp": layers})]
    return plans


def _count_layers_that_must_run(requests: Sequence[tuple[Plan, tuple[int, ...]]]) -> int:
    """Count, one layer on one window each, what no earlier plan ran on the same batch; the slow and obvious way."""
    known: set[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]] = set()
    layers = 0
    for plan, batch in requests:
        must_run = NUM_LAYERS
        for end in range(1, len(plan.groups)):
            if (batch, plan.groups[:end]) in known:
                must_run = NUM_LAYERS - sum(len(group) for group in plan.groups[:end])
        known.update((batch, plan.groups[:end]) for end in range(1, len(plan.groups)))
        layers += must_run * len(batch)
    return layers


def _count_layer_calls(model) -> list[int]:
    """Count from now on how often each attention runs, which every layer has whatever replaces its forward."""
    calls = [0] * NUM_LAYERS
    for index, layer in enumerate(get_decoder_layers(model)):
        attention = layer.attention if hasattr(layer, "attention") else layer.self_attn

        def count(module, args, kwargs, output, index=index):
            calls[index] += len(output[0])  # windows

        attention.register_forward_hook(count, with_kwargs=True)
    return calls


@pytest.mark.parametrize("cache_bytes", [UNBOUNDED, 3 * STATE_BYTES], ids=["unbounded", "tiny"])
@pytest.mark.parametrize("family", FAMILIES)
def test_results_are_those_without_a_cache_bit_for_bit(family, cache_bytes, windows):
    model = build_tiny_model(family)
    plain, cached = (
        ModelEvaluator(model=model, windows=windows, metric="kl", batch_size=2, cache_bytes=size)
        for size in (0, cache_bytes)
    )
    for plan in PLANS + _draw_dropping_plans(4):
        assert cached.evaluate_windows(plan, range(4)) == plain.evaluate_windows(plan, range(4)), plan
        assert cached.cache_usage.held_bytes <= cache_bytes
    assert cached.cache_usage.layers_run < cached.cache_usage.layers_asked
    assert plain.cache_usage.layers_run == plain.cache_usage.layers_asked == cached.cache_usage.layers_asked


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_only_the_layers_that_must_run_do(family, windows):
    model = build_tiny_model(family)
    evaluator = ModelEvaluator(model=model, windows=windows, batch_size=2, cache_bytes=UNBOUNDED)
    evaluator.evaluate_windows(PLANS[1], [0])  # passes the self-test, which runs layers too
    requests = [(PLANS[1], (0,))]
    calls = _count_layer_calls(model)
    before = evaluator.cache_usage.layers_run
    rng = random.Random(1)
    for plan in PLANS + PLANS[2:5]:
        asked = sorted(rng.sample(range(4), rng.choice([1, 2, 4])))
        evaluator.evaluate_windows(plan, asked)
        requests += [(plan, tuple(asked[start : start + 2])) for start in range(0, len(asked), 2)]
    usage = evaluator.cache_usage
    assert usage.layers_run == _count_layers_that_must_run(requests)
    assert usage.layers_run - before == sum(calls)
    assert usage.layers_asked == NUM_LAYERS * sum(len(batch) for _, batch in requests)


def test_subsets_of_the_windows_in_any_order_and_size(windows):
    model = build_tiny_model("gemma3_text")
    plain, cached = (
        ModelEvaluator(model=model, windows=windows, metric="kl", batch_size=3, cache_bytes=size)
        for size in (0, 8 * STATE_BYTES)
    )
    rng = random.Random(2)
    for plan in PLANS * 2:
        asked = rng.choice([[0, 1, 2, 3], [2], [3, 1], [0, 1, 2], [1, 1]])
        assert cached.evaluate_windows(plan, asked) == plain.evaluate_windows(plan, asked)


def test_the_budget_bounds_the_memory_that_is_kept(windows):
    budget = 5 * STATE_BYTES + 100
    evaluator = ModelEvaluator(model=build_tiny_model("llama"), windows=windows, batch_size=2, cache_bytes=budget)
    for plan in PLANS:
        evaluator.evaluate_windows(plan, range(4))
        states = evaluator.list_cached_states()
        storages = {state.untyped_storage().data_ptr(): state.untyped_storage().nbytes() for state in states}
        assert sum(storages.values()) == evaluator.cache_usage.held_bytes <= budget
        assert len(storages) == evaluator.cache_usage.num_boundaries
    assert evaluator.cache_usage.num_boundaries == 5


def test_plans_share_what_they_run_before_they_differ_in_what_they_drop(windows):
    evaluator = ModelEvaluator(model=build_tiny_model("llama"), windows=windows, cache_bytes=UNBOUNDED)

    def count_layers_run(plan: Plan) -> int:
        before = evaluator.cache_usage.layers_run
        evaluator.evaluate_windows(plan, range(4))
        return (evaluator.cache_usage.layers_run - before) // 4

    joined = Plan.from_groups([[0], [1, 2], [3], [4], [5]])
    dropping = joined.drop({"attention": [2]})
    assert count_layers_run(joined) == 6
    assert count_layers_run(dropping) == 5
    assert count_layers_run(dropping.drop({"mlp": [4]})) == 2
    assert count_layers_run(joined.drop({"mlp": [4]})) == 2
    assert count_layers_run(dropping) == 1, "it ran before; the head of the model and its last layer always run"
    whole_layer = dropping.drop({"attention": [3], "mlp": [3]})
    assert count_layers_run(whole_layer) == 5, "a repair of what runs before layer 3 depends on that"
    assert count_layers_run(whole_layer.drop({"mlp": [4]})) == 2


def test_nothing_of_the_cache_stays_on_the_model(windows):
    model = build_tiny_model("qwen3")
    evaluator = ModelEvaluator(model=model, windows=windows, cache_bytes=UNBOUNDED)
    for plan in PLANS[:4]:
        evaluator.evaluate_windows(plan, range(4))
        for layer in get_decoder_layers(model):
            assert "forward" not in vars(layer)
            assert not layer._forward_hooks


def test_a_forward_that_fails_leaves_the_cache_and_the_model_usable(windows):
    model = build_tiny_model("llama")
    plain, cached = (
        ModelEvaluator(model=model, windows=windows, batch_size=2, cache_bytes=size) for size in (0, UNBOUNDED)
    )
    cached.evaluate_windows(PLANS[0], range(4))

    def fail(module, args, output):
        raise KeyboardInterrupt

    handle = get_decoder_layers(model)[3].mlp.register_forward_hook(fail)
    for plan in PLANS[1:]:
        with pytest.raises(KeyboardInterrupt):
            cached.evaluate_windows(plan, range(4))
        assert not any("forward" in vars(layer) or layer._forward_hooks for layer in get_decoder_layers(model))
    handle.remove()
    for plan in PLANS[1:]:
        assert cached.evaluate_windows(plan, range(4)) == plain.evaluate_windows(plan, range(4))


def test_a_device_that_runs_out_of_memory_gets_the_cache_back(windows, caplog):
    model = build_tiny_model("llama")
    plain, cached = (
        ModelEvaluator(model=model, windows=windows, batch_size=2, cache_bytes=size) for size in (0, UNBOUNDED)
    )
    room = 4 * STATE_BYTES

    def fail_when_full(module, args):
        if cached.cache_usage.held_bytes > room:
            raise torch.OutOfMemoryError("no more")

    expected = [plain.evaluate_windows(plan, range(4)) for plan in PLANS]
    handle = get_decoder_layers(model)[5].mlp.register_forward_pre_hook(fail_when_full)
    assert [cached.evaluate_windows(plan, range(4)) for plan in PLANS] == expected
    assert cached.cache_usage.budget_bytes <= room
    assert "prefix cache keeps at most" in caplog.text
    handle.remove()

    def fail(module, args):
        raise torch.OutOfMemoryError("no more")

    get_decoder_layers(model)[5].mlp.register_forward_pre_hook(fail)
    with pytest.raises(LpsearchError, match="ran out of memory on 2 windows"):
        cached.evaluate_windows(PLANS[1], range(4))


def test_the_default_budget_is_modest_on_a_cpu():
    assert 0 < choose_cache_bytes(torch.device("cpu")) <= 2 << 30


@pytest.mark.gpu
@pytest.mark.parametrize("location", ["device", "host"])
def test_a_gpu_gives_the_same_bits_from_its_own_memory_and_from_the_host(location, windows):
    model = build_tiny_model("llama").to("cuda", torch.bfloat16)
    plain, cached = (
        ModelEvaluator(
            model=model, windows=windows, metric="kl", batch_size=2, cache_bytes=size, cache_location=location
        )
        for size in (0, 7 * STATE_BYTES // 2)
    )
    for plan in PLANS:
        assert cached.evaluate_windows(plan, range(4)) == plain.evaluate_windows(plan, range(4))
    states = cached.list_cached_states()
    assert {state.device.type for state in states} == {"cuda" if location == "device" else "cpu"}
    assert all(state.is_pinned() for state in states if location == "host")
    assert cached.cache_usage.layers_run < plain.cache_usage.layers_run
