"""Replays of a small table: the regret against a slow loop, the output's form, and tables of another form."""

from __future__ import annotations

import itertools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lpsearch.plan import Plan
from studies import search_regret
from studies.tables import load_table
from tests.tolerances import FLOAT64_MEAN

NUM_LAYERS = 9


def build_losses(num_layers: int = NUM_LAYERS) -> dict[int, float]:
    """Losses of all sets of pairs, some of them better than their parts promise."""
    rng = np.random.default_rng(3)
    costs = rng.gamma(1.0, 0.1, num_layers - 1)
    losses = {}
    for joins in itertools.product((0, 1), repeat=num_layers - 1):
        if not any(a and b for a, b in itertools.pairwise(joins)):
            mask = sum(bit << i for i, bit in enumerate(joins))
            losses[mask] = float(np.float32(3.0 + np.dot(joins, costs) + 0.05 * rng.random() * sum(joins)))
    return losses


def save_table(path: Path, losses: dict[int, float], num_layers: int = NUM_LAYERS) -> Path:
    np.savez(path, mask=np.array(list(losses), np.int32), nll=np.array(list(losses.values()), np.float32), L=num_layers)
    return path


def save_window_table(path: Path, *, num_windows: int = 4) -> Path:
    """A table whose windows differ by a part that is the plan's own and a part that all plans share."""
    losses = build_losses()
    rng = np.random.default_rng(5)
    shared, own = rng.normal(0, 0.3, num_windows), rng.normal(0, 0.02, (len(losses), num_windows))
    window_nll = (np.array(list(losses.values()))[:, None] + shared + own).astype(np.float32)
    nll = window_nll.mean(axis=1, dtype=np.float64).astype(np.float32)
    np.savez(path, mask=np.array(list(losses), np.int32), nll=nll, window_nll=window_nll, L=NUM_LAYERS)
    return path


def build_whole_replay(masks: list[int]) -> search_regret.Replay:
    """A replay that evaluates each plan on its only window."""
    return search_regret.build_replay([(mask, (0,)) for mask in masks], num_windows=1)


@pytest.fixture
def table_path(tmp_path: Path) -> Path:
    return save_table(tmp_path / "table.npz", build_losses())


def compute_slow_regret(losses: dict[int, float], evaluated: list[int], max_joins: int) -> list[float]:
    """The README's definition, one k after the other."""
    base = losses[0]
    regrets = []
    for k in range(1, max_joins + 1):
        least = min(nll - base for mask, nll in losses.items() if bin(mask).count("1") >= k)
        found = [losses.get(mask, max(losses.values())) - base for mask in evaluated if bin(mask).count("1") >= k]
        missing = max(nll - base for mask, nll in losses.items() if bin(mask).count("1") == k)
        regrets.append((min(found) if found else missing) - least)
    return regrets


@pytest.mark.parametrize("sampler", ["pairset", "random", "window"])
def test_regret_is_that_of_a_slow_loop_at_every_number_of_evaluations(table_path: Path, sampler: str):
    losses = build_losses()
    table = load_table(table_path)
    replay = search_regret.replay_study(table, sampler=sampler, budget=20, seed=1)
    regret = search_regret.compute_regret(table, replay, 20)
    assert len(set(replay.masks)) == len(replay.masks) == len(replay.asks_ms) == 20
    assert regret.shape == (20, 3)
    for num_evaluations in range(1, 21):
        expected = compute_slow_regret(losses, list(replay.masks[:num_evaluations]), 3)
        assert regret[num_evaluations - 1] == pytest.approx(expected, abs=FLOAT64_MEAN)


def test_a_plan_that_the_table_lacks_counts_as_the_worst_of_all(tmp_path: Path):
    losses = build_losses()
    lacking = {mask: nll for mask, nll in losses.items() if mask != 0b1}
    table = load_table(save_table(tmp_path / "table.npz", lacking))
    evaluated = [0, 0b1, 0b10, 0b101]
    regret = search_regret.compute_regret(table, build_whole_replay(evaluated), 4)
    for count in range(1, 5):
        assert regret[count - 1] == pytest.approx(compute_slow_regret(lacking, evaluated[:count], 3), abs=FLOAT64_MEAN)
    evaluator = search_regret.TableEvaluator(table)
    plan = next(plan for plan in table.space.enumerate_plans() if plan.joins == (0,))
    assert evaluator.evaluate_windows(plan, [0]).nll_nats_per_token == (max(lacking.values()),)


def compute_slow_staged_regret(
    nll: dict[int, float], requests: list[tuple[int, tuple[int, ...]]], num_windows: int, num_plans: int
) -> tuple[list[float], int]:
    """Regret and windows spent when the plan after the first ``num_plans`` is begun, one request after the other."""
    begun: set[int] = set()
    seen: dict[int, set[int]] = {}
    spent = 0
    for mask, windows in requests:
        begun.add(mask)
        if len(begun) > num_plans:
            break
        spent += len(windows)
        seen.setdefault(mask, set()).update(windows)
    whole = [mask for mask, windows in seen.items() if len(windows) == num_windows]
    return compute_slow_regret(nll, whole, 3), spent


