"""Measuring: the wide layer is the group, and every family is measured. No test asserts a time."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from lpsearch.errors import ConfigError, FamilyError, LpsearchError
from lpsearch.latency import LatencyModel, Workload, measure_or_reuse_profile, measure_profile
from lpsearch.latency.depths import check_profile_kinds, choose_depths, find_group_kinds
from lpsearch.latency.fallback import FixedCacheLayer, TransformersSteps, widen_config
from lpsearch.latency.profile import ProfileGeometry, load_profile
from lpsearch.latency.ranks.measuring import emulate_profile_on_ranks, measure_profile_on_ranks
from lpsearch.latency.runtime.memory import Workspace
from lpsearch.latency.timing import StepTiming, bootstrap_ratio, measure_interleaved
from lpsearch.latency.workload import check_workloads, limit_context
from lpsearch.models.families import get_decoder_layers
from lpsearch.models.traits import read_traits
from lpsearch.plan import Group, Plan
from lpsearch.transform import applied_plan
from tests.tiny_models import FAMILIES, RUNTIME_FAMILIES, SLIDING_WINDOW, build_tiny_model
from tests.tolerances import FLOAT32_LOGITS, TWICE

UNFUSED = {"gpt_neox", "gpt_neox_sequential", "mixtral", "qwen3_moe"}


@torch.no_grad()
def _fuse_llama_group(layers: list[nn.Module], wide: nn.Module) -> None:
    """Fold each member's norm weights into the projections behind them, then stack the members."""
    wide.input_layernorm.weight.fill_(1)
    wide.post_attention_layernorm.weight.fill_(1)
    for name in ("q_proj", "k_proj", "v_proj"):
        folded = [getattr(layer.self_attn, name).weight * layer.input_layernorm.weight for layer in layers]
        getattr(wide.self_attn, name).weight.copy_(torch.cat(folded, dim=0))
    for name in ("gate_proj", "up_proj"):
        folded = [getattr(layer.mlp, name).weight * layer.post_attention_layernorm.weight for layer in layers]
        getattr(wide.mlp, name).weight.copy_(torch.cat(folded, dim=0))
    wide.self_attn.o_proj.weight.copy_(torch.cat([layer.self_attn.o_proj.weight for layer in layers], dim=1))
    wide.mlp.down_proj.weight.copy_(torch.cat([layer.mlp.down_proj.weight for layer in layers], dim=1))


@pytest.mark.parametrize("group_size", [2, 3])
def test_a_widened_layer_with_stacked_weights_is_the_group(group_size):
    model = build_tiny_model("llama", num_layers=group_size)
    input_ids = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), applied_plan(model, Plan.from_groups([range(group_size)])):
        expected = model(input_ids=input_ids, use_cache=False).logits
    layers = list(model.model.layers)
    wide = type(layers[0])(widen_config(model.config, group_size), 0).eval()
    _fuse_llama_group(layers, wide)
    assert wide.self_attn.q_proj.weight.shape == (group_size * 4 * 8, 32)
    assert wide.self_attn.k_proj.weight.shape == (group_size * 2 * 8, 32)
    assert wide.mlp.down_proj.weight.shape == (32, group_size * 48)
    model.model.layers = nn.ModuleList([wide])
    model.config.num_hidden_layers = 1
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=FLOAT32_LOGITS)


def test_widening_leaves_the_configuration_alone():
    config = build_tiny_model("qwen2").config
    before = config.to_dict()
    wide = widen_config(config, 3)
    assert config.to_dict() == before
    assert (wide.num_attention_heads, wide.num_key_value_heads, wide.head_dim) == (12, 6, 8)
    assert wide.intermediate_size == 3 * 48


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured(family):
    config = build_tiny_model(family).config
    profile = measure_profile(config, device="cpu", dtype=torch.float32, context_len=12, max_group=3, budget_s=0.05)
    (workload,) = profile.workloads
    times = [workload.overhead_ms, *workload.cost_ms.values(), *(point.median_ms for point in workload.points)]
    assert all(math.isfinite(time) and time >= 0 for time in times)
    assert {point.use for point in workload.points} == {"fit", "check"}
    if family in RUNTIME_FAMILIES:
        assert profile.runtime == "wide layers, eager"
    else:
        assert profile.runtime.endswith("layers not fused" if family in UNFUSED else "fused layers")
    for groups in ([[0], [1, 2], [3, 4, 5]], [[0, 1, 2], [3, 4], [5]], [[i] for i in range(6)]):
        assert LatencyModel(profile).estimate_latency_ms(Plan.from_groups(groups)) > 0


