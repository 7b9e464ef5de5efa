"""Compare the fronts of a tiny model with slow loops over its plans."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lpsearch.data import Windows
from lpsearch.models import load_model, resolve_source
from lpsearch.plan import Plan
from lpsearch.search import TrialResult
from lpsearch.transform import applied_plan
from studies import real_fronts
from studies.windows_file import load_windows, save_windows
from tests.results import build_result
from tests.tolerances import FLOAT32_LOSS


def list_blocks_slowly(num_layers: int) -> set[tuple[int, ...]]:
    """Return the joins of every contiguous run of pairs."""
    found = set()
    for num_joins in range(1, num_layers // 2 + 1):
        for first in range(num_layers - 2 * num_joins + 1):
            found.add(tuple(range(first, first + 2 * num_joins, 2)))
    return found


@pytest.mark.parametrize("num_layers", [2, 5, 6, 11])
def test_blocks_are_all_contiguous_runs_of_pairs(num_layers: int):
    plans = real_fronts.list_blocks(num_layers)
    assert len(plans) == len(set(plans))
    assert {plan.joins for plan in plans} == list_blocks_slowly(num_layers)


def build_record(num_layers: int, joins: tuple[int, ...], delta: float) -> TrialResult:
    return build_result(Plan.from_joins(num_layers, joins), delta)


def test_a_sample_takes_as_many_of_each_number_of_joins():
    records = [build_record(12, (i,), 0.1) for i in range(11)]
    records += [build_record(12, (0, i), 0.2) for i in range(2, 5)] + [build_record(12, (), 0.0)]
    records += [build_record(12, (1, 4, 6), math.nan)]
    sample = real_fronts.sample_records(records, 8, seed=0)
    assert sorted(record.num_joins for record in sample) == [1] * 5 + [2] * 3
    assert len({record.plan for record in sample}) == 8
    assert sample == real_fronts.sample_records(records, 8, seed=0)
    assert len(real_fronts.sample_records(records, 99, seed=0)) == 14


def test_winners_have_at_least_as_many_joins():
    deltas = {
        Plan.from_joins(9, joins): delta
        for joins, delta in {(0,): 0.3, (2,): 0.2, (1, 3): 0.5, (1, 3, 5): 0.4, (0, 2, 4, 6): 0.9}.items()
    }
    winners = real_fronts.find_winners(deltas, 9)
    assert {k: plan.joins for k, plan in winners.items()} == {1: (2,), 2: (1, 3, 5), 3: (1, 3, 5), 4: (0, 2, 4, 6)}


def test_rank_correlation_counts_order_only():
    assert real_fronts.rank_correlation([(1, 2), (2, 30), (3, 31)]) == pytest.approx(1)
    assert real_fronts.rank_correlation([(1, 5), (2, 3), (3, 1)]) == pytest.approx(-1)
    assert real_fronts.rank_correlation([(1, 5), (2, 5)]) is None


@pytest.fixture(scope="module")
def document(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Return what the script writes for the tiny model, and the directory of the windows."""
    directory = tmp_path_factory.mktemp("fronts")
    rng = np.random.default_rng(0)
    for name in ("search", "heldout"):
        save_windows(directory / f"{name}.npz", Windows(rng.integers(3, 250, (3, 20), dtype=np.int32), name))
    arguments = ["--model", str(tiny_model_dir), "--search-windows", str(directory / "search.npz")]
    arguments += ["--heldout-windows", str(directory / "heldout.npz"), "--budget", "11", "--max-groups", "2,3"]
    arguments += ["--sample", "9", "--device", "cpu", "--dtype", "float32", "--out", str(directory / "out.json")]
    assert real_fronts.main(arguments) == 0
    written = json.loads((directory / "out.json").read_text(encoding="utf-8"))
    return {**written, "directory": directory}


def evaluate_slowly(model_dir: Path, windows: Windows, plans: list[Plan]) -> list[float]:
    """Return the mean loss of each plan minus the unmodified model's, one window after the other."""
    model = load_model(resolve_source(str(model_dir)), device="cpu", dtype=torch.float32).model

    def compute_nll(plan: Plan) -> float:
        total = 0.0
        with applied_plan(model, plan):
            for row in windows.input_ids:
                ids = torch.from_numpy(row.copy()).long()
                logits = model(input_ids=ids[None]).logits[0, :-1].double()
                total += float(torch.nn.functional.cross_entropy(logits, ids[1:]))
        return total / windows.num_windows

    base = compute_nll(Plan.baseline(plans[0].num_layers))
    return [compute_nll(plan) - base for plan in plans]


def test_writes_what_a_slow_loop_measures(document, tiny_model_dir: Path):
    search, heldout = (load_windows(document["directory"] / f"{name}.npz") for name in ("search", "heldout"))
    assert [front["max_group"] for front in document["fronts"]] == [2, 3]
    for measured in [*document["fronts"], document["blocks"]]:
        plans = [
            Plan.from_joins(6, [layer for group in row["plan"] for layer in group[:-1]]) for row in measured["winners"]
        ]
        proxy_deltas = evaluate_slowly(tiny_model_dir, search, plans)
        heldout_deltas = evaluate_slowly(tiny_model_dir, heldout, plans)
        assert [row["proxy_delta_nll"] for row in measured["winners"]] == pytest.approx(proxy_deltas, abs=FLOAT32_LOSS)
        assert [row["heldout_delta_nll"] for row in measured["winners"]] == pytest.approx(
            heldout_deltas, abs=FLOAT32_LOSS
        )
        assert all(plan.num_joins >= row["joins"] for plan, row in zip(plans, measured["winners"], strict=True))
    first = document["fronts"][0]
    counted = first["winners"][:2]
    assert first["front_heldout"] == pytest.approx(sum(row["heldout_delta_nll"] for row in counted) / 2)
    assert first["optimism"] == pytest.approx(
        sum(row["heldout_delta_nll"] - row["proxy_delta_nll"] for row in counted) / 2
    )
    assert first["trials"] == 11
    assert first["sample"]["plans"] == 9


def test_blocks_are_the_best_of_their_number_of_joins(document, tiny_model_dir: Path):
    search = load_windows(document["directory"] / "search.npz")
    plans = [Plan.from_joins(6, joins) for joins in sorted(list_blocks_slowly(6))]
    deltas = evaluate_slowly(tiny_model_dir, search, plans)
    assert document["blocks"]["evaluations"] == len(plans) + 1
    for row in document["blocks"]["winners"]:
        least = min(delta for plan, delta in zip(plans, deltas, strict=True) if plan.num_joins >= row["joins"])
        assert row["proxy_delta_nll"] == pytest.approx(least, abs=FLOAT32_LOSS)


def test_bad_options_are_refused(tiny_model_dir: Path, tmp_path: Path):
    arguments = ["--model", str(tiny_model_dir), "--search-windows", "none.npz", "--heldout-windows", "none.npz"]
    assert real_fronts.main([*arguments, "--device", "cpu", "--out", str(tmp_path / "out.json")]) == 2
    assert real_fronts.main([*arguments, "--max-groups", "2,x", "--out", str(tmp_path / "out.json")]) == 2
    assert real_fronts.main([*arguments, "--out", str(tmp_path / "nowhere" / "out.json")]) == 2
