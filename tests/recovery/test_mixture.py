"""Which windows a step sees: shares, order, and that it depends on the seed and the step alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from lpsearch.data import Windows
from lpsearch.errors import DataError
from lpsearch.recovery.mixture import Mixture
from tests.recovery.distilling import build_windows


@pytest.fixture
def mixture() -> Mixture:
    return Mixture({"a": build_windows(7, 0), "b": build_windows(5, 1), "c": build_windows(3, 2)}, {"a": 2.0})


def test_a_step_depends_on_the_seed_and_the_step_alone(mixture: Mixture) -> None:
    long = mixture.schedule(50, 6, seed=3)
    assert np.array_equal(mixture.schedule(20, 6, seed=3), long[:20])
    assert not np.array_equal(mixture.schedule(50, 6, seed=4), long)


def test_kinds_come_in_their_shares_in_every_few_steps(mixture: Mixture) -> None:
    schedule = mixture.schedule(50, 8, seed=0)
    for start in range(0, 50, 5):
        counts = Counter(schedule[start : start + 5, :, 0].flatten().tolist())
        assert abs(counts[0] - 20) <= 2
        assert abs(counts[1] - 10) <= 2
        assert abs(counts[2] - 10) <= 2


def test_every_window_comes_once_before_any_comes_again(mixture: Mixture) -> None:
    schedule = mixture.schedule(30, 8, seed=0).reshape(-1, 2)
    for kind, windows in enumerate(mixture.windows.values()):
        chosen = schedule[schedule[:, 0] == kind, 1]
        rounds = [chosen[i : i + windows.num_windows].tolist() for i in range(0, len(chosen), windows.num_windows)]
        assert all(sorted(r) == list(range(windows.num_windows)) for r in rounds[:-1])
        assert rounds[0] != rounds[1]


def test_gathered_tokens_are_those_of_the_windows(mixture: Mixture) -> None:
    chosen = mixture.schedule(3, 8, seed=0)[1]
    tokens = mixture.gather(chosen)
    for (kind, window), row in zip(chosen, tokens, strict=True):
        assert np.array_equal(mixture.windows["abc"[kind]].input_ids[window], row)


def test_what_does_not_go_together_is_refused() -> None:
    other = Windows(np.ones((2, 9), dtype=np.int32), "other")
    with pytest.raises(DataError, match="there is no text"):
        Mixture({})
    with pytest.raises(DataError, match=r"windows of \{'a': 16, 'b': 9\} tokens"):
        Mixture({"a": build_windows(2, 0), "b": other})
    with pytest.raises(DataError, match="a weight is for 'b'"):
        Mixture({"a": other}, {"b": 1.0})
    with pytest.raises(DataError, match="the weight of 'a' is 0"):
        Mixture({"a": other}, {"a": 0.0})
