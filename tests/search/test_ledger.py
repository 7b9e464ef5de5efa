"""What a plan's losses say, and when a plan needs no more of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpsearch.evaluation.losses import WindowLosses
from lpsearch.plan import Plan
from lpsearch.search import StudyStore
from lpsearch.search.ledger import Ledger, is_beaten

NUM_WINDOWS = 16
BASE, RIVAL, PLAN = (Plan.from_joins(6, joins) for joins in [(), (0, 2), (1, 4)])
SHARDS = [list(range(0, 4)), list(range(4, 8)), list(range(8, 16))]


@pytest.fixture
def store(tmp_path):
    with StudyStore(f"sqlite:///{tmp_path / 'study.db'}", study_name="demo") as opened:
        opened.save_settings({})
        yield opened


def build_ledger(store, *, staged=True, metric="nll"):
    ledger = Ledger(store, num_windows=NUM_WINDOWS, metric=metric, staged=staged)
    everything = list(range(NUM_WINDOWS))
    if not ledger.is_complete(BASE):
        ledger.keep(BASE, everything, build_losses(everything, 0.0))
        ledger.keep(RIVAL, everything, build_losses(everything, 0.2))
    return ledger


def build_losses(windows, delta, *, kl=None):
    """Losses of windows that differ by far more than the plans do."""
    nll = tuple(3.0 + 0.5 * math.sin(index) + delta + 0.01 * math.cos(7 * index) * (delta > 0) for index in windows)
    return WindowLosses(nll, None if kl is None else (kl,) * len(windows), 63)


def run_stages(ledger, delta, *, rival=RIVAL):
    stages = []
    while windows := ledger.find_next_windows(PLAN, rival=rival):
        stages.append(windows)
        ledger.keep(PLAN, windows, build_losses(windows, delta))
    return stages


def test_a_plan_that_may_be_on_the_front_gets_shard_after_shard(store):
    ledger = build_ledger(store)
    assert run_stages(ledger, 0.2) == SHARDS
    assert ledger.is_complete(PLAN)


def test_a_beaten_plan_stops_after_its_first_look(store):
    ledger = build_ledger(store)
    assert run_stages(ledger, 0.3) == SHARDS[:1]
    assert not ledger.is_complete(PLAN)


@pytest.mark.parametrize("rival", [RIVAL, None])
def test_without_a_rival_or_stages_a_plan_gets_everything(store, rival):
    if rival is None:
        assert run_stages(build_ledger(store), 0.9, rival=None) == SHARDS
    else:
        assert run_stages(build_ledger(store, staged=False), 0.9) == [list(range(NUM_WINDOWS))]


def test_a_broken_plan_stops_at_once(store):
    assert run_stages(build_ledger(store), math.nan) == SHARDS[:1]


def test_stages_go_on_where_a_killed_process_stopped(store):
    first = build_ledger(store)
    first.keep(PLAN, SHARDS[0], build_losses(SHARDS[0], 0.2))
    first.keep(PLAN, [5], build_losses([5], 0.2))
    assert run_stages(build_ledger(store), 0.2) == [[4, 6, 7], SHARDS[2]]


def test_measurement_is_paired_and_relative_to_all_windows(store):
    ledger = build_ledger(store)
    ledger.keep(PLAN, SHARDS[0], build_losses(SHARDS[0], 0.3))
    base, plan = (build_losses(range(NUM_WINDOWS), delta).nll_nats_per_token for delta in (0.0, 0.3))
    differences = np.subtract(plan, base)[:4]
    measured = ledger.measure(PLAN)
    assert measured.delta_nll == pytest.approx(differences.mean())
    assert measured.delta_nll_se == pytest.approx(differences.std(ddof=1) / 2)
    assert measured.nll == pytest.approx(np.mean(base) + differences.mean())
    assert measured.num_tokens == 4 * 63

    for shard in SHARDS[1:]:
        ledger.keep(PLAN, shard, build_losses(shard, 0.3))
    assert ledger.measure(PLAN).nll == pytest.approx(np.mean(plan))


def test_plans_are_compared_by_the_metric(store):
    ledger = build_ledger(store, metric="kl")
    ledger.keep(PLAN, SHARDS[0], build_losses(SHARDS[0], 0.0, kl=0.4))
    measured = ledger.measure(PLAN)
    assert measured.kl_nats_per_token == pytest.approx(0.4)
    assert ledger.find_next_windows(PLAN, rival=None) == SHARDS[1]


def test_refreshing_takes_what_was_learned_after_the_trial(store):
    ledger = build_ledger(store)
    ledger.keep(PLAN, SHARDS[0], build_losses(SHARDS[0], 0.3))
    told = ledger.build_record(PLAN, trial=5, origin="scan", latency_ms=1.5)
    assert ledger.refresh(told) == told
    for shard in SHARDS[1:]:
        ledger.keep(PLAN, shard, build_losses(shard, 0.3))
    for learned in (ledger, build_ledger(store)):
        refreshed = learned.refresh(told)
        assert refreshed.proxy_tokens == NUM_WINDOWS * 63
        assert refreshed.delta_nll != told.delta_nll
        assert (refreshed.trial, refreshed.origin, refreshed.latency_ms) == (5, "scan", 1.5)


SIXTY_FOURTHS = st.integers(-64, 64).map(lambda value: value / 64)  # their sums and differences are exact


@given(pairs=st.lists(st.tuples(SIXTY_FOURTHS, SIXTY_FOURTHS, SIXTY_FOURTHS), min_size=2, max_size=12))
def test_comparison_cancels_what_is_common_and_is_never_mutual(pairs):
    plan, rival, common = np.array(pairs).T
    verdict = is_beaten(plan, rival, num_windows=16)
    assert is_beaten(plan + common, rival + common, num_windows=16) == verdict
    assert not (verdict and is_beaten(rival, plan, num_windows=16))
    assert not is_beaten(plan, plan, num_windows=16)


def test_a_plan_is_wrongly_stopped_about_as_rarely_as_the_interval_says():
    """Equal plans over 16 windows, looked at on 4: at most the 2.5 % of one side of the interval stop."""
    rng = np.random.default_rng(0)
    num_stopped = 0
    for _ in range(2000):
        difference = rng.normal(size=16)
        difference -= difference.mean()
        num_stopped += is_beaten(difference[:4], np.zeros(4), num_windows=16)
    assert 0 < num_stopped < 0.035 * 2000
