"""The front as a table: what gives way where there is little room."""

from __future__ import annotations

import dataclasses
import io
import itertools

import pytest
from rich.console import Console

from lpsearch.commands.tables import build_front_table, spread_rows
from lpsearch.plan import Plan
from lpsearch.search import TrialResult
from lpsearch.wording import describe_layers
from tests.results import build_result


def build_front(num_layers: int = 30, **fields: float) -> list[TrialResult]:
    """Build a front of 0, 1, ... joins, from the last pair of layers on."""
    front = []
    for num_joins in range(num_layers // 2 + 1):
        first = num_layers - 2 * num_joins
        groups = [[i] for i in range(first)] + [[i, i + 1] for i in range(first, num_layers, 2)]
        values = {"delta_nll_se": 0.01 if num_joins else 0.0, "latency_ms": 100.0 - num_joins, **fields}
        values["speedup"] = 100.0 / values["latency_ms"]
        front.append(build_result(Plan.from_groups(groups), 0.1 * num_joins, trial=num_joins, **values))
    return front


def check(front: list[TrialResult], **fields: float) -> list[TrialResult]:
    """Give every plan a held-out loss: that on the proxy windows, but for some fields."""
    return [dataclasses.replace(result, heldout=dataclasses.replace(result.loss, **fields)) for result in front]


def render(front: list[TrialResult], width: int, **options: object) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width).print(build_front_table(front, width=width, **options))
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("width", range(36, 200, 7))
@pytest.mark.parametrize("is_brief", [False, True])
def test_no_line_is_wider_than_the_terminal(width: int, is_brief: bool) -> None:
    front = build_front()
    lines = render(front, width, is_brief=is_brief)
    assert max(map(len, lines)) <= width
    assert "…" not in lines[0]
    for record in front[1:]:
        assert any(f"{record.loss.delta_nll:.3f} ±0.010" in line for line in lines), "numbers are whole"
    if is_brief:
        assert len(lines) == len(front) + 2, "one line a plan"


@pytest.mark.parametrize(
    ("width", "shown", "hidden"),
    [
        (140, ["less depth", "perplexity", "ms/token", "speed-up", "layers together"], []),
        (80, ["less depth", "speed-up", "layers together"], ["perplexity", "ms/token"]),
        (56, ["less depth", "held out"], ["speed-up", "layers"]),
        (40, ["joins", "delta nll", "held out"], ["less depth", "layers"]),
    ],
)
def test_columns_give_way_in_order(width: int, shown: list[str], hidden: list[str]) -> None:
    front = build_front()
    header = render(check(front, delta_nll_se=0.02), width)[0]
    assert all(name in header for name in shown), header
    assert not any(name in header for name in hidden), header


def test_layers_stand_whole_where_there_is_room() -> None:
    front = build_front()
    text = " ".join(" ".join(render(front, 140)).split())
    assert describe_layers(front[3].plan) == "24-25 26-27 28-29"
    for record in front[1:8]:
        assert describe_layers(record.plan) in text


def test_kl_is_shown_where_it_was_measured() -> None:
    assert " kl " in render(build_front(kl_nats_per_token=0.5, kl_se=0.1), 120)[0]
    assert " kl " not in render(build_front(), 120)[0]


def test_columns_are_named_by_the_loss_that_was_searched() -> None:
    for front, names, value in (
        (build_front(), ["delta nll", "held out"], "0.100 ±0.010"),
        (build_front(kl_nats_per_token=0.5, kl_se=0.1), ["kl", "held-out kl", "delta nll"], "0.500 ±0.100"),
    ):
        checked = check(front, delta_nll=0.75, delta_nll_se=0.02, kl_nats_per_token=0.75, kl_se=0.02)
        header, _, _, row, *_ = render(checked, 200)
        places = [header.index(f" {name}") for name in names]
        assert places == sorted(places)
        assert row.split()[0] == "1"
        assert row.index(value) < row.index("0.750 ±0.020")


def test_rows_are_spread_from_the_first_to_the_last() -> None:
    for num_rows, count in itertools.product(range(1, 30), range(2, 12)):
        rows = spread_rows(range(num_rows), count)
        assert len(rows) == min(num_rows, count) == len(set(rows))
        assert (rows[0], rows[-1]) == (0, num_rows - 1)
        steps = {second - first for first, second in itertools.pairwise(rows)}
        assert max(steps, default=1) - min(steps, default=1) <= 1


@pytest.mark.parametrize("width", [40, 60, 72, 80, 100, 140, 200])
def test_the_speed_up_stays_where_time_is_what_is_saved(width: int) -> None:
    front = build_front()
    dropped = front[3].plan.drop({"attention": [5, 7], "mlp": [9]})
    front[3] = dataclasses.replace(front[3], plan=dropped)
    lines = render(check(front, delta_nll_se=0.02), width)
    header = lines[0]
    assert all(name in header for name in ("joins", "drops", "held out"))
    assert "…" not in header
    assert ("delta nll" in header) == (width > 40)
    assert ("speed-up" in header) == (width >= 60)
    assert ("less depth" in header) == (width >= 100)
    assert "layers together" not in header, "some are dropped"
    assert ("layers" in header) == (width >= 72)
    if width == 200:
        assert describe_layers(dropped) in " ".join(" ".join(lines).split())