DROPPING = Plan.from_groups([[0], [1, 2], [3, 4, 5]]).drop({"attention": [0, 1, 4], "mlp": [2, 3, 4, 5]})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured_without_some_branches(family):
    config = build_tiny_model(family).config
    allow = {"joins", "drop-attention", "drop-mlp"}
    options = {"device": "cpu", "dtype": torch.float32, "context_len": 12, "max_group": 3, "budget_s": 0.05}
    profile = measure_profile(config, allow=allow, **options)
    (workload,) = profile.workloads
    assert {*find_group_kinds(profile.geometry, max_group=3, allow=allow)} <= {*workload.cost_ms}
    assert len([point for point in workload.points if point.use == "check"]) >= 2
    check_profile_kinds(profile, max_group=3, allow=allow, name="p.json")
    model = LatencyModel(profile)
    costs = {kind: workload.cost_ms[kind] for kind in profile.geometry.count_groups(DROPPING.groups)}
    assert model.estimate_latency_ms(DROPPING) == pytest.approx(workload.overhead_ms + sum(costs.values()))
    nothing = Plan.baseline(6).drop({"attention": range(6), "mlp": range(6)})
    assert profile.geometry.count_groups(nothing.groups) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_runs_what_a_plan_keeps(family):
    """Which matrices run: those of the branches that are left, as many times as wide."""
    model = build_tiny_model(family)
    steps = TransformersSteps(
        read_traits(copy_config(model)), Workload("decode", 2, 9), device=torch.device("cpu"), dtype=torch.float32
    )
    plan = Plan.baseline(6).drop({"attention": [1, 3], "mlp": [2, 3]})
    layer_class = type(get_decoder_layers(model)[0])
    seen = []

    def record(module, arguments, output):
        if isinstance(module, layer_class):
            seen.append(sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1))

    with torch.inference_mode(), nn.modules.module.register_module_forward_hook(record):
        steps.reserve(6)
        step = steps.build(plan, range(6))
        seen.clear()
        assert step.run().shape == (2,)
    dropped = {1: read_traits(model.config).family.block.attention, 2: "mlp"}
    expected = []
    for layer_idx in (0, 1, 2, 4, 5):
        layer = get_decoder_layers(model)[layer_idx]
        parts = [module for name, module in layer.named_children() if name != dropped.get(layer_idx)]
        expected.append(sum(p.numel() for part in parts for p in part.parameters() if p.ndim > 1))
    assert seen == expected


def test_unfused_groups_cost_what_their_layers_cost():
    config = build_tiny_model("mixtral").config
    (workload,) = measure_profile(config, device="cpu", dtype=torch.float32, context_len=4, budget_s=0.05).workloads
    costs = list(workload.cost_ms.values())
    assert costs[1] == 2 * costs[0]


def test_a_group_of_unlike_layers_costs_what_they_cost_when_they_are_not_fused():
    config = build_tiny_model("qwen3_moe").config
    profile = measure_profile(config, device="cpu", dtype=torch.float32, context_len=4, budget_s=0.05, max_group=3)
    costs = profile.workloads[0].cost_ms
    assert set(costs) == {
        "1 full",
        "1 full moe",
        "1 full + 1 full moe",
        "2 full moe",
        "1 full + 2 full moe",
        "3 full moe",
    }
    assert costs["1 full + 2 full moe"] == pytest.approx(costs["1 full"] + 2 * costs["1 full moe"])
    assert profile.workloads[0].num_layers_measured == 6


ALLOWED = [{"joins", "drop-attention", "drop-mlp"}, {"drop-attention", "drop-mlp"}, {"joins", "drop-attention"}]


