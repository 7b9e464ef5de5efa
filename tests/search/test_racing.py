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
from lpsearch.search.racing import Racing, is_mean_beaten

NUM_WINDOWS = 16
BASE, RIVAL, PLAN = (Plan.from_joins(6, joins) for joins in [(), (0, 2), (1, 4)])
RUNGS = [list(range(0, 4)), list(range(4, 8)), list(range(8, 16))]


@pytest.fixture
def store(tmp_path):
    with StudyStore(f"sqlite:///{tmp_path / 'study.db'}", study_name="demo") as opened:
        opened.save_settings({})
        yield opened


def build_racing(store, *, staged=True, metric="nll"):
    racing = Racing(store, num_windows=NUM_WINDOWS, metric=metric, staged=staged)
    everything = list(range(NUM_WINDOWS))
    if not store.losses.find_evaluated_windows(BASE, split="proxy"):
        racing.keep(BASE, everything, build_losses(everything, 0.0))
        racing.keep(RIVAL, everything, build_losses(everything, 0.2))
    return racing


def build_losses(windows, delta, *, kl=None):
    """Losses of windows that differ by far more than the plans do."""
    nll = tuple(3.0 + 0.5 * math.sin(index) + delta + 0.01 * math.cos(7 * index) * (delta > 0) for index in windows)
    return WindowLosses(nll, None if kl is None else (kl,) * len(windows), 63)


def run_stages(racing, delta, *, rival=RIVAL):
    stages = []
    while windows := racing.find_next_windows(PLAN, rival=rival):
        stages.append(windows)
        racing.keep(PLAN, windows, build_losses(windows, delta))
    return stages


def get_states(racing, store):
    """The state of the plan in memory and in the store."""
    return [racing.get_state(PLAN), store.losses.load_plans()[PLAN.key].state]


def test_a_plan_that_may_be_on_the_front_gets_rung_after_rung(store):
    racing = build_racing(store)
    assert run_stages(racing, 0.2) == RUNGS
    assert get_states(racing, store) == ["complete"] * 2


def test_a_beaten_plan_stops_after_its_first_look(store):
    racing = build_racing(store)
    assert run_stages(racing, 0.3) == RUNGS[:1]
    assert get_states(racing, store) == ["stopped"] * 2

    assert run_stages(racing, 0.3, rival=None) == RUNGS[1:]
    assert get_states(racing, store) == ["complete"] * 2


@pytest.mark.parametrize("rival", [RIVAL, None])
def test_without_a_rival_or_stages_a_plan_gets_everything(store, rival):
    if rival is None:
        assert run_stages(build_racing(store), 0.9, rival=None) == RUNGS
    else:
        assert run_stages(build_racing(store, staged=False), 0.9) == [list(range(NUM_WINDOWS))]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_broken_plan_stops_at_once(store, loss):
    racing = build_racing(store)
    assert run_stages(racing, loss) == RUNGS[:1]
    assert get_states(racing, store) == ["broken"] * 2
    assert math.isnan(racing.compute_loss(PLAN).delta_nll)


def test_stages_go_on_where_a_killed_process_stopped(store):
    first = build_racing(store)
    first.keep(PLAN, RUNGS[0], build_losses(RUNGS[0], 0.2))
    first.keep(PLAN, [5], build_losses([5], 0.2))
    assert run_stages(build_racing(store), 0.2) == [[4, 6, 7], RUNGS[2]]


def test_loss_is_paired_and_relative_to_all_windows(store):
    racing = build_racing(store)
    racing.keep(PLAN, RUNGS[0], build_losses(RUNGS[0], 0.3))
    base, plan = (build_losses(range(NUM_WINDOWS), delta).nll_nats_per_token for delta in (0.0, 0.3))
    differences = np.subtract(plan, base)[:4]
    loss = racing.compute_loss(PLAN)
    assert loss.delta_nll == pytest.approx(differences.mean())
    assert loss.delta_nll_se == pytest.approx(differences.std(ddof=1) / 2)
    assert loss.nll == pytest.approx(np.mean(base) + differences.mean())
    assert (loss.num_windows, loss.num_tokens) == (4, 4 * 63)

    for rung in RUNGS[1:]:
        racing.keep(PLAN, rung, build_losses(rung, 0.3))
    assert racing.compute_loss(PLAN).nll == pytest.approx(np.mean(plan))


def test_plans_are_compared_by_the_metric(store):
    racing = build_racing(store, metric="kl")
    racing.keep(PLAN, RUNGS[0], build_losses(RUNGS[0], 0.0, kl=0.4))
    loss = racing.compute_loss(PLAN)
    assert loss.kl_nats_per_token == pytest.approx(0.4)
    assert racing.find_next_windows(PLAN, rival=None) == RUNGS[1]


def is_beaten(costs, rival_costs, *, num_windows):
    return is_mean_beaten([costs - rival_costs], weights=[1.0], num_windows=num_windows)


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
