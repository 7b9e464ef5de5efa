"""The comparison with EvoPress: its search against its protocol, and what is counted of both."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lpsearch.config import Allowed
from lpsearch.data import Windows
from lpsearch.plan import Plan
from lpsearch.search import PlanSpace
from lpsearch.search.samplers.dynamic_program import PlanCosts
from studies import evopress
from studies.count_levels import CountLevels
from studies.evopress import Protocol, count_generations, run_evopress
from studies.plan_batches import PlanBatchEvaluator, PlanBatchLosses
from studies.windows_file import save_windows
from tests.tiny_models import VOCAB_SIZE, build_tiny_model
from tests.tolerances import FLOAT64_COSTS

DROPS: tuple[Allowed, ...] = ("drop-attention", "drop-mlp")


def build_windows(num_windows: int, *, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> Windows:
    rng = np.random.default_rng(seed)
    return Windows(rng.integers(3, vocab_size, (num_windows, 16), dtype=np.int32), "random")


def count_dropped(plan: Plan) -> tuple[int, int]:
    return len(plan.dropped["attention"]), len(plan.dropped["mlp"])


class NotingEvaluator(PlanBatchEvaluator):
    """Notes every selection: its plans, its windows, and what it found."""

    def __init__(self, windows: Windows) -> None:
        super().__init__(build_tiny_model("llama"), windows)
        self.selections: list[tuple[list[Plan], list[int], list[float]]] = []

    def evaluate(self, plans: Sequence[Plan], window_indices: Sequence[int]) -> PlanBatchLosses:
        losses = super().evaluate(plans, window_indices)
        self.selections.append((list(plans), list(window_indices), losses.kl.mean(axis=1).tolist()))
        return losses


def count_switches(plan: Plan, other: Plan) -> int:
    """Branches that the one drops and the other keeps, of both kinds together."""
    return sum(len(set(plan.dropped[kind]) - set(other.dropped[kind])) for kind in ("attention", "mlp"))


def test_evopress_follows_its_protocol():
    evaluator = NotingEvaluator(build_windows(8))
    protocol = Protocol(initial=9, initial_tokens=32, offspring=6, survivors=(2, 1), stage_tokens=(32, 96))
    history = run_evopress(evaluator, num_layers=6, num_dropped=2, generations=5, protocol=protocol, seed=3)
    selections = evaluator.selections
    assert [(len(plans), len(windows)) for plans, windows, _ in selections] == [(9, 2), *[(6, 2), (3, 6)] * 5]
    assert all(len(set(windows)) == len(windows) for _, windows, _ in selections)
    assert len({tuple(windows) for _, windows, _ in selections}) > 5  # drawn anew
    best = [plans[int(np.argmin(kl))] for plans, _, kl in selections]
    assert [found.plan for found in history] == [best[0], *best[2::2]]
    for generation, ((first, _, kl), (second, *_)) in enumerate(zip(selections[1::2], selections[2::2], strict=True)):
        parent = history[generation].plan
        assert parent not in first
        assert len(set(first)) == 6
        assert all(count_dropped(plan) == (2, 2) and 1 <= count_switches(plan, parent) <= 3 for plan in first)
        assert second == [*[first[row] for row in np.argsort(kl)[:2]], parent]
    assert (history[-1].num_evaluations, history[-1].num_tokens) == (9 + 5 * 9, (9 * 2 + 5 * (6 * 2 + 3 * 6)) * 16)
    assert history[-1].num_tokens == evaluator.num_tokens


def test_generations_are_the_published_number():
    """``int(k (n - k) / 1.5)`` of ``scripts/run_drop_search.sh``, for 12 of 32 blocks."""
    assert count_generations(32, 12) == 160
    assert Protocol() == Protocol(64, 2048, 32, (2, 1), (2048, 32768), 3)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_cheapest_plans_of_a_count_are_those_of_every_plan(seed: int):
    space = PlanSpace(4, allow=DROPS)
    levels = CountLevels(space, (1, 3))
    rng = np.random.default_rng(seed)
    layers = np.array([choice.layers[0] for choice in space.choices])
    products = rng.normal(size=(2, 8, 8)) * (np.abs(np.subtract.outer(layers, layers)) <= 1)
    products = products + products.swapaxes(1, 2)
    products[:, range(8), range(8)] = 0
    costs = PlanCosts(rng.normal(size=(2, 8)), products)
    plans = list(space.enumerate_plans())
    made = np.array([space.encode(plan) for plan in plans])
    assert levels.classify(made).tolist() == [min(3, *count_dropped(plan)) for plan in plans]
    value = costs.evaluate(made.astype(float))
    solved = levels.solve(costs)
    assert solved.shape == (2, 3, 8)
    for row, level in itertools.product(range(2), (1, 2, 3)):
        alike = [i for i, plan in enumerate(plans) if count_dropped(plan) == (level, level)]
        found = costs.evaluate(solved[:, level - 1].astype(float))[row, row]
        assert found == pytest.approx(value[row, alike].min(), abs=FLOAT64_COSTS)
        assert count_dropped(space.decode(solved[row, level - 1].tolist())) == (level, level)


@pytest.mark.parametrize(
    ("allow", "targets", "complaint"),
    [(("joins", *DROPS), (1,), "nothing else"), (DROPS, (0, 1), "outside"), (DROPS, (4,), "outside")],
)
def test_other_spaces_and_targets_are_refused(allow: tuple[Allowed, ...], targets: tuple[int, ...], complaint: str):
    with pytest.raises(ValueError, match=complaint):
        CountLevels(PlanSpace(4, allow=allow), targets)


def test_the_comparison_is_printed(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_windows(tmp_path / "calibration.npz", build_windows(12, vocab_size=500))
    np.save(tmp_path / "first.npy", build_windows(3, vocab_size=500, seed=1).input_ids)
    save_windows(tmp_path / "second.npz", build_windows(3, vocab_size=500, seed=2))
    arguments = ["--model", str(tiny_model_dir), "--calibration", str(tmp_path / "calibration.npz")]
    arguments += ["--texts", f"{tmp_path / 'first.npy'},{tmp_path / 'second.npz'}", "--device", "cpu"]
    arguments += [
        "--dtype",
        "float32",
        "--sparsities",
        "0.2,0.5",
        "--search-evaluations",
        "30",
        "--search-tokens",
        "16",
    ]
    arguments += ["--final-tokens", "48", "--token-share", "0.7", "--generations", "6", "--seq-len", "16"]
    arguments += ["--protocol", "initial=16,offspring=8,initial_tokens=32,stage_tokens=32/96"]
    assert evopress.main(arguments) == 0
    *rows, last = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    methods = ["evopress", "pairset", "any mix", "evopress-tokens", "evopress-evaluations"]
    assert [(row["dropped_of_each"], row["method"]) for row in rows] == [(k, m) for k in (1, 3) for m in methods]
    by_method = {(row["dropped_of_each"], row["method"]): row for row in rows}
    for k in (1, 3):
        peer, ours, mixed, same_tokens, same_number = (by_method[k, method] for method in methods)
        assert peer["tokens"] == (16 * 2 + 6 * (8 * 2 + 3 * 6)) * 16
        assert ours["tokens"] == 16 * (30 + 3 * (ours["evaluations"] - 30)) <= 0.7 * peer["tokens"]
        assert same_tokens["tokens"] <= ours["tokens"]
        assert same_number["evaluations"] <= ours["evaluations"]
        assert [[len(row["dropped"][kind]) for kind in ("attention", "mlp")] for row in (peer, ours)] == [[k, k]] * 2
        assert sum(map(len, mixed["dropped"].values())) >= 2 * k
        found = next(item for item in last["comparison"] if item["dropped_of_each"] == k)
        assert found["token_share"] == pytest.approx(ours["tokens"] / peer["tokens"])
        below = [ours["perplexity"][name] < peer["perplexity"][name] for name in ("first", "second")]
        assert found["below_everywhere"] == all(below)
    assert set(last["unmodified"]) == {"first", "second"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--sparsities", "0.01"], "--sparsities"),
        (["--sparsities", "x"], "--sparsities"),
        (["--protocol", "offsprings=3"], "--protocol"),
        (["--protocol", "survivors=2/2/1"], "survivors"),
        (["--calibration", "nowhere.npz"], "nowhere.npz"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    arguments: list[str], complaint: str, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "calibration.npz"
    save_windows(path, build_windows(2))
    defaults = ["--model", str(tiny_model_dir), "--calibration", str(path), "--texts", str(path), "--device", "cpu"]
    defaults += ["--sparsities", "0.5"]
    assert evopress.main([*defaults, *arguments]) == 2
    assert complaint in capsys.readouterr().err
