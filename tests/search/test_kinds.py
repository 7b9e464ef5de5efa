"""Losses by kind of text: the mean, the worst case, their errors, and a search on either."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import optuna
import pytest
from scipy import stats

from lpsearch.errors import ConfigError, ResumeError
from lpsearch.evaluation.losses import PlanLosses, WindowLosses
from lpsearch.kinds import TextKind
from lpsearch.plan import Plan
from lpsearch.search import PlanSpace, StudyStore, evaluate_stored_plan, read_results, run_study
from lpsearch.search.cost import compute_loss, compute_perplexity
from lpsearch.search.kinds import write_kinds
from lpsearch.search.racing import Racing, is_mean_beaten, is_worst_kind_beaten
from tests.search.evaluators import TableEvaluator
from tests.tolerances import FLOAT64_MEAN

KINDS = (TextKind("prose", 3.0), TextKind("code"), TextKind("speech", 0.5))
WEIGHTS = [3 / 4.5, 1 / 4.5, 0.5 / 4.5]
NUM_ROUNDS = 8
BASE, RIVAL, PLAN = (Plan.from_joins(6, joins) for joins in [(), (0, 2), (1, 4)])


@pytest.fixture
def store(tmp_path):
    with StudyStore(f"sqlite:///{tmp_path / 'study.db'}", study_name="demo") as opened:
        opened.save_settings({})
        yield opened


def draw_losses(seed: int, num_seen: int) -> tuple[PlanLosses, PlanLosses]:
    """Losses of a plan on the first windows, and of the unmodified model on all."""
    rng = np.random.default_rng(seed)
    num_windows = NUM_ROUNDS * len(KINDS)
    base = rng.normal(3.0, 0.5, num_windows)
    nll = base + rng.normal(0.2, 0.1, num_windows) * (1 + np.arange(num_windows) % len(KINDS))
    kl = rng.gamma(1.0, 0.1, num_windows)
    seen = range(num_seen)
    losses = WindowLosses(tuple(nll[:num_seen]), tuple(kl[:num_seen]), 63)
    base_losses = WindowLosses(tuple(base), (0.0,) * num_windows, 63)
    return PlanLosses.build(num_windows, seen, losses), PlanLosses.build(num_windows, range(num_windows), base_losses)


@pytest.mark.parametrize("num_seen", [12, NUM_ROUNDS * len(KINDS)])
def test_losses_by_kind_are_those_of_plain_loops(num_seen):
    losses, base = draw_losses(0, num_seen)
    loss = compute_loss(losses, base, metric="kl", kinds=KINDS)
    delta = variance = nll = kl_mean = kl_variance = 0.0
    for index, (part, kind, weight) in enumerate(zip(loss.by_kind, KINDS, WEIGHTS, strict=True)):
        deltas, kls = [], []
        for window in range(num_seen):
            if window % 3 == index:
                deltas.append(losses.nll[window] - base.nll[window])
                kls.append(losses.kl[window])
        mean = sum(deltas) / len(deltas)
        error = math.sqrt(sum((value - mean) ** 2 for value in deltas) / (len(deltas) - 1) / len(deltas))
        base_nll = sum(base.nll[index::3]) / NUM_ROUNDS
        assert part.kind == kind
        assert part.loss.delta_nll == pytest.approx(mean, abs=FLOAT64_MEAN)
        assert part.loss.delta_nll_se == pytest.approx(error, abs=FLOAT64_MEAN)
        assert part.loss.nll == pytest.approx(base_nll + mean, abs=FLOAT64_MEAN)
        assert (part.loss.num_windows, part.loss.num_tokens) == (num_seen // 3, num_seen // 3 * 63)
        delta += weight * mean
        variance += (weight * error) ** 2
        nll += weight * (base_nll + mean)
        kl_mean += weight * sum(kls) / len(kls)
        kl_variance += (weight * np.std(kls, ddof=1)) ** 2 / len(kls)
    assert loss.delta_nll == pytest.approx(delta, abs=FLOAT64_MEAN)
    assert loss.delta_nll_se == pytest.approx(math.sqrt(variance), abs=FLOAT64_MEAN)
    assert loss.nll == pytest.approx(nll, abs=FLOAT64_MEAN)
    assert (loss.kl_nats_per_token, loss.kl_se) == pytest.approx((kl_mean, math.sqrt(kl_variance)), abs=FLOAT64_MEAN)
    assert loss.num_windows == num_seen
    assert loss.get_cost("nll") == loss.delta_nll
    assert loss.get_told_value("nll") == loss.perplexity


def test_the_worst_case_is_the_cost_of_the_worst_kind():
    losses, base = draw_losses(1, NUM_ROUNDS * len(KINDS))
    mean = compute_loss(losses, base, metric="kl", kinds=KINDS)
    worst = compute_loss(losses, base, metric="kl", kinds=KINDS, worst_case=True)
    assert dataclasses.replace(worst, is_worst_case=False) == mean
    parts = [part.loss for part in worst.by_kind]
    assert worst.get_cost("nll") == max(part.delta_nll for part in parts) > mean.get_cost("nll")
    assert worst.get_cost("kl") == worst.get_told_value("kl") == max(part.kl_nats_per_token for part in parts)
    assert worst.get_cost_se("nll") == max(parts, key=lambda part: part.delta_nll).delta_nll_se
    base_nll = sum(weight * base.nll[index::3].mean() for index, weight in enumerate(WEIGHTS))
    assert worst.get_told_value("nll") == pytest.approx(compute_perplexity(base_nll + worst.get_cost("nll")))


def test_one_kind_is_no_kind():
    losses, base = draw_losses(2, 12)
    expected = compute_loss(losses, base, metric="nll")
    for worst_case in (False, True):
        assert compute_loss(losses, base, metric="nll", kinds=KINDS[:1], worst_case=worst_case) == expected


def test_a_loss_that_is_not_finite_on_one_kind_is_not_finite():
    losses, base = draw_losses(3, 12)
    losses.nll[4] = math.nan
    for worst_case in (False, True):
        loss = compute_loss(losses, base, metric="nll", kinds=KINDS, worst_case=worst_case)
        assert math.isnan(loss.delta_nll)
        assert loss.get_cost("nll") == loss.get_told_value("nll") == math.inf
        assert [math.isfinite(part.loss.get_cost("nll")) for part in loss.by_kind] == [True, False, True]


# ---- Racing ----------------------------------------------------------------------------------------------------------


def judge_mean(differences, weights, num_windows):
    """The bound of Welch and Satterthwaite, in plain loops."""
    mean = error = shares = 0.0
    for difference, weight in zip(differences, weights, strict=True):
        n = len(difference)
        variance = weight**2 * sum((d - sum(difference) / n) ** 2 for d in difference) / (n - 1)
        variance *= 1 / n - 1 / num_windows
        mean += weight * sum(difference) / n
        error += variance
        shares += variance**2 / (n - 1)
    return mean > stats.t.ppf(0.975, error**2 / shares) * math.sqrt(error)


def test_the_mean_over_kinds_is_judged_as_plain_loops_do():
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(300):
        differences = [rng.normal(shift, 0.1, 4) for shift in rng.normal(0.05, 0.1, 3)]
        verdicts.append(is_mean_beaten(differences, weights=WEIGHTS, num_windows=16))
        assert verdicts[-1] == judge_mean(differences, WEIGHTS, 16)
    assert 0.1 < np.mean(verdicts) < 0.9


@pytest.mark.parametrize("worst_case", [False, True])
def test_a_plan_is_wrongly_stopped_about_as_rarely_with_kinds(worst_case):
    """A plan that equals its rival over all 16 windows of each kind, looked at on 4: at most 2.5 % stop."""
    rng = np.random.default_rng(0)
    num_stopped = 0
    for _ in range(2000):
        differences = rng.normal(0.0, [[0.5], [1.0], [2.0]], size=(3, 16))
        differences -= differences.mean(axis=1, keepdims=True)
        seen = list(differences[:, :4])
        if worst_case:
            num_stopped += is_worst_kind_beaten(seen, offsets=[0.0] * 3, num_windows=16)
        else:
            num_stopped += is_mean_beaten(seen, weights=WEIGHTS, num_windows=16)
    assert 0 < num_stopped < 0.035 * 2000


def test_a_plan_loses_where_it_is_clearly_above_its_rivals_worst_kind():
    small, large = np.array([0.1, 0.11, 0.09, 0.1]), np.array([0.5, 0.49, 0.51, 0.5])
    # Worse by 0.1 where the rival is 0.3 better than at its worst: no loss. Worse by 0.5 there: a loss.
    assert not is_worst_kind_beaten([small, -small], offsets=[-0.3, 0.0], num_windows=16)
    assert is_worst_kind_beaten([large, -small], offsets=[-0.3, 0.0], num_windows=16)
    assert is_worst_kind_beaten([-large, small], offsets=[-0.3, 0.0], num_windows=16)
    assert not is_worst_kind_beaten([large[:1], -small], offsets=[-0.3, 0.0], num_windows=16)


def build_losses(windows, deltas):
    """Losses of windows of two kinds, whose means differ by far more than plans do."""
    nll = tuple(2.0 + i % 2 + 0.5 * math.sin(i) + deltas[i % 2] + 0.01 * math.cos(7 * i) for i in windows)
    return WindowLosses(nll, None, 63)


@pytest.mark.parametrize(
    ("worst_case", "deltas", "num_rungs"),
    [
        (False, (0.1, 0.39), 3),  # worse than its rival on one kind, not in the mean
        (False, (0.3, 0.4), 1),
        (True, (0.29, 0.2), 3),  # worse than its rival on the first kind, not than its worst
        (True, (0.1, 0.4), 1),
        (True, (0.4, 0.1), 1),
    ],
)
def test_a_plan_races_on_whole_rounds_of_kinds(store, worst_case, deltas, num_rungs):
    kinds = (TextKind("a"), TextKind("b"))
    racing = Racing(store, num_windows=32, metric="nll", staged=True, kinds=kinds, worst_case=worst_case)
    everything = list(range(32))
    racing.keep(BASE, everything, build_losses(everything, (0.0, 0.0)))
    racing.keep(RIVAL, everything, build_losses(everything, (0.2, 0.3)))
    rungs = []
    while windows := racing.find_next_windows(PLAN, rival=RIVAL):
        rungs.append(windows)
        racing.keep(PLAN, windows, build_losses(windows, deltas))
    assert rungs == [list(range(8)), list(range(8, 16)), list(range(16, 32))][:num_rungs]
    assert racing.get_state(PLAN) == ("complete" if num_rungs == 3 else "stopped")
    loss = racing.compute_loss(PLAN)
    assert [part.loss.delta_nll for part in loss.by_kind] == pytest.approx(deltas, abs=0.02)
    assert loss.get_cost("nll") == pytest.approx(max(deltas) if worst_case else sum(deltas) / 2, abs=0.02)


# ---- Searching -------------------------------------------------------------------------------------------------------


class TwoKindTable(TableEvaluator):
    """The table of a real model as one kind of text, and an invented one where late joins cost more as the other."""

    num_windows = 32

    def compute_deltas(self, plan: Plan) -> tuple[float, float]:
        mask = sum(1 << i for i in plan.joins)
        invented = sum(0.02 * (i + 1) for i in plan.joins)
        return self.nll_of_mask[mask] - self.nll_of_mask[0], invented

    def evaluate_windows(self, plan: Plan, window_indices) -> WindowLosses:
        deltas = self.compute_deltas(plan)
        jitter = [0.01 * math.sin(3 * i + len(plan.joins)) for i in range(self.num_windows)]
        centre = [float(np.mean(jitter[kind::2])) for kind in (0, 1)]  # so that means over all windows are exact
        nll = tuple(2.0 + i % 2 + math.sin(i) + deltas[i % 2] + jitter[i] - centre[i % 2] for i in window_indices)
        return WindowLosses(nll, None, 63)


KINDS_OF_TABLE = (TextKind("table", 3.0), TextKind("invented"))


def find_best(evaluator, worst_case, num_joins):
    """The least cost of all plans with some joins."""
    best = math.inf
    for mask in evaluator.nll_of_mask:
        joins = [i for i in range(evaluator.num_layers - 1) if mask >> i & 1]
        if len(joins) == num_joins:
            first, second = evaluator.compute_deltas(Plan.from_joins(evaluator.num_layers, joins))
            best = min(best, max(first, second) if worst_case else 0.75 * first + 0.25 * second)
    return best


@pytest.mark.parametrize("worst_case", [False, True])
def test_a_search_finds_the_front_of_the_mean_or_of_the_worst_kind(store, worst_case):
    evaluator = TwoKindTable()
    options = {"space": PlanSpace(evaluator.num_layers), "budget": 80, "store": store}
    options |= {"kinds": KINDS_OF_TABLE, "worst_case": worst_case, "sampler": "pairset"}
    result = run_study(evaluator=evaluator, **options)
    assert any(found.state == "stopped" for found in result.results), "racing has something to do"
    for point in result.front[1:6]:
        first, second = evaluator.compute_deltas(point.plan)
        assert [part.loss.delta_nll for part in point.loss.by_kind] == pytest.approx([first, second])
        assert point.get_cost("nll") == pytest.approx(max(first, second) if worst_case else 0.75 * first + second / 4)
        assert point.get_cost("nll") == pytest.approx(find_best(evaluator, worst_case, point.num_joins), abs=0.01)
    study = optuna.load_study(study_name="demo", storage=store.optuna_storage)
    base_nll = result.baseline.loss.nll
    for trial, found in zip(study.get_trials(deepcopy=False), result.results, strict=True):
        if found.state == "complete":
            told = found.get_cost("nll") + base_nll
            assert trial.values[1] == pytest.approx(math.exp(told))
        assert list(json.loads(trial.user_attrs["delta_nll_by_kind"])) == ["table", "invented"]
    again = {found.plan: found for found in read_results(store)}
    assert all(again[found.plan].loss == found.loss for found in result.results)
    for changes in ({"worst_case": not worst_case}, {"kinds": ()}, {"kinds": KINDS_OF_TABLE[::-1]}):
        with pytest.raises(ResumeError):
            run_study(evaluator=evaluator, **{**options, **changes})


def test_held_out_losses_have_kinds_of_their_own(store):
    unseen = (TextKind("x"), TextKind("y"), TextKind("z", 2.0))
    store.save_settings(write_kinds({"proxy": KINDS_OF_TABLE, "heldout": unseen}))
    evaluator = TwoKindTable()
    space = PlanSpace(evaluator.num_layers)
    result = run_study(evaluator=evaluator, space=space, budget=5, store=store, kinds=KINDS_OF_TABLE)
    for found in result.results:
        held = TwoKindTable()
        held.num_windows = 12
        evaluate_stored_plan(store, held, found.plan, split="heldout")
    for found in read_results(store):
        assert [part.kind for part in found.loss.by_kind] == list(KINDS_OF_TABLE)
        assert [part.kind for part in found.heldout.by_kind] == list(unseen)


def test_windows_must_be_as_many_of_every_kind(store):
    evaluator = TwoKindTable()
    with pytest.raises(ConfigError, match="32 windows are not as many of each of 3 kinds"):
        run_study(evaluator=evaluator, space=PlanSpace(18), budget=2, store=store, kinds=KINDS)


def test_a_study_of_one_kind_records_nothing_new(store):
    evaluator = TwoKindTable()
    run_study(evaluator=evaluator, space=PlanSpace(18), budget=3, store=store, kinds=KINDS[:1])
    assert "kinds" not in store.load_settings()
    assert all(not found.loss.by_kind for found in read_results(store))


class FailingTable(TwoKindTable):
    """Is interrupted at one of its calls."""

    def __init__(self, fail_at: int) -> None:
        super().__init__()
        self.num_left = fail_at

    def evaluate_windows(self, plan: Plan, window_indices) -> WindowLosses:
        self.num_left -= 1
        if self.num_left < 0:
            raise KeyboardInterrupt
        return super().evaluate_windows(plan, window_indices)


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path):
    options = {"space": PlanSpace(18), "budget": 25, "kinds": KINDS_OF_TABLE, "worst_case": True}
    found = {}
    for name in ("whole", "interrupted"):
        with StudyStore(f"sqlite:///{tmp_path / name}.db", study_name="demo") as store:
            store.save_settings({})
            if name == "interrupted":
                with pytest.raises(KeyboardInterrupt):
                    run_study(evaluator=FailingTable(20), store=store, **options)
            result = run_study(evaluator=TwoKindTable(), store=store, **options)
            found[name] = {point.plan: (point.loss, point.state) for point in result.results}
    assert found["interrupted"] == found["whole"]
