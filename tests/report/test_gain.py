"""What the report and the summary say where a plan is no faster that could be measured."""

from __future__ import annotations

import dataclasses

import pytest

from lpsearch.latency.model import LatencyModel
from lpsearch.report import StudyReport, build_html
from lpsearch.report.advice import LOSS_LIMITS, describe_no_gain, pick_plans
from tests.report.conftest import MakeStudy, build_profile
from tests.report.pages import parse


def set_speedups(report: StudyReport, *, largest: float, device: str = "a device", **settings: object) -> StudyReport:
    """Give the plans of a front losses within every limit, and speed-ups that rise to the largest."""
    profile = build_profile().model_copy(update={"device": device})
    last = len(report.front) - 1
    front = tuple(
        dataclasses.replace(
            point,
            speedup=1 + (largest - 1) * index / last,
            heldout=dataclasses.replace(point.loss, delta_nll=0.001 * index),
        )
        for index, point in enumerate(report.front)
    )
    return dataclasses.replace(
        report, front=front, latency_model=LatencyModel(profile), settings={**report.settings, **settings}
    )


def test_a_gain_within_the_margin_is_none(make_study: MakeStudy) -> None:
    found = make_study()
    margin = LatencyModel(build_profile()).speedup_margin
    assert 0.06 < margin < 0.15, "more than the error that was checked, since the timing blurs more"
    slow = set_speedups(found, largest=1.007, device="cpu (x86_64)")
    sentence = describe_no_gain(slow)
    assert sentence is not None
    for part in (
        f"the fastest plan is 1.007x ±{margin:.1%}",
        ": GPUs (",
        "--allow joins,drops",
        "--recover refit",
    ):
        assert part in sentence
    page = parse(build_html(slow))
    assert sentence in page.text
    assert page.text.count("No faster here that could be measured") == len(LOSS_LIMITS)
    assert [pick.gains for pick in pick_plans(slow)] == [False] * 3
    assert all(pick.index == len(slow.front) - 1 for pick in pick_plans(slow)), "of least depth"

    by_latency = set_speedups(found, largest=1.007, objective="latency")
    assert [(pick.index, pick.gains) for pick in pick_plans(by_latency)] == [(None, False)] * 3
    assert "more GPUs (" in str(describe_no_gain(by_latency))
    assert parse(build_html(by_latency)).text.count("is measurably faster than the unmodified model") == 3


def test_what_a_study_has_already_is_not_advised(make_study: MakeStudy) -> None:
    slow = set_speedups(make_study(), largest=1.007, recover="refit")
    assert "--recover" not in str(describe_no_gain(slow))


@pytest.mark.parametrize("objective", ["depth", "latency"])
def test_a_gain_beyond_the_margin_is_picked_without_a_word(make_study: MakeStudy, objective: str) -> None:
    fast = set_speedups(make_study(), largest=1.5, objective=objective)
    assert describe_no_gain(fast) is None
    assert [(pick.index, pick.gains) for pick in pick_plans(fast)] == [(len(fast.front) - 1, True)] * 3
    text = parse(build_html(fast)).text
    assert "that could be measured" not in text


def test_where_no_time_is_known_nothing_is_said_of_it(make_study: MakeStudy) -> None:
    report = make_study(latency=False)
    assert describe_no_gain(report) is None
    assert [pick.gains for pick in pick_plans(report)] == [None] * 3
