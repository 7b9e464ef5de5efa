"""Rungs: nested, whole, the same whenever they are asked for."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpsearch.evaluation.rungs import FIRST_RUNG_WINDOWS, find_rung_starts, split_by_rung


@pytest.mark.parametrize(
    ("num_windows", "starts"),
    [(1, (0,)), (7, (0,)), (8, (0, 4)), (15, (0, 4)), (16, (0, 4, 8)), (33, (0, 8, 16)), (64, (0, 16, 32))],
)
def test_starts(num_windows, starts):
    assert find_rung_starts(num_windows) == starts


@given(num_windows=st.integers(1, 300), data=st.data())
def test_every_window_stands_in_one_rung(num_windows, data):
    chosen = data.draw(st.lists(st.integers(0, num_windows - 1), unique=True))
    parts = split_by_rung(chosen, num_windows)
    assert sorted(index for part in parts for index in part) == sorted(chosen)
    assert all(parts)
    assert all(max(left) < min(right) for left, right in itertools.pairwise(parts))
    for part in parts:  # in the order in which they were given
        assert part == [index for index in chosen if index in part]


@given(num_windows=st.integers(1, 300))
def test_each_rung_at_least_doubles_what_came_before(num_windows):
    starts = (*find_rung_starts(num_windows), num_windows)
    assert starts[0] == 0
    assert starts[1] >= min(num_windows, FIRST_RUNG_WINDOWS)
    assert all(2 * before <= after for before, after in itertools.pairwise(starts))


@given(num_rounds=st.integers(1, 80), num_kinds=st.integers(1, 5))
def test_rungs_of_several_kinds_are_those_of_one_in_rounds(num_rounds, num_kinds):
    num_windows = num_rounds * num_kinds
    starts = find_rung_starts(num_windows, num_kinds)
    assert starts == tuple(start * num_kinds for start in find_rung_starts(num_rounds))
    for rung in split_by_rung(range(num_windows), num_windows, num_kinds):
        kinds = [index % num_kinds for index in rung]
        assert {kinds.count(kind) for kind in range(num_kinds)} == {len(rung) // num_kinds}
