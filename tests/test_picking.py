"""The rule by which a plan of a front is picked, against a search by eye."""

from __future__ import annotations

import itertools
import random

import pytest

from lpsearch.picking import Candidate, pick_candidate


@pytest.mark.parametrize("objective", ["depth", "latency"])
@pytest.mark.parametrize("max_loss", [None, -0.05, 0.1, 0.3])
@pytest.mark.parametrize("min_speedup", [None, 0.9, 1.0, 1.2])
def test_the_picked_one_beats_every_other(objective: str, max_loss: float | None, min_speedup: float | None) -> None:
    if max_loss is None and min_speedup is None:
        return
    chance = random.Random(0)
    num_picked = 0
    for _, num_plans in itertools.product(range(20), range(6)):
        front = [Candidate(0, 0.0, 1.0)] + [
            Candidate(joins + 1, chance.uniform(-0.1, 0.5), chance.choice([None, 0.95, 1.1, 1.3]))
            for joins in range(num_plans)
        ]
        index = pick_candidate(front, objective=objective, max_loss=max_loss, min_speedup=min_speedup)
        meeting = []
        for place, plan in enumerate(front):
            if max_loss is not None and plan.loss > max_loss:
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
                assert picked.loss <= other.loss
            elif objective == "depth":
                assert picked.num_joins >= other.num_joins
            else:
                assert (picked.speedup or 0.0, -picked.loss) >= (other.speedup or 0.0, -other.loss)
    assert num_picked > 0
