"""A study of a formula, run by the real search, with held-out losses, a latency profile and written plan files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lpsearch.commands.results import build_front_file, name_plan_files
from lpsearch.kinds import TextKind
from lpsearch.latency.profile import LatencyProfile, ProfileGeometry
from lpsearch.plan import ModelIdentity, Plan, PlanMetadata, save_plan, write_json
from lpsearch.report import StudyReport, load_report
from lpsearch.search import (
    PlanSpace,
    StudyResult,
    StudyStore,
    TrialResult,
    build_front,
    evaluate_stored_plan,
    read_results,
    run_study,
)
from lpsearch.search.kinds import write_kinds
from tests.search.evaluators import SyntheticEvaluator

NUM_LAYERS = 10
MakeStudy = Callable[..., StudyReport]


EVERYTHING = ("joins", "drop-attention", "drop-mlp")


class DroppingEvaluator(SyntheticEvaluator):
    """A formula over joins and drops: branches cost unlike much, and less where their layer is joined."""

    def compute_delta(self, plan: Plan) -> float:
        costs = {"attention": 0.02, "mlp": 0.05}
        joined = {i for group in plan.groups if len(group) > 1 for i in group}
        return super().compute_delta(plan) + sum(
            costs[branch] * (1 + i % 4) * (0.8 if i in joined else 1.0)
            for branch, layers in plan.dropped.items()
            for i in layers
        )


def build_profile() -> LatencyProfile:
    """Build a profile of ten layers, two of which attend to a window."""
    kinds = ["full"] * 8 + ["sliding"] * 2
    point = {"median_ms": 10.0, "p10_ms": 9.0, "p90_ms": 12.0, "num_samples": 30}
    workload = {
        "batch_size": 1,
        "context_len": 512,
        "num_layers_measured": NUM_LAYERS,
        "points": [
            {**point, "use": "fit", "num_groups": {"1 full": 8, "1 sliding": 2}},
            {**point, "use": "check", "num_groups": {"2 full": 4, "2 sliding": 1}, "median_ms": 7.5, "p10_ms": 7.0},
        ],
        "overhead_ms": 1.5,
        "cost_ms": {"1 full": 0.9, "2 full": 1.3, "1 sliding": 0.7, "2 sliding": 1.1, "1 full + 1 sliding": 1.25},
        "check_error": 0.06,
    }
    return LatencyProfile.model_validate(
        {
            "device": "a device",
            "num_threads": 1,
            "dtype": "float32",
            "versions": {"torch": "2"},
            "geometry": {
                "model_type": "llama",
                "num_layers": NUM_LAYERS,
                "hidden_size": 8,
                "intermediate_size": 16,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 4,
                "vocab_size": 32,
                "layer_kinds": kinds,
            },
            "runtime": "wide layers",
            "workloads": [workload, {**workload, "batch_size": 16, "overhead_ms": 3.0}],
            "created_at": "2026-01-01T00:00:00+00:00",
        }
    )


def build_profile_with_drops() -> LatencyProfile:
    """Build a profile in which attentions take 0.3 ms, MLPs 0.5 ms, and what runs beside another a fifth less."""
    document = build_profile().model_dump(mode="json")
    document["geometry"]["layer_kinds"] = ["full"] * NUM_LAYERS
    geometry = ProfileGeometry.model_validate(document["geometry"])
    costs = {}
    for plan in PlanSpace(3, allow=EVERYTHING).enumerate_plans():
        for group in plan.groups:
            attention, mlp = len(group.attention_layers), len(group.mlp_layers)
            time_ms = 0.3 * (0.2 * bool(attention) + 0.8 * attention) + 0.5 * (0.2 * bool(mlp) + 0.8 * mlp)
            if time_ms:
                costs[geometry.describe_group(group)] = time_ms
    for workload in document["workloads"]:
        workload["cost_ms"] = costs
        for point in workload["points"]:
            point["num_groups"] = {"1 full": NUM_LAYERS} if point["use"] == "fit" else {"2 full": NUM_LAYERS // 2}
    return LatencyProfile.model_validate(document)


def write_front_files(directory: Path, front: list[TrialResult], result: StudyResult, **fields: Any) -> None:
    """Write plan files and the ``front.json`` that names them."""
    (directory / "plans").mkdir(exist_ok=True)
    identity = ModelIdentity(id="m", num_layers=NUM_LAYERS, fingerprint="a-b")
    named = name_plan_files(front)
    for found in named:
        save_plan(Plan(found.plan.groups, PlanMetadata(model=identity)), directory / found.plan_file)
    file = build_front_file(
        named,
        study="demo",
        model=identity,
        num_trials=len(result.results),
        proxy_tokens=result.proxy_tokens,
        exact=result.exact,
        **fields,
    )
    write_json(file.model_dump(mode="json"), directory / "front.json")


def search_formula(
    directory: Path,
    *,
    sampler: str = "pairset",
    budget: int = 30,
    metric: str = "nll",
    objective: str = "depth",
    latency: bool = True,
    heldout: bool = True,
    files: bool = True,
    evaluator: SyntheticEvaluator | None = None,
    kinds: Sequence[TextKind] = (),
    worst_case: bool = False,
    allow: Sequence[str] = ("joins",),
    **settings: Any,
) -> StudyReport:
    """Run a study in a directory, or go on with the one there, and read what a report shows of it."""
    has_drops = "drop-attention" in allow or "drop-mlp" in allow
    make_evaluator = DroppingEvaluator if has_drops else SyntheticEvaluator
    evaluator = evaluator or make_evaluator(NUM_LAYERS, num_windows=8)
    with StudyStore(f"sqlite:///{directory / 'study.db'}", study_name="demo") as store:
        # What is there stays, since somebody may be looking.
        own = {"model": "m", "data": "a text.txt", "windows": 8, "seq_len": 64, **settings}
        own |= write_kinds({"proxy": kinds, "heldout": kinds})
        store.save_settings({**(store.load_settings() or {}), **own})
        profile = (build_profile_with_drops if has_drops else build_profile)() if latency else None
        if profile is not None:
            store.save_latency_profile(profile.model_dump(mode="json"))
        from lpsearch.latency.model import LatencyModel

        result = run_study(
            evaluator=evaluator,
            space=PlanSpace(NUM_LAYERS, allow=tuple(allow)),
            budget=budget,
            store=store,
            sampler=sampler,
            metric=metric,
            objective=objective,
            kinds=kinds,
            worst_case=worst_case,
            estimate_latency_ms=None if profile is None else LatencyModel(profile).estimate_latency_ms,
        )
        front = build_front(read_results(store), metric=metric, objective=objective)
        assert [record.plan for record in front] == [record.plan for record in result.front]
        if heldout:
            unseen = make_evaluator(NUM_LAYERS, num_windows=6 if kinds else 5)
            for record in front:
                evaluate_stored_plan(store, unseen, record.plan, split="heldout")
        if files:
            model = None if profile is None else LatencyModel(profile)
            write_front_files(directory, front, result, metric=metric, objective=objective, latency_model=model)
        return load_report(store, directory)


@pytest.fixture
def make_study(tmp_path: Path) -> MakeStudy:
    """Return a function that runs a study in ``tmp_path`` and reads what a report shows of it."""
    return functools.partial(search_formula, tmp_path)
