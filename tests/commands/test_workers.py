"""``lpsearch optimize`` on several workers: the same front as in one process, whichever workers these are."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from lpsearch.data import Windows
from lpsearch.errors import ModelError
from tests.commands.conftest import Run

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed; `pip install 'lpsearch[ray]'`"
)


@pytest.fixture
def arguments(tiny_model_dir: Path, text_file: Path) -> list[object]:
    """Return a search that enumerates the tiny model's 13 plans, so that no order of evaluations changes the front."""
    return [
        *("optimize", "--model", tiny_model_dir, "--data", text_file, "--windows", 3, "--seq-len", 24),
        *("--latency", "off", "--dtype", "float32", "--device", "cpu", "--budget", 13),
    ]


@pytest.mark.usefixtures("warm_starts")
@pytest.mark.parametrize(
    "workers",
    [
        ["--workers", 2],
        ["--workers", 2, "--recover", "refit"],
        pytest.param(["--executor", "ray", "--workers", 2], marks=needs_ray),
    ],
    ids=["local", "local with refit", "ray"],
)
def test_the_front_is_that_of_one_process(run_lpsearch: Run, arguments: list, tmp_path: Path, workers: list) -> None:
    fronts = []
    repair = workers[2:] if "--recover" in workers else []
    for name, options in (("one", repair), ("workers", workers)):
        outcome = run_lpsearch(*arguments, *options, "--out", tmp_path / name)
        assert outcome.exit_code == 0, outcome.stderr
        assert outcome.document["trials"] == 13
        fronts.append(outcome.document["front"])
    assert fronts[0] == fronts[1], "the same plans with the same losses, proxy and held out"
    assert len(fronts[0]) > 1
    front = json.loads((tmp_path / "workers" / "front.json").read_text(encoding="utf-8"))
    assert len(front["front"]) == len(fronts[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ray-address", "auto"], "--ray-address auto is of no use without --executor ray"),
        (["--workers", 2, "--device", "cuda:1"], "--device cuda:1 names one GPU"),
        (["--workers", 2, "--gpus-per-worker", 1], "--gpus-per-worker 1 goes with GPUs, not with --device cpu"),
        (["--workers", 0], "'--workers': Input should be greater than or equal to 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_anything_is_written(
    run_lpsearch: Run, arguments: list, tmp_path: Path, options: list, message: str
) -> None:
    outcome = run_lpsearch(*arguments, *options, "--out", tmp_path / "study")
    assert outcome.exit_code == 2
    assert message in " ".join(outcome.stderr.split())
    assert not (tmp_path / "study").exists()


@needs_ray
def test_a_cluster_that_is_not_there_is_named(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    outcome = run_lpsearch(*arguments, "--executor", "ray", "--ray-address", "127.0.0.1:9", "--out", tmp_path / "study")
    assert outcome.exit_code == 2
    assert "no Ray cluster answers there" in outcome.stderr


def test_a_worker_that_finds_another_model_refuses_it(tiny_model_dir: Path) -> None:
    from lpsearch.commands.workers import Recipe, build_worker_evaluators

    source = {"id": "tiny", "kind": "directory", "path": str(tiny_model_dir), "revision": None}
    windows = {split: Windows(np.arange(48, dtype=np.int32).reshape(2, 24), split) for split in ("proxy", "heldout")}
    recipe = Recipe(
        source=source,
        fingerprint="f" * 16,
        device="cpu",
        dtype="float32",
        trust_remote_code=False,
        windows=windows,
        calibration=None,
        metric="nll",
        cache_location="device",
        spread=False,
    )
    with pytest.raises(ModelError, match=r"the worker found another model .* than the study's \(f{16}\)"):
        build_worker_evaluators(recipe)
