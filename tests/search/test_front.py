"""The Pareto front."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lpsearch.plan import Plan
from lpsearch.search.front import build_front
from lpsearch.search.results import TrialResult
from tests.results import build_result


def build_record(trial: int, joins, delta: float, latency_ms: float | None = None) -> TrialResult:
    return build_result(Plan.from_joins(9, joins), delta, trial=trial, latency_ms=latency_ms)


records_strategy = st.lists(
    st.tuples(st.sets(st.sampled_from([0, 2, 4, 6]), min_size=1), st.sampled_from([-0.1, 0.0, 0.1, 0.2, float("nan")])),
    max_size=12,
).map(lambda rows: [build_record(0, (), 0.0), *(build_record(i + 1, *row) for i, row in enumerate(rows))])


@given(records_strategy)
def test_front_is_what_no_other_plan_dominates(records):
    def dominates(a, b):
        as_good = a.num_joins >= b.num_joins and a.loss.delta_nll <= b.loss.delta_nll
        better = a.num_joins > b.num_joins or a.loss.delta_nll < b.loss.delta_nll or a.trial < b.trial
        return as_good and better

    joined = [record for record in records if record.num_joins and record.loss.delta_nll == record.loss.delta_nll]
    expected = [b for b in joined if not any(dominates(a, b) for a in joined)]
    front = build_front(records)
    assert front == [records[0], *sorted(expected, key=lambda record: record.num_joins)]


def test_no_front_without_a_baseline():
    assert build_front([build_record(0, (1,), 0.1)]) == []


def test_latency_front_compares_latencies():
    records = [
        build_record(0, (), 0.0, 10.0),
        build_record(1, (0,), 0.3, 9.0),
        build_record(2, (2,), 0.1, 9.5),
        build_record(3, (0, 2), 0.2, 9.2),
        build_record(4, (4,), 0.05, 10.5),
        build_record(5, (2, 4), 0.4, 9.0),
    ]
    assert [record.trial for record in build_front(records, objective="latency")] == [0, 1, 2, 3]
