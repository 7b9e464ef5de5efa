"""``optimize --recover refit`` from the command line to the last line, on a tiny model that really runs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lpsearch.data import Windows
from lpsearch.evaluation import ModelEvaluator
from lpsearch.models import load_model, resolve_source
from lpsearch.plan import Plan, load_plan
from lpsearch.recovery import Refitter, swapped_weights
from lpsearch.search import StudyStore
from tests.commands.conftest import Outcome, Run
from tests.recovery.refitting import SEARCH_FIT
from tests.tolerances import FLOAT64_MEAN

NUM_WINDOWS = 8


@pytest.fixture
def arguments(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> list[object]:
    """Return a search of the tiny model by losses after a refit."""
    return [
        *("optimize", "--model", tiny_model_dir, "--data", text_file, "--recover", "refit"),
        *("--windows", NUM_WINDOWS, "--seq-len", 24, "--latency", "off", "--dtype", "float32", "--device", "cpu"),
        *("--out", tmp_path / "study", "--budget", 10),
    ]


def open_store(directory: Path) -> StudyStore:
    return StudyStore(f"sqlite:///{directory / 'study.db'}", study_name=read_front(directory)["study"], read_only=True)


def read_front(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "front.json").read_text(encoding="utf-8"))


def load_windows(store: StudyStore, split: str) -> Windows:
    stored = store.load_windows(split)
    return Windows(stored.input_ids, stored.spec)


def without(arguments: list[object], *options: str) -> list[object]:
    """Leave options and their values out."""
    kept = list(arguments)
    for option in options:
        at = kept.index(option)
        del kept[at : at + 2]
    return kept


@pytest.fixture
def searched(run_lpsearch: Run, arguments: list[object], tmp_path: Path) -> tuple[Path, Outcome]:
    outcome = run_lpsearch(*arguments)
    assert outcome.exit_code == 0, outcome.stderr
    assert len(outcome.document["front"]) > 1
    return tmp_path / "study", outcome


def test_every_loss_is_that_of_a_fit_by_hand(searched: tuple[Path, Outcome], tiny_model_dir: Path) -> None:
    """Each plan is fitted and evaluated from scratch, with what the study kept and nothing shared between plans."""
    directory, _ = searched
    model = load_model(resolve_source(str(tiny_model_dir)), device="cpu", dtype=torch.float32).model
    with open_store(directory) as store:
        windows = {split: load_windows(store, split) for split in ("proxy", "heldout", "calibration")}
        repaired, raw = store.losses.load_plans(variant="refit"), store.losses.load_plans(variant="raw")
    rows = [{row.tobytes() for row in some.input_ids} for some in windows.values()]
    assert len(set.union(*rows)) == sum(map(len, rows)), "no window has two uses"
    assert len(repaired) == 9
    for variant, plans in (("refit", repaired), ("raw", raw)):
        for key, stored in plans.items():
            plan = Plan.from_key(key)
            weights = {}
            if variant == "refit":
                weights = Refitter(model, windows["calibration"], **SEARCH_FIT).fit(plan).weights
            for split, (indices, losses) in stored.windows.items():
                evaluator = ModelEvaluator(model=model, windows=windows[split], cache_bytes=0)
                with swapped_weights(model, weights):
                    found = evaluator.evaluate_windows(plan, indices)
                assert found.nll_nats_per_token == losses.nll_nats_per_token, (variant, plan, split)
    front = {json.dumps(point["groups"], separators=(",", ":")) for point in read_front(directory)["front"]}
    assert set(raw) == front, "the plans of the front are known without repair too"
    assert all(len(raw[key].windows) == 2 for key in front)


def test_both_fronts_are_reported(searched: tuple[Path, Outcome]) -> None:
    directory, outcome = searched
    front = read_front(directory)
    assert front["recover"] == outcome.document["recover"] == "refit"
    with open_store(directory) as store:
        plans = {variant: store.losses.load_plans(variant=variant) for variant in ("raw", "refit")}
    base = plans["raw"][Plan.baseline(6).key]

    def compute_delta(variant: str, key: str, split: str) -> float:
        losses = [known.windows[split][1].nll_nats_per_token for known in (plans[variant][key], base)]
        return float(np.mean(losses[0]) - np.mean(losses[1]))

    for point, line in zip(front["front"], outcome.document["front"], strict=True):
        key = json.dumps(point["groups"], separators=(",", ":"))
        for split, prefix in (("proxy", ""), ("heldout", "heldout_")):
            raw = compute_delta("raw", key, split)
            assert point[f"untouched_{prefix}delta_nll"] == pytest.approx(raw, abs=FLOAT64_MEAN)
            assert line[f"untouched_{prefix}delta_nll"] == point[f"untouched_{prefix}delta_nll"]
            if point["num_joins"]:
                assert point[f"{prefix}delta_nll"] == pytest.approx(
                    compute_delta("refit", key, split), abs=FLOAT64_MEAN
                )
                assert point[f"{prefix}delta_nll"] != pytest.approx(raw, abs=1e-6)
    beaten = {
        point["plan"]
        for point in front["front"]
        if any(
            other["num_joins"] >= point["num_joins"] and other["untouched_delta_nll"] < point["untouched_delta_nll"]
            for other in front["front"]
            if other["num_joins"]
        )
    }
    expected = [p["plan"] for p in front["front"] if p["plan"] not in beaten or not p["num_joins"]]
    assert front["untouched_front"] == outcome.document["untouched_front"] == expected


def test_plan_files_say_that_their_losses_are_those_of_repaired_weights(
    run_lpsearch: Run, searched: tuple[Path, Outcome], tmp_path: Path
) -> None:
    directory, outcome = searched
    baseline, *_, last = outcome.document["front"]
    path = directory / last["plan"]
    metrics = load_plan(path).metadata.metrics
    assert (metrics.proxy.variant, metrics.heldout.variant) == ("refit", "refit")
    unmodified = load_plan(directory / baseline["plan"]).metadata.metrics
    assert (unmodified.proxy.variant, unmodified.heldout.variant) == ("raw", "raw")
    advice = f"lpsearch recover {path} --method refit --out"
    shown = run_lpsearch("plan", "show", path)
    assert shown.document["metrics"]["proxy"]["variant"] == "refit"
    assert "after a refit" in shown.stderr
    assert advice in shown.stderr
    assert "refit" not in run_lpsearch("plan", "show", directory / baseline["plan"]).stderr
    picked = run_lpsearch("plan", "pick", directory, "--max-delta", 9)
    assert picked.document["recover"] == "refit"
    assert "after a refit" in picked.stderr
    assert f"lpsearch recover {picked.document['plan']} --method refit --out" in picked.stderr
    evaluated = run_lpsearch("evaluate", path, "--device", "cpu")
    assert evaluated.document["variant"] == "raw"
    assert evaluated.document["delta_nll"] == pytest.approx(last["untouched_heldout_delta_nll"], abs=FLOAT64_MEAN)
    assert "after a refit" in evaluated.stderr
    assert advice in evaluated.stderr
    assert advice in outcome.stderr, "the summary says what comes next"
    next_lines = [line.strip() for line in outcome.stderr.splitlines() if line.strip().startswith("lpsearch recover")]
    command = shlex.split(next_lines[0])
    done = run_lpsearch(*command[1:], "--windows", 12, "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    repaired = run_lpsearch("evaluate", command[-1], "--device", "cpu")
    assert repaired.document["variant"] == "refit"
    assert "after a refit" not in repaired.stderr


def test_the_report_shows_the_plans_without_repair_too(
    run_lpsearch: Run, searched: tuple[Path, Outcome], tmp_path: Path, arguments: list[object]
) -> None:
    directory, outcome = searched
    page = (directory / "report.html").read_text(encoding="utf-8")
    for words in ("closed-form refit of every plan", "the same plans without repair", "without repair", "unrepaired"):
        assert words in page
    assert "repair its weights" in page
    assert "unrepaired" in outcome.stderr
    assert "Losses are after a refit" in outcome.stderr
    raw = [*without(arguments, "--recover", "--out", "--budget"), "--out", tmp_path / "raw", "--budget", 3]
    plain = run_lpsearch(*raw)
    assert "unrepaired" not in plain.stderr
    assert "recover" not in plain.document
    assert "without repair" not in (tmp_path / "raw" / "report.html").read_text(encoding="utf-8")
    written = read_front(tmp_path / "raw")
    assert (written["recover"], written["untouched_front"]) == ("off", [])


def test_it_resumes_and_refuses_another_repair(
    run_lpsearch: Run, searched: tuple[Path, Outcome], tmp_path: Path, arguments: list[object]
) -> None:
    directory, outcome = searched
    same = run_lpsearch(*arguments)
    assert same.document == outcome.document
    unnamed = without(arguments, "--recover", "--data", "--windows", "--seq-len", "--budget")
    resumed = run_lpsearch(*unnamed, "--budget", 12)
    assert resumed.exit_code == 0, resumed.stderr
    assert resumed.document["trials"] == 12
    assert resumed.document["recover"] == "refit", "the record says so"
    with open_store(directory) as store:
        assert len(store.losses.load_plans(variant="refit")) == 11
    refused = run_lpsearch(*without(arguments, "--recover"), "--recover", "off")
    assert refused.exit_code == 2
    assert "--recover was refit, now off" in refused.stderr
    whole = run_lpsearch(*without(arguments, "--out", "--budget"), "--out", tmp_path / "whole", "--budget", 12)
    assert whole.document["front"] == resumed.document["front"], "in two runs as in one"


def test_several_kinds_by_divergence(run_lpsearch: Run, arguments: list[object], tmp_path: Path) -> None:
    code = tmp_path / "code.txt"
    code.write_text("".join(f"def f{i}(x): return {i} * x\n" for i in range(800)), encoding="utf-8")
    more = ["--data", code, "--data", "self", "--metric", "kl", "--windows", 4, "--budget", 5]
    outcome = run_lpsearch(*without(arguments, "--windows", "--budget"), *more)
    assert outcome.exit_code == 0, outcome.stderr
    with open_store(tmp_path / "study") as store:
        counts = {split: len(store.load_windows(split).input_ids) for split in ("proxy", "heldout", "calibration")}
    assert counts["proxy"] == counts["heldout"] == 12
    assert counts["calibration"] % 3 == 0
    for point in outcome.document["front"][1:]:
        assert point["kl_nats_per_token"] > 0
        assert len(point["by_kind"]) == 3


def test_too_little_text_is_refused_before_anything_is_searched(
    run_lpsearch: Run, arguments: list[object], tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a few words " * 40, encoding="utf-8")
    refused = run_lpsearch(*without(arguments, "--data"), "--data", short)
    assert refused.exit_code == 2
    assert "is too short" in refused.stderr