def list_possible_kinds(geometry, max_group, allow):
    """Return the kinds of all groups that there are, layer by layer and branch by branch."""
    kinds = set()
    for first in range(geometry.num_layers):
        for size in range(1, min(max_group if "joins" in allow else 1, geometry.num_layers - first) + 1):
            layers = tuple(range(first, first + size))
            for kept in itertools.product([False, True], repeat=2 * size):
                attentions = tuple(itertools.compress(layers, kept[:size]))
                mlps = tuple(itertools.compress(layers, kept[size:]))
                if (attentions == layers or "drop-attention" in allow) and (mlps == layers or "drop-mlp" in allow):
                    kinds.add(geometry.describe_group(Group(layers, attentions, mlps)))
    return kinds - {""}


@pytest.mark.parametrize("num_layers", [6, 12])
@pytest.mark.parametrize("max_group", [1, 2, 3])
@pytest.mark.parametrize("allow", ALLOWED, ids=[",".join(sorted(allow)) for allow in ALLOWED])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_depths_tell_every_kind_of_stage_apart(family, allow, max_group, num_layers):
    geometry = ProfileGeometry.from_config(build_tiny_model(family, num_layers=12).config)
    depths = choose_depths(geometry, num_layers=num_layers, max_group=max_group, allow=allow)
    fitted = [geometry.count_stages(depth.groups) for depth in depths if depth.use == "fit"]
    stages = sorted({stage for count in fitted for stage in count})
    matrix = torch.tensor([[1.0, *(count.get(stage, 0) for stage in stages)] for count in fitted])
    assert torch.linalg.matrix_rank(matrix) == 1 + len(stages)
    kinds = find_group_kinds(geometry, max_group=max_group, allow=allow)
    assert set(kinds) == list_possible_kinds(geometry, max_group, allow)
    assert all(geometry.describe_group(group) == kind for kind, group in kinds.items())
    assert {stage for group in kinds.values() for stage in geometry.describe_stages(group)} <= set(stages)
    assert max(len(depth.layers) for depth in depths) <= num_layers
    checks = [depth for depth in depths if depth.use == "check"]
    assert any(depth.plan.num_dropped for depth in checks)
    assert all(geometry.count_stages(depth.groups) not in fitted for depth in checks)
    assert {stage for depth in checks for stage in geometry.count_stages(depth.groups)} <= set(stages)


@pytest.mark.parametrize("num_layers", [6, 12])
@pytest.mark.parametrize("max_group", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_depths_tell_every_kind_of_group_apart(family, max_group, num_layers):
    geometry = ProfileGeometry.from_config(build_tiny_model(family, num_layers=12).config)
    depths = choose_depths(geometry, num_layers=num_layers, max_group=max_group)
    assert depths[0].plan == Plan.baseline(num_layers)
    assert depths[0].layers == tuple(range(num_layers))
    counts = [depth.count_groups(geometry) for depth in depths if depth.use == "fit"]
    kinds = {kind for count in counts for kind in count}
    possible = {
        geometry.describe_group(range(first, first + size))
        for size in range(1, max_group + 1)
        for first in range(13 - size)
    }
    assert kinds == possible == set(find_group_kinds(geometry, max_group=max_group))
    matrix = torch.tensor([[1.0, *(count.get(kind, 0) for kind in sorted(kinds))] for count in counts])
    assert torch.linalg.matrix_rank(matrix) == 1 + len(kinds)
    assert max(len(depth.layers) for depth in depths) <= num_layers
    (check,) = [depth for depth in depths if depth.use == "check"]
    assert check.count_groups(geometry) not in counts
    assert set(check.count_groups(geometry)) <= possible


def test_prompts_and_batches_are_workloads():
    config = build_tiny_model("gemma2").config
    workloads = [Workload("decode", 2, 9), Workload("prefill", 1, 7)]
    profile = measure_profile(config, device="cpu", dtype=torch.float32, workloads=workloads, budget_s=0.05)
    assert [(w.kind, w.batch_size, w.context_len) for w in profile.workloads] == [("decode", 2, 9), ("prefill", 1, 7)]
    assert profile.workloads[0].achieved_gb_per_s > 0
    assert profile.workloads[1].achieved_gb_per_s is None


def test_the_default_workload_is_shortened_to_what_the_model_reads():
    config = build_tiny_model("llama", max_position_embeddings=16).config
    (workload,) = measure_profile(config, device="cpu", dtype=torch.float32, budget_s=0.05).workloads
    assert (workload.kind, workload.context_len) == ("decode", 15)


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        (Workload("decode", 1, 16), "--context 16: the model reads at most 16 tokens, .* give at most 15"),
        (Workload("prefill", 1, 17), "--prefill 17: the model reads at most 16 tokens"),
    ],
)
def test_more_tokens_than_the_model_reads_are_refused(workload, message):
    config = build_tiny_model("llama", max_position_embeddings=16).config
    options = {"device": torch.device("cpu"), "dtype": torch.float32, "max_group": 2, "budget_s": 0.05}
    workloads = [Workload("decode", 1, 15), workload]
    with pytest.raises(ConfigError, match=message):
        measure_profile(config, workloads=workloads, **options)
    with pytest.raises(ConfigError, match=message):
        measure_profile_on_ranks(config, num_ranks=2, workloads=workloads, **options)


