"""The paper's experiment on a tiny model: every step really runs, goes on after an end, and says what cannot work."""

from __future__ import annotations

import importlib.util
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lpsearch.data import build_windows
from lpsearch.latency import LatencyModel, load_profile, measure_profile, save_profile
from lpsearch.latency.workload import Workload
from lpsearch.models import load_geometry, load_model, resolve_source
from lpsearch.plan import Plan
from lpsearch.recovery import apply_recovery
from lpsearch.transform import applied_plan
from studies import paper, paper_experiment, paper_steps
from tests.task_files import CHOICES, write_choices
from tests.tolerances import FLOAT32_LOSS

HAS_TASKS = importlib.util.find_spec("lm_eval") is not None
BLOCKS = {(0,), (1,), (2,), (3,), (4,), (0, 2), (1, 3), (2, 4)}
"""Joins of every block of at most two pairs of six layers."""


def write_text(path: Path, *, seed: int) -> Path:
    rng = random.Random(seed)
    words = [f"{rng.randrange(1000)} times {rng.randrange(100)} is a lot." for _ in range(800)]
    path.write_text(" ".join(words), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("paper")


@pytest.fixture(scope="module")
def arguments(tiny_model_dir: Path, text_file: Path, directory: Path) -> list[str]:
    """Return a command line with a profile of the model and, where the harness is installed, a task."""
    test_file = write_text(directory / "test.txt", seed=1)
    profile = measure_profile(load_geometry(str(tiny_model_dir)), device="cpu", dtype=torch.float32, budget_s=0.05)
    save_profile(profile, directory / "profile.json")
    (directory / "tasks").mkdir()
    write_choices(directory / "tasks")
    tasks = ["--tasks", CHOICES, "--task-path", str(directory / "tasks"), "--limit", "6"] if HAS_TASKS else []
    return [
        *("--model", str(tiny_model_dir), "--joins", "2", "--out", str(directory / "out"), "--budget", "12"),
        *("--data", str(text_file), "--test", str(test_file), "--fit-data", str(text_file), "--fit-data", "self"),
        *("--windows", "3", "--seq-len", "24", "--test-windows", "4", "--fit-windows", "60"),
        *("--distill-windows", "60", "--distill-tokens", "33000", "--learning-rate", "1e-3"),
        *("--latency", str(directory / "profile.json"), "--device", "cpu", "--dtype", "float32", *tasks),
    ]


@pytest.fixture(scope="module")
def document(arguments: list[str], directory: Path) -> dict[str, Any]:
    assert paper.main(arguments) == 0
    return json.loads((directory / "out" / "paper.json").read_text(encoding="utf-8"))


def evaluate_slowly(
    model_dir: Path, text: Path, plan: Plan, recovered: Path | None = None, *, num_windows: int = 4
) -> float:
    """Return the mean loss, one window after the other, from weights that were put in for good."""
    loaded = load_model(resolve_source(str(model_dir)), device="cpu", dtype=torch.float32)
    windows = build_windows(str(text), tokenizer=loaded.tokenizer, num_windows=num_windows, seq_len=24)
    if recovered is not None:
        apply_recovery(loaded.model, recovered)
    total = 0.0
    with torch.no_grad(), applied_plan(loaded.model, plan):
        for row in windows.input_ids:
            ids = torch.from_numpy(row.copy()).long()
            logits = loaded.model(input_ids=ids[None]).logits[0, :-1].double()
            total += float(F.cross_entropy(logits, ids[1:]))
    return total / windows.num_windows


def test_losses_are_those_of_a_slow_loop(document: dict[str, Any], directory: Path, tiny_model_dir: Path) -> None:
    (found,) = document["models"]
    losses = found["steps"]["scores"]["result"]["losses"]
    plans = {name: Plan.from_joins(6, entry["joins"]) for name, entry in found["plans"].items()}
    assert list(plans) == ["block 2", "front 2"]
    methods = ("", ", refit", ", distill")
    assert list(losses) == ["unmodified", *(name + method for name in plans for method in methods)]
    text = directory / "test.txt"
    base = evaluate_slowly(tiny_model_dir, text, Plan.baseline(6))
    for variant in ("unmodified", "block 2", "front 2, refit", "block 2, distill"):
        name, _, method = variant.partition(", ")
        recovered = directory / "out" / tiny_model_dir.name / f"{name.replace(' ', '-')}-{method}" if method else None
        expected = evaluate_slowly(tiny_model_dir, text, plans.get(name, Plan.baseline(6)), recovered)
        loss = losses[variant][str(text)]
        assert loss["nll"] == pytest.approx(expected, abs=FLOAT32_LOSS)
        assert loss["delta_nll"] == pytest.approx(expected - base, abs=FLOAT32_LOSS)
        assert loss["perplexity"] == pytest.approx(math.exp(loss["nll"]))
    for name in plans:
        assert losses[name][str(text)]["nll"] != losses[f"{name}, refit"][str(text)]["nll"]


def test_a_block_is_the_best_of_all_with_as_many_pairs(
    document: dict[str, Any], tiny_model_dir: Path, text_file: Path
) -> None:
    (found,) = document["models"]
    losses = {
        joins: evaluate_slowly(tiny_model_dir, text_file, Plan.from_joins(6, joins), num_windows=3)
        for joins in ((0, 2), (1, 3), (2, 4), ())
    }
    base = losses.pop(())
    block = found["plans"]["block 2"]
    assert tuple(block["joins"]) == min(losses, key=losses.__getitem__)
    assert block["proxy_delta_nll"] == pytest.approx(min(losses.values()) - base, abs=FLOAT32_LOSS)
    assert block["depth_reduction"] == pytest.approx(2 / 6)
    assert len(found["plans"]["front 2"]["joins"]) >= 2
    assert found["steps"]["blocks"]["result"]["trials"] == len(BLOCKS) + 1
    assert found["steps"]["front"]["result"]["trials"] == 12


def test_times_are_compared_in_one_mode_alone(document: dict[str, Any], directory: Path) -> None:
    times = document["models"][0]["steps"]["times"]["result"]
    profile = json.loads((directory / "profile.json").read_text(encoding="utf-8"))["workloads"][0]
    two_pairs = profile["overhead_ms"] + 2 * profile["cost_ms"]["1 full"] + 2 * profile["cost_ms"]["2 full"]
    baseline = profile["overhead_ms"] + 6 * profile["cost_ms"]["1 full"]
    assert list(times["modes"]) == ["eager"]
    assert times["modes"]["eager"]["unmodified"]["latency_ms"] == pytest.approx(baseline)
    assert times["modes"]["eager"]["block 2"]["latency_ms"] == pytest.approx(two_pairs)
    assert times["modes"]["eager"]["block 2"]["speedup"] == pytest.approx(baseline / two_pairs)


@pytest.mark.skipif(not HAS_TASKS, reason="lm-evaluation-harness is not installed (extra `tasks`)")
def test_every_variant_answers_the_tasks(document: dict[str, Any]) -> None:
    scores = document["models"][0]["steps"]["scores"]["result"]
    for task in scores["tasks"]:
        assert task["num_documents"] == 6
        assert set(task["scores"]) == set(scores["losses"])


def test_the_table_has_a_row_for_every_variant(document: dict[str, Any], directory: Path) -> None:
    lines = (directory / "out" / "paper.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    losses = document["models"][0]["steps"]["scores"]["result"]["losses"]
    accuracy = rows[: len(losses) + 2]
    assert [row[0] for row in accuracy[2:]] == [variant.partition(",")[0] for variant in losses]
    for row, loss in zip(accuracy[2:], losses.values(), strict=True):
        (only,) = loss.values()
        assert row[3] == f"{only['perplexity']:.3f}"
    assert [row[0] for row in rows[len(losses) + 4 :]] == ["unmodified", *document["models"][0]["plans"]]
    assert document["command"] in lines[-1]


def test_a_finished_step_is_not_run_again(
    document: dict[str, Any],
    arguments: list[str],
    directory: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = directory / "out" / tiny_model_dir.name
    (steps / "scores.json").unlink()
    before = {file.name: file.stat().st_mtime_ns for file in steps.glob("*.json")}

    def refuse(line: list[str]) -> dict[str, Any]:
        raise AssertionError(f"{line} was run again")

    monkeypatch.setattr(paper_experiment, "run_command", refuse)
    assert paper.main(arguments) == 0
    after = {file.name: file.stat().st_mtime_ns for file in steps.glob("*.json")}
    assert set(after) - set(before) == {"scores.json"}
    assert before.items() <= after.items()
    again = json.loads((directory / "out" / "paper.json").read_text(encoding="utf-8"))
    scores, scores_again = (found["models"][0]["steps"]["scores"]["result"] for found in (document, again))
    assert scores["losses"] == scores_again["losses"]


def test_a_step_of_other_settings_is_refused(
    document: dict[str, Any], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert paper.main([*arguments, "--budget", "13"]) == 2
    assert "front.json" in capsys.readouterr().err
    assert paper.main([*arguments, "--test-windows", "3"]) == 2
    assert "test_windows 4, and 3 is asked for" in capsys.readouterr().err


def test_a_dry_run_says_what_is_done_and_runs_nothing(
    document: dict[str, Any], arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert paper.main([*arguments, "--dry-run"]) == 0
    states = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert set(states.values()) == {"done"}
    assert paper.main([*arguments, "--out", str(tmp_path / "new"), "--dry-run"]) == 0
    states = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert states["blocks"].startswith("lpsearch optimize --model")
    assert states["front-2-distill"].startswith("lpsearch recover PLAN --method distill")
    assert not (tmp_path / "new").exists()


def test_without_a_gpu_or_a_profile_there_are_no_times(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    position = arguments.index("--latency")
    without = arguments[:position] + arguments[position + 2 :]
    assert paper.main([*without, "--dry-run"]) == 0
    assert "times: left out: cpu is no GPU" in capsys.readouterr().out


def test_times_alone_need_no_text(
    tiny_model_dir: Path, arguments: list[str], directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--model", str(tiny_model_dir), "--joins", "1,2", "--out", str(tmp_path / "out"), "--device", "cpu"]
    timed = ["--latency", str(directory / "profile.json"), "--data", "nowhere.txt", "--times-only"]
    assert paper.main([*own, *timed, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("times: {")
    assert not (tmp_path / "out").exists()
    assert paper.main([*own, *timed]) == 0
    table, document = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    assert "| 2 pairs |" in table
    assert "perplexity" not in table
    (found,) = json.loads(document)["models"]
    modes = found["steps"]["times"]["result"]["modes"]
    latency = LatencyModel(load_profile(directory / "profile.json"))
    expected = {"unmodified": [], "1 pair": [4], "2 pairs": [2, 4]}
    assert {name: time["latency_ms"] for name, time in modes["eager"].items()} == {
        name: latency.estimate_latency_ms(Plan.from_joins(6, joins)) for name, joins in expected.items()
    }
    assert paper.main([*own, "--times-only"]) == 2
    assert "--times-only: cpu is no GPU" in capsys.readouterr().err
    assert paper.main([*own, *timed, "--no-times"]) == 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--joins", "4"], "has 6 layers, so 1 to 3 pairs"),
        (["--joins", "2,x"], "numbers of pairs"),
        (["--test", "{data}"], "the same text is searched or fitted on"),
        (["--test", "nowhere.txt"], "no such file"),
        (["--seq-len", "100000"], "the model reads at most"),
        (["--model", "smollm2-135m", "--joins", "1", "--latency", "{wide}"], "is of the shape of none of"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(
    extra: list[str], message: str, arguments: list[str], text_file: Path, directory: Path, capsys: Any, tmp_path: Path
) -> None:
    profile = json.loads((directory / "profile.json").read_text(encoding="utf-8"))
    profile["geometry"]["vocab_size"] += 1
    wide = tmp_path / "wide.json"
    wide.write_text(json.dumps(profile), encoding="utf-8")
    filled = [part.format(data=text_file, wide=wide) for part in extra]
    assert paper.main([*arguments, "--out", str(tmp_path / "out"), *filled]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("num_layers", "expected"), [(32, (6,)), (28, (5, 6)), (30, (6,)), (24, (5,)), (18, (4,))])
def test_plans_take_away_about_a_fifth_of_the_depth(num_layers: int, expected: tuple[int, ...]) -> None:
    assert paper.choose_num_joins(num_layers) == expected


@pytest.mark.parametrize(
    ("device", "dtype", "modes"),
    [
        ("cpu", torch.float32, {"eager"}),
        pytest.param("cuda", torch.bfloat16, {"eager", "graph", "compiled"}, marks=pytest.mark.gpu),
    ],
)
def test_each_mode_is_measured_against_itself(
    tiny_model_dir: Path, device: str, dtype: torch.dtype, modes: set[str]
) -> None:
    times = paper_steps.measure_times(
        load_geometry(str(tiny_model_dir)),
        {"block 2": Plan.from_joins(6, [1, 3])},
        Workload("decode", 1, 16),
        device=torch.device(device),
        dtype=dtype,
        seconds=0.2,
    )
    assert set(times["modes"]) == modes
    for by_plan in times["modes"].values():
        ratio = by_plan["unmodified"]["latency_ms"] / by_plan["block 2"]["latency_ms"]
        assert by_plan["block 2"]["speedup"] == pytest.approx(ratio)
        low, high = by_plan["block 2"]["interval"]
        assert low <= high
        assert by_plan["unmodified"]["speedup"] == 1


def test_a_family_whose_groups_are_no_wide_layers_has_no_times() -> None:
    from tests.tiny_models import build_tiny_model

    config = build_tiny_model("mixtral").config
    times = paper_steps.measure_times(
        config, {}, Workload("decode", 1, 16), device=torch.device("cpu"), dtype=torch.float32, seconds=0.1
    )
    assert times["modes"] == {}
    assert times["left_out"] == "its groups do not run as one wide layer"
