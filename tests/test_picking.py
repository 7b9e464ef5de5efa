"""The rule by which a plan of a front is picked, against a search by eye."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest

from lpsearch.picking import pick_plan
from lpsearch.plan import Plan
from lpsearch.search import TrialResult
from tests.results import build_result

NUM_LAYERS = 12


def build_plan(num_joins: int, loss: float, speedup: float | None) -> TrialResult:
    plan = Plan.from_joins(NUM_LAYERS, range(0, 2 * num_joins, 2))
    return build_result(plan, loss, trial=num_joins, speedup=speedup)


@pytest.mark.parametrize("objective", ["depth", "latency"])
@pytest.mark.parametrize("max_loss", [None, -0.05, 0.1, 0.3])
@pytest.mark.parametrize("min_speedup", [None, 0.9, 1.0, 1.2])
def test_the_picked_one_beats_every_other(objective: str, max_loss: float | None, min_speedup: float | None) -> None:
    if max_loss is None and min_speedup is None:
        return
    chance = random.Random(0)
    num_picked = 0
    for _, num_plans in itertools.product(range(20), range(6)):
        front = [build_plan(0, 0.0, 1.0)] + [
            build_plan(joins + 1, chance.uniform(-0.1, 0.5), chance.choice([None, 0.95, 1.1, 1.3]))
            for joins in range(num_plans)
        ]
        index = pick_plan(front, metric="nll", objective=objective, max_loss=max_loss, min_speedup=min_speedup)
        meeting = []
        for place, plan in enumerate(front):
            if max_loss is not None and plan.loss.delta_nll > max_loss:
                continue
            if min_speedup is not None and (plan.speedup is None or plan.speedup < min_speedup):
                continue
            meeting.append(place)
        if not meeting:
            assert index is None
            continue
        num_picked += 1
        assert index in meeting
        picked = front[index]
        if picked.num_joins == 0:
            assert meeting == [0], "the unmodified model is the last resort"
            continue
        for place in meeting:
            other = front[place]
            if other.num_joins == 0:
                continue
            if max_loss is None:
                assert picked.loss.delta_nll <= other.loss.delta_nll
            elif objective == "depth":
                assert picked.num_joins >= other.num_joins
            else:
                assert (picked.speedup or 0.0, -picked.loss.delta_nll) >= (other.speedup or 0.0, -other.loss.delta_nll)
    assert num_picked > 0


@pytest.mark.parametrize("objective", ["depth", "latency"])
def test_a_plan_that_only_drops_is_no_unmodified_model(objective: str) -> None:
    base, joined = build_plan(0, 0.0, 1.0), build_plan(1, 0.05, 1.03)
    drops = Plan.baseline(NUM_LAYERS).drop({"attention": [1, 4], "mlp": [7]})
    dropping = build_result(drops, 0.06, trial=2, speedup=1.1)
    assert pick_plan([base, dropping], metric="nll", objective=objective, max_loss=0.1) == 1
    assert pick_plan([base, joined, dropping], metric="nll", objective=objective, max_loss=0.1) == 2
    assert pick_plan([base, joined, dropping], metric="nll", objective=objective, max_loss=0.055) == 1
    assert pick_plan([base, dropping], metric="nll", objective=objective, min_speedup=1.0) == 1
    assert pick_plan([base, joined, dropping], metric="nll", objective=objective, max_loss=0.01) == 0


def test_the_held_out_loss_decides_where_it_is_known_and_finite() -> None:
    base, seen, unseen = (build_plan(num_joins, 0.1 * num_joins, None) for num_joins in range(3))
    heldout = dataclasses.replace(unseen.loss, delta_nll=0.05)
    front = [base, seen, dataclasses.replace(unseen, heldout=heldout)]
    assert pick_plan(front, metric="nll", objective="depth", max_loss=0.07) == 2
    front[2] = dataclasses.replace(unseen, heldout=dataclasses.replace(heldout, delta_nll=math.nan))
    assert pick_plan(front, metric="nll", objective="depth", max_loss=0.07) == 0
    assert pick_plan(front, metric="nll", objective="depth", max_loss=0.2) == 2


def test_a_speed_up_within_its_margin_saves_no_time() -> None:
    front = [build_plan(0, 0.0, 1.0), build_plan(1, 0.05, 1.007), build_plan(2, 0.08, 1.03)]

    def pick(objective: str = "latency", **limits: float) -> int | None:
        return pick_plan(front, metric="nll", objective=objective, **limits)

    assert pick(max_loss=0.1, margin=0.05) == 0
    assert pick(max_loss=0.1, margin=0.01) == 2
    assert pick(max_loss=0.06, margin=0.01) == 0
    assert pick(max_loss=0.06) == 1
    assert pick("depth", max_loss=0.1, margin=0.05) == 2, "depth is saved whatever the machine"
    assert pick(max_loss=0.1, min_speedup=1.0, margin=0.05) == 2, "as much as was asked for"
    front[1] = build_plan(1, -0.05, 1.007)
    assert pick(max_loss=-0.01, margin=0.05) == 1, "the unmodified model loses too much"
