"""A search whose evaluator repairs plans: losses are kept under the variant, and those without repair beside them."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from lpsearch.errors import ResumeError
from lpsearch.evaluation.losses import RAW, REFIT
from lpsearch.plan import Plan
from lpsearch.search import PlanSpace, StudyStore, build_front, evaluate_stored_plan, read_results, run_study
from lpsearch.search.losses import choose_variant, read_variant
from lpsearch.search.results import list_untouched
from tests.search.evaluators import SyntheticEvaluator

NUM_LAYERS = 9
NUM_WINDOWS = 16
BASELINE = Plan.baseline(NUM_LAYERS)


@pytest.fixture
def store(tmp_path):
    with StudyStore(f"sqlite:///{tmp_path / 'study.db'}", study_name="demo") as opened:
        yield opened


def search(store, *, variant=REFIT, evaluator=None, budget=24):
    evaluator = evaluator or SyntheticEvaluator(NUM_LAYERS, num_windows=NUM_WINDOWS)
    space = PlanSpace(NUM_LAYERS, 2, ())
    return run_study(evaluator=evaluator, space=space, budget=budget, store=store, variant=variant)


def strip(results):
    return [dataclasses.replace(result, variant=RAW, untouched=None) for result in results]


def test_a_repaired_search_is_the_same_search_under_another_variant(tmp_path, store) -> None:
    """The search does not know what the evaluator does: plans, losses, racing and front are those of a raw one."""
    repaired = search(store)
    assert any(result.state == "stopped" for result in repaired.results), "racing ends some plans early"
    with StudyStore(f"sqlite:///{tmp_path / 'raw.db'}", study_name="demo") as other:
        raw = search(other, variant=RAW)
        assert other.losses.load_plans(variant=REFIT) == {}
        assert read_variant(other.load_settings()) == RAW
    assert strip(repaired.results) == list(raw.results)
    assert strip(repaired.front) == list(raw.front)
    assert read_variant(store.load_settings()) == REFIT
    assert {result.variant for result in repaired.results if result.num_joins} == {REFIT}
    assert repaired.baseline.variant == RAW, "there is nothing to repair in the unmodified model"
    assert list(store.losses.load_plans(variant=RAW)) == [BASELINE.key]
    assert set(store.losses.load_plans(variant=REFIT)) == {r.plan.key for r in repaired.results if r.num_joins}
    assert strip(read_results(store)) == strip(repaired.results)
    assert choose_variant(BASELINE, REFIT) == RAW


def test_an_interrupted_one_goes_on_without_evaluating_anything_twice(tmp_path, store) -> None:
    with StudyStore(f"sqlite:///{tmp_path / 'whole.db'}", study_name="demo") as other:
        whole = search(other)
    with pytest.raises(KeyboardInterrupt):
        search(store, evaluator=SyntheticEvaluator(NUM_LAYERS, num_windows=NUM_WINDOWS, fail_at=15))
    known = {
        (key, window)
        for variant in (RAW, REFIT)
        for key, stored in store.losses.load_plans(variant=variant).items()
        for window in stored.windows["proxy"][0]
    }
    assert len(known) > NUM_WINDOWS
    rest = SyntheticEvaluator(NUM_LAYERS, num_windows=NUM_WINDOWS)
    resumed = search(store, evaluator=rest)
    again = {(plan.key, window) for plan, windows in rest.calls for window in windows}
    assert not again & known
    losses = {result.plan: result.loss for result in whole.results}
    shared = [result for result in resumed.results if result.plan in losses and result.state == "complete"]
    assert len(shared) > 5
    for result in shared:
        if losses[result.plan].num_windows == NUM_WINDOWS:
            assert result.loss == losses[result.plan]


@pytest.mark.parametrize(("begun_with", "now"), [(REFIT, RAW), (RAW, REFIT)])
def test_another_variant_is_refused(store, begun_with, now) -> None:
    search(store, variant=begun_with, budget=3)
    shown = {RAW: "off", REFIT: "refit"}
    with pytest.raises(ResumeError, match=f"--recover was {shown[begun_with]}, now {shown[now]}"):
        search(store, variant=now, budget=4)


def test_a_study_of_before_is_raw(store, caplog: pytest.LogCaptureFixture) -> None:
    search(store, variant=RAW, budget=3)
    settings = store.load_settings()
    del settings["recover"]
    store.save_settings(settings)
    with caplog.at_level(logging.WARNING), pytest.raises(ResumeError, match="--recover was off, now refit"):
        search(store, budget=4)
    assert search(store, variant=RAW, budget=4).num_resumed == 3


def test_losses_without_repair_stand_beside_the_others(store) -> None:
    result = search(store)
    unrepaired = SyntheticEvaluator(NUM_LAYERS, num_windows=NUM_WINDOWS)
    unrepaired.costs = unrepaired.costs[::-1].copy()  # other joins are cheap without repair
    for found in result.front:
        evaluate_stored_plan(store, unrepaired, found.plan, split="proxy")
        evaluate_stored_plan(store, unrepaired, found.plan, split="heldout")
        evaluate_stored_plan(
            store, SyntheticEvaluator(NUM_LAYERS, num_windows=NUM_WINDOWS), found.plan, split="heldout", variant=REFIT
        )
    known = {found.plan: found for found in read_results(store)}
    for found in result.front:
        read = known[found.plan]
        assert read.loss == found.loss, "raw losses do not mix into those of the search"
        assert read.heldout.delta_nll == pytest.approx(found.loss.delta_nll)
        values = unrepaired.evaluate_windows(found.plan, range(NUM_WINDOWS)).nll_nats_per_token
        assert read.untouched.nll == pytest.approx(sum(values) / NUM_WINDOWS)
        assert read.untouched_heldout == read.untouched
        assert read.get_untouched("nll") == read.untouched_heldout
    others = [found for found in known.values() if found.plan not in {point.plan for point in result.front}]
    assert others
    assert all(found.untouched is None for found in others)
    untouched = list_untouched(list(known.values()))
    assert {found.plan for found in untouched} == {found.plan for found in result.front}
    front = build_front(untouched)
    costs = [known[found.plan].untouched.delta_nll for found in front]
    assert costs == sorted(costs)
    assert front[0].plan == BASELINE
    assert [found.loss for found in front] == [known[found.plan].untouched for found in front]
