"""``optimize --allow``: plans that drop branches, from the command line to what runs and stores a found plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lpsearch.latency import LatencyModel, load_profile
from lpsearch.latency.allow import DROPS, JOINS
from lpsearch.latency.depths import find_group_kinds
from lpsearch.models import load_model, resolve_source
from lpsearch.plan import Plan, PlanMetadata, load_plan, save_plan
from lpsearch.recovery.evaluator import choose_num_calibration_windows
from lpsearch.search import StudyStore
from tests.commands.conftest import Run
from tests.tolerances import FLOAT64_COSTS, LOSS_AGAIN

STAGE_MS = {"attention: 1 full": 0.2, "attention: 2 full": 0.3, "MLP: 1 dense": 0.3, "MLP: 2 dense": 0.5}


@pytest.fixture
def joins_profile(run_lpsearch: Run, tiny_model_dir: Path, tmp_path: Path) -> Path:
    """Return a measured profile of plans that only join."""
    path = tmp_path / "joins.json"
    options = ("--device", "cpu", "--seconds", 0.1, "--context", 8, "--out", path)
    assert run_lpsearch("profile", "--model", tiny_model_dir, *options).exit_code == 0
    return path


@pytest.fixture
def profile_path(joins_profile: Path, tmp_path: Path) -> Path:
    """Return the same with made-up costs of every kind of group: what its stages cost."""
    profile = load_profile(joins_profile)
    kinds = find_group_kinds(profile.geometry, max_group=2, allow=JOINS | DROPS)
    costs = {k: sum(STAGE_MS[stage] for stage in profile.geometry.describe_stages(g)) for k, g in kinds.items()}
    document = profile.model_dump(mode="json")
    document["workloads"][0] |= {"cost_ms": costs, "overhead_ms": 0.5, "check_error": 0.0, "check_mean_error": 0.0}
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.fixture
def arguments(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> list[Any]:
    return [
        *("optimize", "--model", tiny_model_dir, "--data", text_file, "--windows", 3, "--seq-len", 24, "--budget", 30),
        *("--dtype", "float32", "--device", "cpu", "--out", tmp_path / "study"),
    ]


def test_joins_and_drops_are_searched_by_latency(
    run_lpsearch: Run, arguments: list, profile_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    search = [*arguments, "--allow", "joins,drops", "--latency", profile_path]
    outcome = run_lpsearch(*search)
    assert outcome.exit_code == 0, outcome.stderr
    model = LatencyModel(load_profile(profile_path))
    base_ms = model.estimate_latency_ms(Plan.baseline(6))
    front = json.loads((out / "front.json").read_text(encoding="utf-8"))
    assert front["objective"] == "latency"
    times = [point["latency_ms"] for point in outcome.document["front"]]
    assert times == sorted(times, reverse=True)
    plans = [load_plan(out / point["plan"]) for point in outcome.document["front"]]
    assert any(plan.num_dropped for plan in plans)
    for point, plan in zip(outcome.document["front"], plans, strict=True):
        assert point["latency_ms"] == pytest.approx(model.estimate_latency_ms(plan), abs=FLOAT64_COSTS)
        assert point["speedup"] == pytest.approx(base_ms / point["latency_ms"], abs=FLOAT64_COSTS)
    again = run_lpsearch(*arguments)  # what is allowed and the profile are as recorded
    assert again.exit_code == 0, again.stderr
    assert again.document["front"] == outcome.document["front"]
    for other in ("joins", "drops", "joins,drop-mlp"):
        refused = run_lpsearch(*arguments, "--allow", other)
        assert refused.exit_code == 2
        assert "--allow was " in refused.document["error"]["message"], other

    path = out / outcome.document["front"][-1]["plan"]
    evaluated = run_lpsearch("evaluate", path, "--split", "proxy", "--device", "cpu")
    assert evaluated.exit_code == 0, evaluated.stderr
    expected = outcome.document["front"][-1]["delta_nll"]
    assert evaluated.document["delta_nll"] == pytest.approx(expected, abs=LOSS_AGAIN)
    exported = run_lpsearch("export", path, tmp_path / "exported", "--dtype", "float32")
    assert exported.exit_code == 0, exported.stderr
    assert exported.document["depth"] == load_plan(path).depth


@pytest.mark.parametrize(
    ("allow", "advice"), [("joins,drops", "--allow joins,drops --max-group 2"), ("drop-mlp", "--allow drop-mlp")]
)
def test_a_profile_that_lacks_drops_is_refused_before_a_study_is_begun(
    run_lpsearch: Run,
    arguments: list,
    joins_profile: Path,
    tiny_model_dir: Path,
    allow: str,
    advice: str,
) -> None:
    search = [*arguments, "--allow", allow, "--latency", joins_profile]
    for more in ([], ["--objective", "depth"]):
        outcome = run_lpsearch(*search, *more)
        assert outcome.exit_code == 2
        message = outcome.document["error"]["message"]
        assert f"--latency {joins_profile}: it has no cost of a group of " in message
        assert f"`lpsearch profile --model {tiny_model_dir} {advice}`" in message
    assert run_lpsearch(*arguments, "--latency", joins_profile, "--budget", 3).exit_code == 0  # nothing was recorded


def test_drops_alone_are_searched_by_depth_after_a_refit(
    run_lpsearch: Run, arguments: list, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """A plan to begin with drops branches too; one that joins is outside the space."""
    loaded = load_model(resolve_source(str(tiny_model_dir)), device="cpu", dtype=torch.float32)
    metadata = PlanMetadata(model=loaded.identity)
    layers = [[i] for i in range(6)]
    dropping = Plan.from_groups(layers, dropped={"attention": [1, 4], "mlp": [2]}, metadata=metadata)
    save_plan(dropping, tmp_path / "dropping.json")
    save_plan(Plan.from_groups([*layers[:2], [2, 3], *layers[4:]], metadata=metadata), tmp_path / "joining.json")
    search = [*arguments, "--allow", "drops", "--objective", "depth", "--latency", "off", "--recover", "refit"]
    refused = run_lpsearch(*search, "--enqueue", tmp_path / "joining.json")
    assert refused.exit_code == 2
    assert "--enqueue" in refused.document["error"]["message"]
    assert "it joins layers" in refused.document["error"]["message"]
    outcome = run_lpsearch(*search, "--budget", 16, "--enqueue", tmp_path / "dropping.json")
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.document["trials"] == 16
    front = json.loads((tmp_path / "study" / "front.json").read_text(encoding="utf-8"))
    assert front["recover"] == "refit"
    plans = [load_plan(tmp_path / "study" / point["plan"]) for point in outcome.document["front"]]
    assert any(plan.num_dropped for plan in plans)
    assert not any(plan.num_joins for plan in plans)
    assert all(point["latency_ms"] is None for point in outcome.document["front"])
    url = f"sqlite:///{tmp_path / 'study' / 'study.db'}"
    with StudyStore(url, study_name=front["study"], read_only=True) as store:
        assert dropping.key in store.losses.load_plans(variant="refit")
        num_windows = len(store.load_windows("calibration").input_ids)
    numbers = [
        choose_num_calibration_windows(loaded.model, num_windows=3, num_kinds=1, seq_len=24, max_group=max_group)
        for max_group in (1, 2)
    ]
    assert num_windows == numbers[0] < numbers[1], "enough for single layers, since nothing is joined"


@pytest.mark.usefixtures("brief_timing")
@pytest.mark.slow
def test_drops_are_measured_where_there_is_no_profile(run_lpsearch: Run, arguments: list) -> None:
    outcome = run_lpsearch(*arguments, "--allow", "drops", "--budget", 8)
    assert outcome.exit_code == 0, outcome.stderr
    assert all(point["latency_ms"] > 0 for point in outcome.document["front"])
