"""Refits that share what plans have in common, and evaluation after them, against doing it all from scratch."""

from __future__ import annotations

import random

import pytest
import torch

from lpsearch.errors import DataError, LpsearchError
from lpsearch.evaluation import ModelEvaluator
from lpsearch.evaluation.losses import WindowLosses
from lpsearch.models.families import get_decoder_layers
from lpsearch.plan import Plan
from lpsearch.recovery import RefitEvaluator, Refitter, swapped_weights
from lpsearch.recovery.evaluator import build_search_refitter, choose_num_calibration_windows
from lpsearch.search import PlanSpace
from tests.recovery.distilling import SEQ_LEN, build_windows
from tests.recovery.refitting import SEARCH_FIT
from tests.tiny_models import build_tiny_model

CALIBRATION = build_windows(15, 3)
PROXY = build_windows(8, 4)
STATE_BYTES = 15 * SEQ_LEN * 32 * 4
"""Of the calibration windows at one boundary."""


def draw_plans(count: int) -> list[Plan]:
    """Plans of groups of up to three, many of which begin alike."""
    plans = [plan for plan in PlanSpace(6, 3, ()).enumerate_plans() if plan.num_joins]
    random.Random(0).shuffle(plans)
    return plans[:count]


def draw_dropping_plans(count: int) -> list[Plan]:
    """The same without some branches; of some groups nothing is left."""
    rng = random.Random(1)
    layers = [[layer_idx for layer_idx in range(6) if rng.random() < 0.4] for _ in range(count)]
    joined = [Plan.baseline(6), *draw_plans(count - 1)]
    return [
        plan.drop({"attention": chosen, "mlp": chosen[rng.randrange(2) :]})
        for plan, chosen in zip(joined, layers, strict=True)
    ]


def fit_from_scratch(model, plan: Plan, **options) -> dict[str, torch.Tensor]:
    return dict(Refitter(model, CALIBRATION, **options).fit(plan).weights)


def evaluate_from_scratch(model, plan: Plan, *, metric: str = "nll") -> WindowLosses:
    """Fit and evaluate a plan with nothing kept of any other."""
    evaluator = ModelEvaluator(model=model, windows=PROXY, metric=metric, cache_bytes=0)
    evaluator.evaluate_windows(Plan.baseline(6), range(8))
    weights = fit_from_scratch(model, plan, **SEARCH_FIT) if plan != Plan.baseline(6) else {}
    with swapped_weights(model, weights):
        return evaluator.evaluate_windows(plan, range(8), variant="by hand" if weights else "raw")


def build_evaluator(model, *, metric: str = "nll", cache_bytes: int = 1 << 26) -> RefitEvaluator:
    evaluator = ModelEvaluator(model=model, windows=PROXY, metric=metric)
    refitter = build_search_refitter(model, CALIBRATION, cache_bytes=cache_bytes)
    return RefitEvaluator(model=model, evaluator=evaluator, refitter=refitter)


@pytest.mark.parametrize("num_states", [1000, 9, 2, 0], ids="{0} states".format)
@pytest.mark.parametrize(("extent", "num_passes"), [("grouped", 1), ("after", 1), ("after", 2)])
def test_what_plans_share_changes_no_bit(extent: str, num_passes: int, num_states: int) -> None:
    model = build_tiny_model("llama")
    options = {"extent": extent, "num_passes": num_passes}
    refitter = Refitter(model, CALIBRATION, cache_bytes=2 * num_states * STATE_BYTES, **options)
    for plan in draw_plans(12) + draw_dropping_plans(6):
        found = refitter.fit(plan)
        expected = Refitter(model, CALIBRATION, **options).fit(plan)
        assert found.weights.keys() == expected.weights.keys()
        assert all(torch.equal(found.weights[name], expected.weights[name]) for name in expected.weights)
        assert found.products == expected.products


def test_a_fit_runs_no_layer_before_its_first_difference() -> None:
    model = build_tiny_model("llama")
    refitter = build_search_refitter(model, CALIBRATION, cache_bytes=1 << 26)
    first, second = (Plan.from_joins(6, joins) for joins in [(0, 2), (0, 4)])
    ran: list[int] = []
    refitter.fit(second)
    for layer_idx, layer in enumerate(get_decoder_layers(model)):
        layer.mlp.down_proj.register_forward_hook(lambda *_, layer_idx=layer_idx: ran.append(layer_idx))
    refitter.fit(first)
    assert set(ran) == {2, 3}, "the group before is shared, and behind the last one there is nothing to fit"
    ran.clear()
    refitter.fit(second)
    assert set(ran) <= {4, 5}
    assert ran, "a search asks for the weights of a plan again, which its evaluator keeps"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("metric", ["nll", "kl"])