def test_what_yarn_adds_counts_as_in_generate_and_evaluate():
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16}
    config = build_tiny_model("llama", max_position_embeddings=16, rope_parameters=rope).config
    assert limit_context(config, 100) == 31
    check_workloads(config, [Workload("decode", 1, 31), Workload("prefill", 1, 32)])
    for workload in (Workload("decode", 1, 32), Workload("prefill", 1, 33)):
        with pytest.raises(ConfigError, match="reads at most 32 tokens"):
            check_workloads(config, [workload])


def set_error(file, error):
    """Write into a profile file how far off its estimates were."""
    document = json.loads(file.read_text(encoding="utf-8"))
    for workload in document["workloads"]:
        workload["check_error"] = workload["check_mean_error"] = error
    file.write_text(json.dumps(document), encoding="utf-8")


def test_a_profile_is_measured_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("LPSEARCH_CACHE", str(tmp_path))
    options = {"device": torch.device("cpu"), "dtype": torch.float32, "context_len": 4, "budget_s": 0.05}
    measure_or_reuse_profile(build_tiny_model("llama").config, **options)
    (file,) = (tmp_path / "latency").iterdir()
    set_error(file, 0.05)
    first = load_profile(file)
    assert measure_or_reuse_profile(build_tiny_model("llama", seed=1).config, **options) == first
    wider = build_tiny_model("llama", intermediate_size=64).config
    assert measure_or_reuse_profile(wider, **options).geometry != first.geometry
    file.write_text("{", encoding="utf-8")
    again = measure_or_reuse_profile(build_tiny_model("llama").config, **options)
    assert "unusable" in caplog.text
    assert again.geometry == first.geometry


