"""The additive latency model and the profile file."""

from __future__ import annotations

import json

import pytest

from lpsearch.errors import ConfigError
from lpsearch.latency import LatencyModel, LatencyProfile, check_profile_geometry, load_profile, save_profile
from lpsearch.latency.model import fit_group_costs
from lpsearch.latency.profile import MeasuredPoint, ProfileGeometry
from lpsearch.plan import Plan
from tests.tiny_models import build_tiny_model

OVERHEAD_MS, COST_MS = 0.7, {1: 0.5, 2: 0.8, 3: 1.1}
DEPTHS = [{1: 12}, {1: 6}, {1: 6, 2: 3}, {2: 6}, {1: 6, 3: 2}, {3: 4}]


def _true_ms(counts) -> float:
    return OVERHEAD_MS + sum(COST_MS[size] * count for size, count in counts.items())


@pytest.fixture
def profile() -> LatencyProfile:
    point = {"use": "fit", "median_ms": 1.0, "p10_ms": 0.9, "p90_ms": 1.2, "num_samples": 3}
    return LatencyProfile(
        device="cpu (x86_64)",
        num_threads=2,
        dtype="float32",
        versions={"torch": "2.13.0"},
        geometry=ProfileGeometry.from_config(build_tiny_model("llama").config),
        num_layers_measured=6,
        batch_size=1,
        context_len=16,
        runtime="transformers eager, fused layers",
        points=(MeasuredPoint.model_validate({"num_groups": {1: 6}, **point}),),
        overhead_ms=OVERHEAD_MS,
        cost_ms=COST_MS,
        check_error=0.01,
        created_at="2026-01-01T00:00:00+00:00",
    )


def test_exact_times_give_the_exact_costs():
    costs = fit_group_costs(DEPTHS, [_true_ms(counts) for counts in DEPTHS])
    assert costs.overhead_ms == pytest.approx(OVERHEAD_MS)
    assert costs.cost_ms == pytest.approx(COST_MS)
    assert costs.estimate_latency_ms({1: 5, 2: 2, 3: 1}) == pytest.approx(_true_ms({1: 5, 2: 2, 3: 1}))


def test_noise_never_makes_a_wider_group_cheaper():
    times = [_true_ms(counts) * (0.5 if 2 in counts else 1.0) for counts in DEPTHS]
    costs = fit_group_costs(DEPTHS, times)
    assert 0 <= costs.cost_ms[1] <= costs.cost_ms[2] <= costs.cost_ms[3]


def test_a_plan_costs_the_sum_of_its_groups(profile):
    model = LatencyModel(profile)
    plan = Plan.from_groups([[0], [1, 2], [3, 4, 5]])
    assert model.estimate_latency_ms(plan) == pytest.approx(0.7 + 0.5 + 0.8 + 1.1)
    assert model.estimate_speedup(plan) == pytest.approx((0.7 + 6 * 0.5) / 3.1)
    metrics = model.build_metrics(plan)
    assert (metrics.kind, metrics.latency_ms) == ("estimated", pytest.approx(3.1))


def test_what_was_not_measured_is_refused(profile):
    model = LatencyModel(profile)
    with pytest.raises(ConfigError, match=r"no groups of 4 layers \(it has \[1, 2, 3\]\)"):
        model.estimate_latency_ms(Plan.from_groups([[0, 1, 2, 3], [4], [5]]))
    with pytest.raises(ConfigError, match="6 layers and the plan of one of 7"):
        model.estimate_latency_ms(Plan.baseline(7))


def test_a_profile_survives_its_file(profile, tmp_path):
    save_profile(profile, tmp_path / "profile.json")
    assert load_profile(tmp_path / "profile.json") == profile


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version is 2, this lpsearch reads 1"),
        ({"colour": "red"}, "colour: Extra inputs"),
        ({"overhead_ms": -1}, "overhead_ms: "),
        ({"cost_ms": {"one": 1}}, r"cost_ms\.one"),
    ],
)
def test_damaged_profiles_are_refused(profile, tmp_path, change, message):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile.model_dump(mode="json") | change))
    with pytest.raises(ConfigError, match=message):
        load_profile(path)


def test_files_that_are_no_profiles_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_profile(tmp_path / "missing.json")
    for content in ("{", "[]", "\x00"):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(ConfigError, match=r"other\.json"):
            load_profile(tmp_path / "other.json")


def test_a_profile_of_another_geometry_is_refused(profile):
    check_profile_geometry(profile, build_tiny_model("llama", seed=1).config)
    with pytest.raises(ConfigError, match=r"num_layers 6 \(the model: 8\), intermediate_size 48 \(the model: 64\)"):
        check_profile_geometry(profile, build_tiny_model("llama", num_layers=8, intermediate_size=64).config)
