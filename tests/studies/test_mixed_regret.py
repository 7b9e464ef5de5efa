"""Replays of plans that join and drop: the regret against a slow loop, and a table of a real model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lpsearch.plan import Plan
from studies import mixed_regret
from studies.mixed_regret import MixedTable, compute_regrets, estimate_time, load_mixed_table, replay
from tests.tolerances import FLOAT64_COSTS

TABLE = Path(__file__).parents[1] / "data" / "tables" / "smollm2-135m-drops.npz"
"""SmolLM2-135M, layers 20 to 24: every plan that joins or drops."""


@pytest.fixture(scope="module")
def table() -> MixedTable:
    return load_mixed_table(TABLE)


def test_the_table_holds_every_plan_of_five_layers(table: MixedTable):
    assert (table.num_layers, len(table.nll)) == (5, 3404)  # that without any branch is one of the whole model's plans
    assert len({plan.key for plan in table.nll}) == 3404


def test_times_are_those_of_stages():
    plan = Plan.from_groups([[0], [1, 2], [3, 4]]).drop({"attention": [0, 3], "mlp": [1]})
    assert estimate_time(Plan.baseline(5), join_saving=0.25) == 1 + 5 * 3
    assert estimate_time(plan, join_saving=0.25) == pytest.approx(1 + 2 + (1.75 + 2) + (1 + 2 * 1.75))


def test_regrets_are_those_of_a_slow_loop(table: MixedTable):
    rng = np.random.default_rng(0)
    plans = [list(table.nll)[row] for row in rng.choice(len(table.nll), 40, replace=False)]
    found = compute_regrets(table, plans, join_saving=0.25)
    for share, regret in zip(mixed_regret.SHARES, found, strict=True):
        limit = 16 - share * 15 + FLOAT64_COSTS
        best = min(table.nll[plan] for plan in table.nll if estimate_time(plan, join_saving=0.25) <= limit)
        least = min(table.nll[plan] for plan in plans if estimate_time(plan, join_saving=0.25) <= limit)
        assert regret == pytest.approx(least - best, abs=FLOAT64_COSTS)
    nothing = compute_regrets(table, [Plan.baseline(5)], join_saving=0.25)
    assert all(regret > 0 for regret in nothing)


@pytest.mark.parametrize("join_saving", [0.25, 0.7])
def test_pairset_finds_the_front_of_the_table(join_saving: float, table: MixedTable):
    options = {"seed": 0, "join_saving": join_saving, "allow": ("joins", "drop-attention", "drop-mlp")}
    plans = replay(table, sampler="pairset", budget=200, **options)
    assert len(plans) == len(set(plans)) == 200
    assert compute_regrets(table, plans, join_saving=join_saving) == pytest.approx([0] * 5, abs=FLOAT64_COSTS)


def test_the_methods_are_printed(table: MixedTable, capsys: pytest.CaptureFixture[str]):
    arguments = ["--table", str(TABLE), "--seeds", "1", "--checkpoints", "20,30", "--methods", "random,separate"]
    assert mixed_regret.main(arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(line["method"], line["evaluations"]) for line in lines] == [
        ("random", 20),
        ("random", 30),
        ("separate", 20),
        ("separate", 30),
    ]
    for first, second in (lines[:2], lines[2:]):
        assert second["mean_regret_nats"] <= first["mean_regret_nats"]


@pytest.mark.parametrize("arguments", [["--methods", "greedy"], ["--checkpoints", "x"], ["--table", "nowhere.npz"]])
def test_what_cannot_be_replayed_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert mixed_regret.main(["--table", str(TABLE), "--seeds", "1", *arguments]) == 2
    assert arguments[1] in capsys.readouterr().err


def test_a_table_of_joins_is_refused(capsys: pytest.CaptureFixture[str]):
    assert mixed_regret.main(["--table", str(TABLE.with_name("gemma3-270m.npz")), "--seeds", "1"]) == 2
    assert "not a table of plans that join and drop" in capsys.readouterr().err
