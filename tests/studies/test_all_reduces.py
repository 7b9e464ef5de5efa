"""The counts of all-reduces are those of real ranks, and what the ranks compute is what one rank does."""

from __future__ import annotations

import json

import pytest

from studies import all_reduces
from tests.tolerances import FLOAT32_LOGITS


@pytest.mark.usefixtures("warm_starts")
@pytest.mark.slow
def test_sums_are_counted_and_the_logits_are_those_of_one_rank(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["all_reduces.py", "--models", "llama3.2-1b", "--tp", "2"])
    all_reduces.main()
    *table, document = capsys.readouterr().out.splitlines()
    rows = json.loads(document)["rows"]
    assert len(table) == 2 + len(rows)
    by_plan = {row["plan"]: row for row in rows}
    # Of 16 layers with 3 groups of 2, 13 depths are left; each adds up after its attentions and after its MLPs.
    assert (by_plan["3 groups of 2"]["depth"], by_plan["3 groups of 2"]["sums"]) == (13, 26)
    for row in rows:
        assert row["sums"] == row["prefill_sums"] == 2 * row["depth"]
        assert row["decode_kib"]["1"] == row["sums"] * 2048 * 2 / 1024
        assert row["error"] <= FLOAT32_LOGITS


def test_plans_have_the_groups_that_their_names_say():
    for num_layers in (16, 32, 80):
        for name, plan in all_reduces.list_plans(num_layers).items():
            if name != "unmodified":
                count, size = int(name.split()[0]), int(name.split()[-1])
                assert [len(group) for group in plan.groups if len(group) > 1] == [size] * count
