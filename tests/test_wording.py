"""How plans are written for people."""

from __future__ import annotations

import pytest

from lpsearch.plan import Plan
from lpsearch.wording import describe_changes, describe_layers, describe_origin


@pytest.mark.parametrize(
    ("joins", "dropped", "layers", "changes"),
    [
        ([], {}, "", "0 joins"),
        ([3], {}, "3-4", "1 join"),
        ([3, 7, 8], {}, "3-4 7-9", "3 joins"),
        ([], {"attention": [5, 7]}, "without attention 5, 7", "2 attentions dropped"),
        ([], {"mlp": [14]}, "without MLP 14", "1 MLP dropped"),
        (
            [3, 7],
            {"attention": [5], "mlp": [8, 14]},
            "3-4 7-8; without attention 5; without MLP 8, 14",
            "2 joins, 1 attention and 2 MLPs dropped",
        ),
    ],
)
def test_plans_in_words(joins: list[int], dropped: dict[str, list[int]], layers: str, changes: str) -> None:
    plan = Plan.from_joins(16, joins).drop(dropped)
    assert describe_layers(plan) == layers
    assert describe_changes(plan) == changes


def test_what_proposed_a_plan_is_named_by_its_method() -> None:
    assert [describe_origin(origin) for origin in ("programme", "surrogate", "scan")] == [
        "dynamic program",
        "expected improvement",
        "scan",
    ]