def test_losses_are_those_of_fitting_and_evaluating_each_plan_from_scratch(family: str, metric: str) -> None:
    """Prefix caches of fits and of evaluation, rung by rung, give bit for bit what neither gives."""
    model = build_tiny_model(family)
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    evaluator = build_evaluator(model, metric=metric)
    for plan in [Plan.baseline(6), *draw_plans(8), *draw_plans(3), *draw_dropping_plans(8)]:
        first, rest = (evaluator.evaluate_windows(plan, windows) for windows in [range(4), range(4, 8)])
        expected = evaluate_from_scratch(model, plan, metric=metric)
        assert first.nll_nats_per_token + rest.nll_nats_per_token == expected.nll_nats_per_token
        if metric == "kl":
            assert first.kl_nats_per_token + rest.kl_nats_per_token == expected.kl_nats_per_token
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.state_dict().items())


def test_a_repair_of_the_layer_before_one_of_which_nothing_is_left_is_not_shared() -> None:
    model = build_tiny_model("llama")
    evaluator = build_evaluator(model)
    baseline = Plan.baseline(6)
    for dropped in ({"attention": [3], "mlp": [3]}, {"mlp": [4]}, {"attention": [3]}):
        plan = baseline.drop(dropped)  # the first repairs layer 2, the others do not
        assert evaluator.evaluate_windows(plan, range(8)) == evaluate_from_scratch(model, plan)


def test_divergences_after_a_refit_are_from_the_unmodified_model_where_it_was_not_evaluated() -> None:
    """A resumed study has its losses, so nothing asks for them again."""
    model = build_tiny_model("llama")
    plan = Plan.from_joins(6, [1, 3])
    found = build_evaluator(model, metric="kl").evaluate_windows(plan, range(8))
    assert found == evaluate_from_scratch(model, plan, metric="kl")


def test_a_repaired_plan_loses_less_than_it_does_without() -> None:
    model = build_tiny_model("llama")
    repaired = build_evaluator(model, metric="kl")
    raw = ModelEvaluator(model=model, windows=PROXY, metric="kl")
    plans = draw_plans(6)
    losses = [
        sum(sum(evaluator.evaluate_windows(plan, range(8)).kl_nats_per_token) for plan in plans)
        for evaluator in (repaired, raw)
    ]
    assert losses[0] < losses[1]


def test_too_little_text_is_refused_by_the_option_that_needs_it() -> None:
    model = build_tiny_model("llama")
    refitter = build_search_refitter(model, build_windows(5, 0), cache_bytes=0)
    evaluator = RefitEvaluator(model=model, evaluator=ModelEvaluator(model=model, windows=PROXY), refitter=refitter)
    with pytest.raises(DataError, match="--recover refit: 64 tokens to fit are too few for the 96 inputs"):
        evaluator.evaluate_windows(Plan.from_joins(6, [1]), range(8))


@pytest.mark.parametrize(("num_windows", "num_kinds", "max_group"), [(16, 1, 2), (4, 1, 2), (4, 3, 2), (1, 1, 6)])
def test_calibration_windows_are_enough_for_the_widest_group(num_windows: int, num_kinds: int, max_group: int) -> None:
    model = build_tiny_model("llama")
    count = choose_num_calibration_windows(
        model, num_windows=num_windows, num_kinds=num_kinds, seq_len=SEQ_LEN, max_group=max_group
    )
    assert count >= num_windows // 4
    windows = build_windows(count * num_kinds, 0)
    refitter = build_search_refitter(model, windows, cache_bytes=0)
    joins = range(max_group - 1)
    assert refitter.fit(Plan.from_joins(6, joins)).products, "it is not refused"


def test_a_device_that_runs_out_of_memory_gives_up_what_is_kept() -> None:
    model = build_tiny_model("llama")

    class SmallDevice(Refitter):
        """Has no room for a fit while something is kept from another, or never."""

        num_failures = 0
        never = False

        def fit(self, plan: Plan, **options):
            if (self.num_failures == 0 and self._cache.num_held) or self.never:
                self.num_failures += 1
                raise torch.OutOfMemoryError("out of memory")
            return super().fit(plan, **options)

    refitter = SmallDevice(model, CALIBRATION, cache_bytes=1 << 26, **SEARCH_FIT)
    evaluator = RefitEvaluator(model=model, evaluator=ModelEvaluator(model=model, windows=PROXY), refitter=refitter)
    for joins in ([0, 2], [0, 4], [1, 3]):
        plan = Plan.from_joins(6, joins)
        assert evaluator.evaluate_windows(plan, range(8)) == evaluate_from_scratch(model, plan)
    assert refitter.num_failures == 1
    assert refitter._cache.num_held == 0, "nothing is kept from then on"
    refitter.never = True
    with pytest.raises(LpsearchError, match="ran out of memory in a refit"):
        evaluator.evaluate_windows(Plan.from_joins(6, [3]), range(8))