def test_a_profile_that_was_far_off_is_measured_again_and_the_better_kept(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("LPSEARCH_CACHE", str(tmp_path))
    config = build_tiny_model("llama").config
    options = {"device": torch.device("cpu"), "dtype": torch.float32, "context_len": 4, "budget_s": 0.05}
    measure_or_reuse_profile(config, **options)
    (file,) = (tmp_path / "latency").iterdir()
    set_error(file, 1e6)
    first = load_profile(file)
    second = measure_or_reuse_profile(config, **options)
    assert "was 100000000% off where it was checked: measuring again" in caplog.text
    assert second.largest_error < first.largest_error  # the times of both may be of one second
    assert second.workloads != first.workloads
    assert load_profile(file) == second

    # The next one may be better or worse; a worse one is not kept.
    set_error(file, 0.0501)
    kept = load_profile(file)
    found = measure_or_reuse_profile(config, **options)
    assert found == load_profile(file)
    assert found.largest_error <= kept.largest_error


def test_ranks_that_are_not_there_are_an_estimate():
    config = build_tiny_model("llama").config
    options = {"device": torch.device("cpu"), "dtype": torch.float32, "max_group": 2, "budget_s": 0.05}
    workloads = [Workload("decode", 1, 8)]
    profile = emulate_profile_on_ranks(config, num_ranks=2, all_reduce_us=1e6, workloads=workloads, **options)
    assert profile.emulated
    assert "estimate" in profile.runtime
    # Two sums a group, and what was measured: a cost of 0 where a tiny layer is lost in the noise.
    assert all(2000 <= cost < 2100 for cost in profile.workloads[0].cost_ms.values())
    options["allow"] = {"drop-attention", "drop-mlp"}
    profile = emulate_profile_on_ranks(config, num_ranks=2, all_reduce_us=1e6, workloads=workloads, **options)
    costs = profile.workloads[0].cost_ms
    assert set(costs) == {"1 full", "1 full, no MLP", "no attention, 1 MLP"}
    assert {kind: cost // 1000 for kind, cost in costs.items()} == {kind: 1 + (kind == "1 full") for kind in costs}
    with pytest.raises(ConfigError, match="decode steps only"):
        emulate_profile_on_ranks(config, num_ranks=2, all_reduce_us=1, workloads=[Workload("prefill", 1, 8)], **options)
    with pytest.raises(ConfigError, match="cannot be divided over 3 ranks"):
        emulate_profile_on_ranks(config, num_ranks=3, all_reduce_us=1, workloads=workloads, **options)


@pytest.mark.usefixtures("warm_starts")
@pytest.mark.slow
def test_real_ranks_measure_one_profile():
    options = {"device": torch.device("cpu"), "dtype": torch.float32, "max_group": 2, "budget_s": 0.05}
    config = build_tiny_model("llama").config
    shares = []
    profile = measure_profile_on_ranks(
        config, num_ranks=2, workloads=[Workload("decode", 1, 8)], on_progress=shares.append, **options
    )
    assert shares == sorted(shares)
    assert len(shares) >= 3  # one a block
    assert shares[-1] == 1
    assert (profile.num_ranks, profile.emulated, profile.workloads[0].all_reduce) == (2, False, "gloo")


def test_steps_alternate_there_and_back():
    seen = []
    steps = [lambda name=name: seen.append(name) for name in "ab"]
    timings = measure_interleaved(steps, device=torch.device("cpu"), budget_s=0, min_blocks=4, warm_up_s=0)
    assert all(len(timing.blocks_ms) == 4 for timing in timings)
    changes = [name for index, name in enumerate(seen) if index == 0 or seen[index - 1] != name]
    assert "".join(changes).endswith("ababa")


def test_a_ratio_comes_with_its_interval():
    rng = np.random.default_rng(0)
    first, second = (StepTiming(scale + 0.01 * rng.standard_normal(40)) for scale in (2.0, 1.0))
    ratio, low, high = bootstrap_ratio(first, second)
    assert low <= ratio <= high
    assert high - low < 0.1
    assert ratio == pytest.approx(2, rel=TWICE)


def get_implementations(config):
    """Return how attention and experts are computed, which transformers chooses when it builds a model."""
    return config._attn_implementation, config._experts_implementation


def copy_config(model):
    """Return the configuration as it was before the model was built."""
    return type(model.config).from_dict(model.config.to_dict())


class _LayerRecorder:
    """Notes of each decoder layer that runs where its first matrix is and how large its matrices are together."""

    def __init__(self, layer_class):
        self.layer_class, self.seen, self.implementations = layer_class, [], set()

    def __call__(self, module, arguments, output):
        if isinstance(module, self.layer_class):
            weights = [parameter for parameter in module.parameters() if parameter.ndim > 1]
            self.seen.append((weights[0].data_ptr(), sum(weight.numel() for weight in weights)))
            self.implementations.add(get_implementations(module.self_attn.config))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_plans_share_the_memory_of_one_model(family):
    model = build_tiny_model(family)
    steps = TransformersSteps(
        read_traits(copy_config(model)), Workload("decode", 2, 9), device=torch.device("cpu"), dtype=torch.float32
    )
    assert steps.fuses
    recorder = _LayerRecorder(type(model.model.layers[0]))
    with torch.inference_mode(), nn.modules.module.register_module_forward_hook(recorder):
        steps.reserve(6)
        base, wide = (
            steps.build(plan, range(6)) for plan in (Plan.baseline(6), Plan.from_groups([[0, 1, 2], [3, 4], [5]]))
        )
        runs = []
        for step in (base, wide, base):  # whatever ran or was built in between
            recorder.seen.clear()
            assert step.run().shape == (2,)
            runs.append(list(recorder.seen))
    assert recorder.implementations == {get_implementations(model.config)}
    assert [len(run) for run in runs] == [6, 3, 6]
    assert runs[0] == runs[2]
    assert runs[0][0][0] == runs[1][0][0]
    assert runs[0][-1][0] > runs[0][0][0]
    assert sum(size for _, size in runs[0]) == sum(size for _, size in runs[1])


def test_layers_stand_in_any_order_and_number():
    """A mixture of experts, one of whose layers is dense: what is built is the layer that was asked for."""
    model = build_tiny_model("qwen3_moe")
    sizes = [sum(p.numel() for p in layer.parameters() if p.ndim > 1) for layer in model.model.layers]
    assert sizes[1] != sizes[0]
    steps = TransformersSteps(
        read_traits(copy_config(model)), Workload("decode", 1, 4), device=torch.device("cpu"), dtype=torch.float32
    )
    assert not steps.fuses
    recorder = _LayerRecorder(type(model.model.layers[0]))
    with torch.inference_mode(), nn.modules.module.register_module_forward_hook(recorder):
        steps.reserve(6)
        step = steps.build(Plan.baseline(5), [1, 0, 1, 5, 1])
        recorder.seen.clear()
        step.run()
    assert recorder.implementations == {get_implementations(model.config)}
    assert [size for _, size in recorder.seen] == [sizes[i] for i in (1, 0, 1, 5, 1)]


def test_a_fixed_cache_holds_the_context_and_slides_where_attention_does():
    workspace = Workspace(num_elements=4096, dtype=torch.float32, device=torch.device("cpu"))
    keys = torch.ones(2, 3, 1, 8)
    for window, held in ((None, 12), (SLIDING_WINDOW, SLIDING_WINDOW - 1)):
        layer = FixedCacheLayer(context_len=12, sliding_window=window, workspace=workspace)
        for _ in range(2):  # a second step finds the same length
            found, values = layer.update(keys, 2 * keys)
            assert found.shape == values.shape == (2, 3, held + 1, 8)
            assert (found[:, :, -1] == 1).all()
            assert (values[:, :, -1] == 2).all()
        assert layer.get_seq_length() == 12
        assert layer.get_mask_sizes(1) == (held + 1, 12 - held)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_where_memory_is_short_fewer_layers_are_built(family, caplog):
    config = build_tiny_model(family, num_layers=12).config
    options = {"device": "cpu", "dtype": torch.float32, "budget_s": 0.05}
    usable_bytes = 4 * (2 * 97 * 32 + 3000 + 8 * 9000)
    profile = measure_profile(config, context_len=4, usable_bytes=usable_bytes, **options)
    assert 4 <= profile.workloads[0].num_layers_measured < 12
    assert profile.geometry.num_layers == 12
    assert "of 12 layers" in caplog.text
    # The time of the unmodified model is that of all its layers, though fewer ran.
    (unmodified_ms,) = profile.workloads[0].unmodified_ms.values()
    assert unmodified_ms == pytest.approx(LatencyModel(profile).estimate_latency_ms(Plan.baseline(12)))
    with pytest.raises(LpsearchError, match=r"not enough memory to measure latency: 4 layers .* not even the weights"):
        measure_profile(config, context_len=4, usable_bytes=4 * 20000, **options)
    with pytest.raises(LpsearchError, match=r"what fits is \d+ tokens over all sequences, e.g. batch 8 with"):
        measure_profile(config, batch_size=8, context_len=100, usable_bytes=4 * 100000, **options)


def test_prompts_of_other_families_are_refused_by_name():
    config = build_tiny_model("mixtral").config
    with pytest.raises(FamilyError, match="mixtral: the runtime computes"):
        measure_profile(config, device="cpu", dtype=torch.float32, workloads=[Workload("prefill", 1, 7)])


@pytest.mark.gpu
def test_a_gpu_is_measured():
    config = build_tiny_model("llama").config
    profile = measure_profile(config, device="cuda", dtype=torch.bfloat16, context_len=12, budget_s=0.5)
    assert profile.device == torch.cuda.get_device_name()
    assert all(point.median_ms > 0 for point in profile.workloads[0].points)
    assert set(profile.workloads[0].unmodified_ms) == {"eager", "graph", "compiled"}
