"""The additive latency model and the profile file."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from lpsearch.errors import ConfigError
from lpsearch.latency import LatencyModel, LatencyProfile, check_profile_geometry, load_profile, save_profile
from lpsearch.latency.allow import DROPS, JOINS
from lpsearch.latency.depths import check_profile_kinds, find_group_kinds
from lpsearch.latency.mix import Workload, parse_mix
from lpsearch.latency.model import fit_group_costs
from lpsearch.latency.profile import (
    MeasuredPoint,
    ProfileGeometry,
    WorkloadProfile,
    describe_profile_error,
    parse_recorded_profile,
)
from lpsearch.plan import Group, Plan
from tests.tiny_models import SLIDING_WINDOW, build_tiny_model
from tests.tolerances import DRAWN_MARGIN

OVERHEAD_MS, COST_MS = 0.7, {"1 full": 0.5, "2 full": 0.8, "3 full": 1.1}
DEPTHS = [
    {"1 full": 12},
    {"1 full": 6},
    {"1 full": 6, "2 full": 3},
    {"2 full": 6},
    {"1 full": 6, "3 full": 2},
    {"3 full": 4},
]


def _true_ms(counts) -> float:
    return OVERHEAD_MS + sum(COST_MS[size] * count for size, count in counts.items())


@pytest.fixture
def profile() -> LatencyProfile:
    point = {"use": "fit", "median_ms": 1.0, "p10_ms": 0.9, "p90_ms": 1.2, "num_samples": 3}
    workload = WorkloadProfile(
        batch_size=1,
        context_len=16,
        num_layers_measured=6,
        points=(MeasuredPoint.model_validate({"num_groups": {"1 full": 6}, **point}),),
        overhead_ms=OVERHEAD_MS,
        cost_ms=COST_MS,
        check_error=0.01,
    )
    return LatencyProfile(
        device="cpu (x86_64)",
        num_threads=2,
        dtype="float32",
        versions={"torch": "2.13.0"},
        geometry=ProfileGeometry.from_config(build_tiny_model("llama").config),
        runtime="wide layers, eager",
        workloads=(workload, workload.model_copy(update={"overhead_ms": 2 * OVERHEAD_MS})),
        created_at="2026-01-01T00:00:00+00:00",
    )


def test_exact_times_give_the_exact_costs():
    costs = fit_group_costs(DEPTHS, [_true_ms(counts) for counts in DEPTHS])
    assert costs.overhead_ms == pytest.approx(OVERHEAD_MS)
    assert costs.cost_ms == pytest.approx(COST_MS)
    assert costs.estimate_latency_ms({"1 full": 5, "3 full": 1}) == pytest.approx(_true_ms({"1 full": 5, "3 full": 1}))


def test_noise_never_makes_a_wider_group_cheaper():
    times = [_true_ms(counts) * (0.5 if "2 full" in counts else 1.0) for counts in DEPTHS]
    costs = fit_group_costs(DEPTHS, times)
    assert 0 <= costs.cost_ms["1 full"] <= costs.cost_ms["2 full"] <= costs.cost_ms["3 full"]


def test_a_plan_costs_the_sum_of_its_groups(profile):
    model = LatencyModel(profile)
    plan = Plan.from_groups([[0], [1, 2], [3, 4, 5]])
    assert model.estimate_latency_ms(plan) == pytest.approx(0.7 + 0.5 + 0.8 + 1.1)
    assert model.estimate_speedup(plan) == pytest.approx((0.7 + 6 * 0.5) / 3.1)
    assert LatencyModel(profile, 1).estimate_latency_ms(plan) == pytest.approx(1.4 + 0.5 + 0.8 + 1.1)
    metrics = model.build_metrics(plan)
    assert (metrics.kind, metrics.latency_ms) == ("estimated", pytest.approx(3.1))


def test_what_was_not_measured_is_refused(profile):
    model = LatencyModel(profile)
    with pytest.raises(ConfigError, match=r"no groups of 4 full layers \(it has 1 full, 2 full, 3 full\)"):
        model.estimate_latency_ms(Plan.from_groups([[0, 1, 2, 3], [4], [5]]))
    with pytest.raises(ConfigError, match="6 layers and the plan of one of 7"):
        model.estimate_latency_ms(Plan.baseline(7))


def test_a_profile_survives_its_file(profile, tmp_path):
    save_profile(profile, tmp_path / "profile.json")
    assert load_profile(tmp_path / "profile.json") == profile


def test_a_profile_that_names_no_engine_is_of_the_runtime(profile, tmp_path):
    document = profile.model_dump(mode="json")
    assert document.pop("engine") == "runtime"
    (tmp_path / "profile.json").write_text(json.dumps(document))
    assert load_profile(tmp_path / "profile.json") == profile


def test_a_cache_of_llama_cpp_is_of_float16(profile):
    def count(**change):
        return LatencyModel(profile.model_copy(update=change)).estimate_kv_bytes_per_token(Plan.baseline(6))

    assert count(engine="vllm") == count() == 2 * count(engine="llama.cpp")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 1}, "schema_version is 1, this lpsearch reads 2"),
        ({"colour": "red"}, "colour: Extra inputs"),
        ({"engine": "ollama"}, "engine: Input should be 'runtime', 'transformers', 'llama.cpp' or 'vllm'"),
        ({"num_ranks": 0}, "num_ranks: "),
        ({"workloads": [{"batch_size": 1}]}, r"workloads\.0\."),
        ({"workloads": []}, "workloads: "),
    ],
)
def test_damaged_profiles_are_refused(profile, tmp_path, change, message):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile.model_dump(mode="json") | change))
    with pytest.raises(ConfigError, match=message):
        load_profile(path)


@pytest.mark.parametrize("time", [math.nan, math.inf, -math.inf, -1.0, 0.0])
@pytest.mark.parametrize("field", ["overhead_ms", "median_ms", "p10_ms", "p90_ms", "unmodified_ms", "cost_ms"])
def test_impossible_times_are_refused(profile, tmp_path, field, time):
    document = profile.model_dump(mode="json")
    workload = document["workloads"][1]
    if field in workload["points"][0]:
        workload["points"][0][field] = time
    elif field == "overhead_ms":
        workload |= {field: time, "cost_ms": dict.fromkeys(COST_MS, 0.0)}  # nothing else may take no time
    elif field == "unmodified_ms":
        workload[field] = {"eager": 3.0, "graph": time}
    else:
        workload |= {"overhead_ms": 0.0, field: {**COST_MS, "1 full": time}}
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"profile\.json: not a (latency profile: workloads\.1|readable JSON file)"):
        load_profile(path)


def test_a_profile_has_a_cost_of_every_layer_alone(profile, tmp_path):
    document = profile.model_dump(mode="json")
    del document["workloads"][1]["cost_ms"]["1 full"]
    (tmp_path / "profile.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"workloads\.1\.cost_ms has no cost of '1 full'"):
        load_profile(tmp_path / "profile.json")


def test_a_plan_that_takes_no_time_is_refused(profile):
    free = {**COST_MS, "2 full": 0.0}
    workload = profile.workloads[0].model_copy(update={"overhead_ms": 0.0, "cost_ms": free})
    model = LatencyModel(profile.model_copy(update={"workloads": (workload,)}))
    with pytest.raises(ConfigError, match="a plan takes no time"):
        model.estimate_latency_ms(Plan.from_groups([[0, 1], [2, 3], [4, 5]]))


@pytest.mark.parametrize(
    ("num_layers_measured", "expected"), [(6, {"compiled": 3.7, "eager": 9.0}), (4, {"compiled": 3.7})]
)
def test_the_unmodified_model_has_one_time(profile, num_layers_measured, expected):
    """Also in files that were written when that of a part of the layers stood there."""
    changes = {"num_layers_measured": num_layers_measured, "unmodified_ms": {"compiled": 2.4, "eager": 9.0}}
    workload = profile.workloads[0].model_copy(update=changes)
    model = LatencyModel(profile.model_copy(update={"workloads": (workload,)}))
    assert model.estimate_unmodified_ms() == pytest.approx(expected)
    assert model.build_metrics(Plan.baseline(6)).baseline_latency_ms == model.estimate_unmodified_ms()["compiled"]


def test_a_profile_that_is_far_off_says_so():
    assert describe_profile_error(None, name="p.json") is None
    assert describe_profile_error(0.049, name="p.json") is None
    assert "p.json: estimates of latency were 34% off" in describe_profile_error(0.34, name="p.json")


def test_files_that_are_no_profiles_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_profile(tmp_path / "missing.json")
    for content in ("{", "[]", "\x00"):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(ConfigError, match=r"other\.json"):
            load_profile(tmp_path / "other.json")


def test_a_profile_is_read_without_torch():
    modules = ", ".join(f"lpsearch.latency.{name}" for name in ("depths", "model", "profile", "workload"))
    code = f"import sys, {modules}; print({{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_recorded_profile_of_another_version_is_left_aside(profile, caplog):
    document = profile.model_dump(mode="json")
    assert parse_recorded_profile(document) == profile
    assert parse_recorded_profile(None) is None
    assert not caplog.messages
    assert parse_recorded_profile({**document, "runtime": 7}) is None
    assert "damaged or of another version, and is left aside: runtime" in caplog.text


def test_a_profile_of_another_geometry_is_refused(profile):
    check_profile_geometry(profile, build_tiny_model("llama", seed=1).config)
    with pytest.raises(ConfigError, match=r"num_layers 6 \(the model: 8\), intermediate_size 48 \(the model: 64\)"):
        check_profile_geometry(profile, build_tiny_model("llama", num_layers=8, intermediate_size=64).config)


def test_layers_of_different_kinds_cost_differently():
    config = build_tiny_model("gemma3_text").config
    geometry = ProfileGeometry.from_config(config)
    assert geometry.layer_kinds == ("sliding", "sliding", "full") * 2
    plan = Plan.from_groups([[0, 1], [2, 3], [4], [5]])
    assert [geometry.describe_group(group.layers) for group in plan.groups] == [
        "2 sliding",
        "1 full + 1 sliding",
        "1 sliding",
        "1 full",
    ]
    moe = ProfileGeometry.from_config(build_tiny_model("qwen3_moe").config)
    assert moe.layer_kinds[:3] == ("full moe", "full", "full moe")


STAGE_MS = {"attention: 1 full": 0.2, "attention: 2 full": 0.3, "MLP: 1 dense": 0.3, "MLP: 2 dense": 0.5}


@pytest.fixture
def dropping_profile(profile) -> LatencyProfile:
    """Made up: every kind of group costs what its stages cost."""
    kinds = find_group_kinds(profile.geometry, max_group=2, allow=JOINS | DROPS)
    costs = {k: sum(STAGE_MS[stage] for stage in profile.geometry.describe_stages(g)) for k, g in kinds.items()}
    workload = profile.workloads[0].model_copy(update={"cost_ms": costs})
    return profile.model_copy(update={"workloads": (workload,)})


def test_groups_are_known_by_what_they_keep():
    geometry = ProfileGeometry.from_config(build_tiny_model("gemma3_text").config)  # sliding, sliding, full, ...
    plan = Plan.from_groups([[0], [1, 2], [3, 4], [5]])

    def describe(attention, mlp):
        return [geometry.describe_group(group) for group in plan.drop({"attention": attention, "mlp": mlp}).groups]

    assert describe([], []) == ["1 sliding", "1 full + 1 sliding", "2 sliding", "1 full"]
    assert describe([0, 1, 3], [3, 5]) == ["no attention, 1 MLP", "1 full, 2 MLPs", "1 sliding", "1 full, no MLP"]
    assert describe([1, 3], [2, 4]) == ["1 sliding", "1 full", "1 sliding", "1 full"]  # one of each, of other layers
    assert describe([3, 4, 5], [0, 1, 5]) == [
        "1 sliding, no MLP",
        "1 full + 1 sliding, 1 MLP",
        "no attention, 2 MLPs",
        "",
    ]
    moe = ProfileGeometry.from_config(build_tiny_model("qwen3_moe").config)  # full moe, full, full moe, ...
    pair = Group.whole((0, 1))
    assert moe.describe_group(pair) == "1 full + 1 full moe"
    assert moe.describe_group(pair.drop([0], [1])) == "1 full moe"
    assert moe.describe_group(pair.drop([0], [0])) == "1 full"
    assert moe.describe_group(pair.drop([0], [])) == "1 full, 1 MLP + 1 moe MLP"


def test_a_plan_that_drops_costs_what_is_left_of_it(dropping_profile):
    model = LatencyModel(dropping_profile)
    plan = Plan.from_groups([[0], [1, 2], [3, 4], [5]]).drop({"attention": [0, 1, 5], "mlp": [3, 5]})
    assert model.estimate_latency_ms(plan) == pytest.approx(0.7 + 0.3 + (0.2 + 0.5) + (0.3 + 0.3) + 0)
    nothing = Plan.baseline(6).drop({"attention": range(6), "mlp": range(6)})
    assert model.estimate_latency_ms(nothing) == OVERHEAD_MS


def test_a_profile_of_joins_alone_is_refused_by_name_where_plans_drop(profile):
    dropped = Plan.baseline(6).drop({"attention": [2]})
    with pytest.raises(ConfigError, match=r"no groups that keep no attention, 1 MLP .*--allow joins,drops"):
        LatencyModel(profile).estimate_latency_ms(dropped)
    check_profile_kinds(profile, max_group=3, name="p.json")
    with pytest.raises(
        ConfigError,
        match=r"p\.json: it has no cost of a group of no attention, 1 MLP .*--model m --allow drop-attention`",
    ):
        check_profile_kinds(profile, max_group=2, allow={"drop-attention"}, name="p.json", model="m")
    with pytest.raises(ConfigError, match="--allow joins,drops --max-group 2`"):
        check_profile_kinds(profile, max_group=2, allow=JOINS | DROPS, name="p.json")


def test_the_cache_shrinks_with_every_attention_that_goes(profile, dropping_profile):
    plan = Plan.from_groups([[0], [1, 2], [3], [4], [5]]).drop({"attention": [1, 4], "mlp": [0, 2]})
    metrics = LatencyModel(dropping_profile).build_metrics(plan)
    assert metrics.baseline_kv_bytes_per_token == 6 * 2 * 2 * 8 * 4  # layers, keys and values, heads, elements, bytes
    assert metrics.kv_bytes_per_token == 4 * 2 * 2 * 8 * 4
    joined = LatencyModel(profile).build_metrics(Plan.from_groups([[0, 1], [2, 3], [4, 5]]))
    assert joined.kv_bytes_per_token == joined.baseline_kv_bytes_per_token


def test_a_sliding_attention_caches_no_more_than_its_window():
    geometry = ProfileGeometry.from_config(build_tiny_model("gemma3_text").config)
    assert geometry.attention_windows == {"sliding": SLIDING_WINDOW}
    per_token = 2 * geometry.num_key_value_heads * geometry.head_dim
    plan = Plan.baseline(6).drop({"attention": [0, 2]})  # one sliding, one full
    assert geometry.count_cached_elements(plan, num_tokens=100) == per_token * (100 + 3 * SLIDING_WINDOW)
    assert geometry.count_cached_elements(plan, num_tokens=2) == per_token * 4 * 2
    unknown = geometry.model_copy(update={"attention_windows": {}})  # as in an older file
    assert unknown.count_cached_elements(plan, num_tokens=2) is None


def test_older_files_are_read(profile, tmp_path):
    config = build_tiny_model("gemma3_text").config
    document = profile.model_dump(mode="json")
    document["geometry"] = ProfileGeometry.from_config(config).model_dump(mode="json")
    del document["geometry"]["attention_windows"]
    for workload in document["workloads"]:
        workload["cost_ms"] = {"1 sliding": 0.5, "1 full": 0.6}
    (tmp_path / "profile.json").write_text(json.dumps(document))
    found = load_profile(tmp_path / "profile.json")
    check_profile_geometry(found, config)
    assert LatencyModel(found).build_metrics(Plan.baseline(6)).kv_bytes_per_token is None


def test_a_mix_of_workloads_is_one_time(profile):
    """By hand: each workload's share of the unmodified model's time, scaled by what the plan makes of it."""
    first, second = profile.workloads
    slower = {kind: 3 * cost for kind, cost in COST_MS.items()}
    prefill = second.model_copy(update={"kind": "prefill", "context_len": 8, "cost_ms": slower, "check_error": 0.03})
    profile = profile.model_copy(update={"workloads": (first, prefill)})
    mix = parse_mix(["prefill:8@3", "decode:1x16@1"])
    model = LatencyModel.from_mix(profile, mix, name="p.json")
    plan = Plan.from_groups([[0], [1, 2], [3, 4, 5]])
    base = [LatencyModel(profile, index).estimate_latency_ms(Plan.baseline(6)) for index in (0, 1)]
    times = [LatencyModel(profile, index).estimate_latency_ms(plan) for index in (0, 1)]
    ratio = 0.25 * times[0] / base[0] + 0.75 * times[1] / base[1]
    assert model.estimate_latency_ms(Plan.baseline(6)) == pytest.approx(0.25 * base[0] + 0.75 * base[1])
    assert model.estimate_speedup(plan) == pytest.approx(1 / ratio)
    metrics = model.build_metrics(plan)
    assert metrics.workload == "prefill:8@0.75,decode:1x16@0.25"
    assert metrics.latency_ms == pytest.approx(ratio * metrics.baseline_latency_ms)
    assert metrics.mean_error == pytest.approx(0.25 * 0.01 + 0.75 * 0.03)
    assert LatencyModel.from_mix(profile, {}, name="p.json") == LatencyModel(profile)
    assert LatencyModel.from_mix(profile, parse_mix(["prefill:8"]), name="p.json") == LatencyModel(profile, 1)
    with pytest.raises(
        ConfigError, match=r"p\.json: it has no workload decode:64x16 .*profile --workload decode:64x16`"
    ):
        LatencyModel.from_mix(profile, parse_mix(["decode:64x16"]), name="p.json")


def test_workloads_are_written_in_one_way():
    mix = parse_mix(["decode:1x1024,decode:64x4096", "prefill:2048@2"])
    assert [workload.spec for workload in mix] == ["decode:1x1024", "decode:64x4096", "prefill:2048"]
    assert list(mix.values()) == [0.25, 0.25, 0.5]
    assert parse_mix(["prefill:4x8"]) == {Workload("prefill", 4, 8): 1.0}
    for text in (
        "decode:1024",
        "encode:1x2",
        "decode:0x4",
        "prefill:0",
        "decode:1x2@0",
        "decode:1x2@x",
        "decode:1x2@inf",
    ):
        with pytest.raises(ConfigError, match=f"--workload {text}: "):
            parse_mix([text])
    with pytest.raises(ConfigError, match="named twice"):
        parse_mix(["decode:1x2,decode:1x2@3"])


def test_a_wider_group_costs_no_less_than_what_it_holds():
    costs = fit_group_costs([{"1 full": 4}, {"1 sliding": 4}, {"1 full + 1 sliding": 4}], [4.0, 1.0, 2.0])
    assert costs.cost_ms["1 full + 1 sliding"] >= costs.cost_ms["1 full"] >= costs.cost_ms["1 sliding"]


def test_the_margin_is_what_timing_blurs_or_what_estimates_were_off() -> None:
    """Two standard errors of the ratio of two medians of so many blocks, against ratios that are drawn."""
    drawn = np.random.default_rng(0).normal(10, 0.3, size=(2, 4000, 30))
    medians = np.median(drawn, axis=2)
    expected = 2 * np.std(medians[0] / medians[1])
    blocks = drawn.ravel()
    point = {"median_ms": 10.0, "p10_ms": np.quantile(blocks, 0.1), "p90_ms": np.quantile(blocks, 0.9)}
    points = [MeasuredPoint(num_groups={"1 full": 2}, use="fit", num_samples=30, **point)]
    fields = {"batch_size": 1, "context_len": 8, "num_layers_measured": 2, "points": points, "overhead_ms": 1.0}
    workload = WorkloadProfile(**fields, cost_ms={"1 full": 4.5})
    assert workload.speedup_margin == pytest.approx(expected, rel=DRAWN_MARGIN)
    assert workload.model_copy(update={"check_error": 0.001}).speedup_margin == workload.speedup_margin
    assert workload.model_copy(update={"check_error": 0.2, "check_mean_error": 0.15}).speedup_margin == 0.15
