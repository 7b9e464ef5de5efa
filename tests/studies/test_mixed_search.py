"""A search of every join and drop of a tiny model: what is counted, and that losses are those of each plan alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lpsearch.data import Windows
from lpsearch.evaluation import ModelEvaluator
from lpsearch.plan import Plan
from lpsearch.search import PlanSpace
from studies import mixed_search
from studies.mixed_search import EVERYTHING, LONG_METHODS, METHODS, Landscape, Run, run_method
from studies.plan_batches import PlanBatchEvaluator
from tests.tiny_models import VOCAB_SIZE, build_tiny_model
from tests.tolerances import FLOAT32_LOSS

SHARES = (0.1, 0.25)


def build_windows() -> Windows:
    rng = np.random.default_rng(0)
    return Windows(rng.integers(3, VOCAB_SIZE, (2, 16), dtype=np.int32), "random")


@pytest.fixture(scope="module")
def landscape() -> Landscape:
    evaluator = PlanBatchEvaluator(build_tiny_model("llama"), build_windows())
    return Landscape(evaluator, num_layers=6, join_saving=0.25)


@pytest.mark.parametrize("method", sorted({*METHODS, *LONG_METHODS}))
def test_a_method_keeps_to_its_budget_and_the_space(method: str, landscape: Landscape):
    run = run_method(method, landscape, budget=70, shares=SHARES, seed=0)
    space = PlanSpace(6, allow=EVERYTHING)
    assert 60 <= len(run.plans) <= 70
    assert all(plan in space for plan in run.plans)
    again = run_method(method, landscape, budget=70, shares=SHARES, seed=0)
    assert list(again.plans) == list(run.plans)
    assert all(np.isfinite(run.find_losses(SHARES)))


def test_losses_and_shares_are_those_of_each_plan(landscape: Landscape):
    run = run_method("random", landscape, budget=30, shares=SHARES, seed=1)
    evaluator = ModelEvaluator(model=build_tiny_model("llama"), windows=build_windows(), cache_bytes=0)
    slow = {plan: float(np.mean(evaluator.evaluate_windows(plan, [0, 1]).nll_nats_per_token)) for plan in run.plans}
    base = slow[Plan.baseline(6)]
    for plan, nll in slow.items():
        assert landscape.losses[plan] == pytest.approx(nll - base, abs=FLOAT32_LOSS)
    pair = Plan.from_joins(6, [1]).drop({"mlp": [4]})
    assert landscape.get_share(pair) == pytest.approx((0.25 * (1 + 2) + 2) / 18)
    for share, loss in zip(SHARES, run.find_losses(SHARES), strict=True):
        enough = [landscape.losses[plan] for plan in run.plans if landscape.get_share(plan) > share - 1e-6]
        assert loss == min(enough)


def test_the_greedy_search_adds_what_costs_least_for_its_time(monkeypatch: pytest.MonkeyPatch):
    """Where every price is measured again at each step: the plans of a slow loop over all plans with a choice more."""
    monkeypatch.setattr(mixed_search, "LAZY_PLANS", 100)
    evaluator = PlanBatchEvaluator(build_tiny_model("llama", seed=3), build_windows())
    landscape = Landscape(evaluator, num_layers=6, join_saving=0.25)
    space = PlanSpace(6, allow=EVERYTHING)
    plan, expected = Plan.baseline(6), [Plan.baseline(6)]
    while landscape.get_share(plan) < 0.25:
        made = np.array(space.encode(plan))
        prices: dict[Plan, float] = {}
        for other in space.enumerate_plans_with(int(made.sum()) + 1):
            if (np.array(space.encode(other)) >= made).all():
                landscape.measure([other])
                added = landscape.losses[other] - landscape.losses[plan]
                saved = landscape.get_share(other) - landscape.get_share(plan)
                if saved > 0:
                    prices[other] = added / saved if added > 0 else added
        expected += [other for other in prices if other not in expected]
        plan = min(prices, key=lambda other: prices[other])
    run = run_method("greedy", landscape, budget=len(expected), shares=(0.25,), seed=0)
    assert set(expected) <= set(run.plans)


def test_runs_count_a_plan_once(landscape: Landscape):
    run = Run(landscape, 3)
    plans = [Plan.from_joins(6, [i]) for i in range(4)]
    run.evaluate([plans[0], plans[0]])
    run.evaluate([plans[0], plans[1], plans[2]])
    assert list(run.plans) == [Plan.baseline(6), plans[0], plans[1]]
    assert run.room == 0


def test_the_comparison_is_printed(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "windows.npy"
    np.save(path, build_windows().input_ids)
    arguments = ["--model", str(tiny_model_dir), "--data", str(path), "--device", "cpu", "--dtype", "float32"]
    arguments += ["--budget", "40", "--long-budget", "90", "--shares", "0.1,0.25"]
    assert mixed_search.main(arguments) == 0
    *rows, last = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["method"] for row in rows] == [*METHODS, *LONG_METHODS]
    assert last["choices"] == 5 + 6 + 6
    for place, best in enumerate(last["best"]):
        losses = [row["loss"][place] for row in rows if row["loss"][place] is not None]
        assert min(losses) == best
        assert rows[0]["above_best"][place] == pytest.approx(rows[0]["loss"][place] - best)


@pytest.mark.parametrize("arguments", [["--shares", "2"], ["--shares", "x"], ["--budget", "0"], ["--join-saving", "2"]])
def test_what_cannot_be_searched_is_refused(
    arguments: list[str], tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
):
    assert mixed_search.main(["--model", str(tiny_model_dir), "--data", "nowhere.npz", *arguments]) == 2
    assert arguments[0] in capsys.readouterr().err