def test_only_plans_that_were_evaluated_on_all_windows_are_found(tmp_path: Path):
    """Requests as a staged search makes them: few windows first, the rest at once, later or never."""
    table = load_table(save_window_table(tmp_path / "table.npz"))
    nll = dict(zip(table.masks.tolist(), table.nll.tolist(), strict=True))
    rng = np.random.default_rng(1)
    requests: list[tuple[int, tuple[int, ...]]] = []
    waiting: list[int] = []
    for mask in [0, *rng.permutation([mask for mask in nll if mask])[:25].tolist()]:
        requests.append((mask, (0,)))
        if rng.random() < 0.4:
            requests.append((mask, (1, 2, 3)))
        elif rng.random() < 0.7:
            requests.append((mask, (1,)))
            waiting.append(mask)
        if waiting and rng.random() < 0.5:
            requests.append((waiting.pop(0), (2, 3)))
    replay = search_regret.build_replay(requests, num_windows=4)
    regret = search_regret.compute_regret(table, replay, 30)
    assert regret.shape == (30, 3)
    for num_plans in range(1, 31):
        expected, spent = compute_slow_staged_regret(nll, requests, 4, num_plans)
        assert regret[num_plans - 1] == pytest.approx(expected, abs=FLOAT64_MEAN)
        assert replay.windows_evaluated[:num_plans][-1] == spent
    assert None in replay.found_after
    assert any(found is not None and found > begun for begun, found in enumerate(replay.found_after, start=1))


def test_a_table_of_windows_gives_each_window_its_own_loss(tmp_path: Path):
    table = load_table(save_window_table(tmp_path / "table.npz"))
    with np.load(tmp_path / "table.npz") as archive:
        masks, window_nll = archive["mask"].tolist(), archive["window_nll"]
    evaluator = search_regret.TableEvaluator(table)
    assert evaluator.num_windows == 4
    for mask in (0, 0b101, 0b1000):
        plan = Plan.from_joins(NUM_LAYERS, [i for i in range(NUM_LAYERS - 1) if mask >> i & 1])
        losses = evaluator.evaluate_windows(plan, (2, 0))
        assert losses.nll_nats_per_token == tuple(window_nll[masks.index(mask)][[2, 0]].tolist())
    assert evaluator.requests == [(0, (2, 0)), (0b101, (2, 0)), (0b1000, (2, 0))]


@pytest.mark.parametrize("sampler", ["pairset", "random"])
def test_a_study_on_a_table_of_windows_finds_what_a_slow_loop_says(sampler: str, tmp_path: Path):
    table = load_table(save_window_table(tmp_path / "table.npz"))
    replay = search_regret.replay_study(table, sampler=sampler, budget=25, seed=0)
    regret = search_regret.compute_regret(table, replay, 25)
    nll = dict(zip(table.masks.tolist(), table.nll.tolist(), strict=True))
    for count in range(1, 26):
        found = [
            mask
            for mask, after in zip(replay.masks, replay.found_after, strict=True)
            if after is not None and after <= count
        ]
        assert regret[count - 1] == pytest.approx(compute_slow_regret(nll, found, 3), abs=FLOAT64_MEAN)
    assert 25 <= replay.windows_evaluated[-1] <= 100


def test_an_unstaged_study_evaluates_every_plan_on_all_windows(tmp_path: Path):
    table = load_table(save_window_table(tmp_path / "table.npz"))
    replay = search_regret.replay_study(table, sampler="pairset", budget=25, seed=0, staged=False)
    assert replay.windows_evaluated == tuple(range(4, 101, 4))
    assert replay.found_after == tuple(range(1, 26))


def test_processes_change_nothing(table_path: Path):
    table = load_table(table_path)
    alone = search_regret.replay_seeds(table, sampler="random", budget=12, num_seeds=3)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        together = search_regret.replay_seeds(table, sampler="random", budget=12, num_seeds=3, executor=executor)
    assert [replay.masks for replay in together] == [replay.masks for replay in alone]
    assert [replay.found_after for replay in together] == [replay.found_after for replay in alone]
    assert len({replay.masks for replay in alone}) == 3


def test_checkpoints_are_points_of_one_curve(table_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--table", str(table_path), "--seeds", "2", "--samplers", "random"]
    assert search_regret.main([*arguments, "--checkpoints", "20,5,12"]) == 0
    summaries = [json.loads(line) for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [(summary["budget"], summary["replayed_budget"]) for summary in summaries] == [(5, 20), (12, 20), (20, 20)]
    table = load_table(table_path)
    replays = search_regret.replay_seeds(table, sampler="random", budget=20, num_seeds=2)
    for summary in summaries:
        regrets = [search_regret.compute_regret(table, replay, 20)[summary["budget"] - 1] for replay in replays]
        assert summary["regret_by_k"] == pytest.approx(np.mean(regrets, axis=0))
        assert summary["mean_windows_evaluated"] == summary["budget"]


def test_frozen_layers_leave_the_table_of_the_others(tmp_path: Path):
    """A table whose first layer and last two are frozen is the table of the six between, one layer further on."""
    inner = build_losses(6)
    outer = {mask << 1: nll for mask, nll in inner.items()} | {1: 9.0, 1 << 7: 9.5}
    frozen = load_table(save_table(tmp_path / "outer.npz", outer), frozen_layers=(0, 7, 8))
    table = load_table(save_table(tmp_path / "inner.npz", inner, 6))
    assert frozen.max_joins == table.max_joins == 2
    evaluated = [0, 0b1, 0b101, 0b10]
    expected = search_regret.compute_regret(table, build_whole_replay(evaluated), 4)
    shifted = build_whole_replay([mask << 1 for mask in evaluated])
    np.testing.assert_array_equal(search_regret.compute_regret(frozen, shifted, 4), expected)
    replay = search_regret.replay_study(frozen, sampler="pairset", budget=10, seed=0)
    assert set(replay.masks) <= set(outer) - {1, 1 << 7}


def test_prints_one_json_line_a_sampler_and_writes_the_curve(
    table_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["--table", str(table_path), "--budget", "15", "--seeds", "2", "--plot", str(tmp_path / "curve.html")]
    assert search_regret.main([*arguments, "--samplers", "pairset,random,window,nsga2,tpe"]) == 0
    summaries = [json.loads(line) for line in capsys.readouterr().out.splitlines()[-5:]]
    assert [summary["sampler"] for summary in summaries] == ["pairset", "random", "window", "nsga2", "tpe"]
    for summary in summaries:
        assert (summary["budget"], summary["seeds"], summary["staged"]) == (15, 2, True)
        assert summary["mean_regret_nats"] == pytest.approx(np.mean(summary["regret_by_k"]))
        assert summary["ci95"][0] <= summary["mean_regret_nats"] <= summary["ci95"][1]
        assert len(summary["regret_by_k"]) == 3
        assert 0 <= summary["exact_fraction"] <= 1
        assert summary["asks_ms_median"] > 0
    assert summaries[0]["mean_regret_nats"] < summaries[1]["mean_regret_nats"]
    assert "plotly" in (tmp_path / "curve.html").read_text(encoding="utf-8")


def test_a_space_smaller_than_the_budget_is_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = save_table(tmp_path / "small.npz", build_losses(5), 5)
    assert search_regret.main(["--table", str(path), "--budget", "30", "--seeds", "1", "--samplers", "pairset"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["mean_regret_nats"], summary["exact_fraction"], summary["ci95"]) == (0.0, 1.0, None)


@pytest.mark.parametrize(
    ("arrays", "word"),
    [
        ({"nll": [3.0], "L": 4}, "mask"),
        ({"mask": [0.0, 1.0], "nll": [3.0, 3.1], "L": 4}, "mask is float64"),
        ({"mask": [0, 1], "nll": [3.0, 3.1, 3.2], "L": 4}, "2 masks and 3 losses"),
        ({"mask": [0, 8], "nll": [3.0, 3.1], "L": 4}, "outside"),
        ({"mask": [0, 1, 1], "nll": [3.0, 3.1, 3.2], "L": 4}, "twice"),
        ({"mask": [1, 2], "nll": [3.0, 3.1], "L": 4}, "baseline"),
        ({"mask": [0, 1], "nll": [np.nan, 3.1], "L": 4}, "baseline"),
        ({"mask": [0, 1], "nll": [3.0, 3.1], "L": [4, 5]}, "L is"),
        ({"mask": [0, 1], "nll": [3.0, 3.1], "L": 4, "window_nll": [3.0, 3.1]}, "window_nll is float64[2]"),
        ({"mask": [0, 1], "nll": [3.0, 3.1], "L": 4, "window_nll": [[3.0, 3.0]]}, "window_nll is float64[1, 2]"),
        ({"mask": [0, 1], "nll": [3.0, 3.1], "L": 4, "window_nll": [[3.0, 3.0], [3.0, 3.0]]}, "not the mean"),
    ],
)
def test_a_table_of_another_form_is_refused(
    arrays: dict[str, object], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "table.npz"
    np.savez(path, **{name: np.asarray(value) for name, value in arrays.items()})
    assert search_regret.main(["--table", str(path), "--budget", "5", "--seeds", "1"]) == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b"not a table", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_table_is_refused(content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "table.npz"
    if content is not None:
        path.write_bytes(content)
    assert search_regret.main(["--table", str(path), "--budget", "5", "--seeds", "1"]) == 2
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ("--samplers", "magic"),
        ("--freeze", "x"),
        ("--freeze", "99"),
        ("--freeze", "0-8"),
        ("--budget", "0"),
        ("--jobs", "0"),
        ("--checkpoints", "3,x"),
        ("--checkpoints", "6"),
    ],
)
def test_impossible_options_are_refused(options: tuple[str, str], table_path: Path):
    assert search_regret.main(["--table", str(table_path), "--budget", "5", "--seeds", "1", *options]) == 2
