"""Engines that people serve with: what is timed and refused; profiles of two never mix. No test asserts a time."""

from __future__ import annotations

import math
import sys
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import nn

from lpsearch.errors import ConfigError, FamilyError
from lpsearch.latency import (
    LatencyModel,
    Workload,
    load_profile,
    measure_or_reuse_profile,
    measure_profile,
    save_profile,
)
from lpsearch.latency.engines import check_engine, check_engine_package
from lpsearch.latency.engines.generate import GenerateSteps
from lpsearch.latency.engines.llama_cpp import check_llama_cpp_family
from lpsearch.latency.engines.shapes import build_plan_config, choose_generation
from lpsearch.latency.engines.timing_file import write_timing_file
from lpsearch.latency.timing import measure_interleaved
from lpsearch.models.traits import read_traits
from lpsearch.plan import Plan
from lpsearch.transform.deci import lay_out_blocks
from tests.tiny_models import FAMILIES, build_tiny_config

CPU = torch.device("cpu")
GROUPS = [[0, 1, 2], [3, 4], [5]]
JOINED = Plan.from_groups(GROUPS)
DROPPING = Plan.from_groups([[0], [1, 2], [3], [4], [5]]).drop({"attention": [0, 4], "mlp": [2, 3]})

llama_cpp = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs the extra llamacpp")


@pytest.fixture
def eager():
    """Let torch compile nothing, so that hooks see what runs, and soon."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("context_len", [1, 2, 16, 17, 1024])
def test_the_last_step_reads_the_workloads_tokens(context_len):
    generation = choose_generation(Workload("decode", 1, context_len))
    cached = [generation.num_prompt_tokens + step for step in range(generation.num_steps)]
    assert cached[-1] == context_len
    assert 1 <= len(generation.prompt) == cached[0]
    assert generation.num_new_tokens == len(cached) + 1
    prompt = choose_generation(Workload("prefill", 1, context_len))
    assert (len(prompt.prompt), prompt.num_new_tokens) == (context_len, 1)


def test_steps_that_time_themselves_are_believed():
    calls = []

    def build(name, time_ms):
        def run():
            calls.append(name)
            return time_ms

        return run

    timings = measure_interleaved(
        [build("a", 3.0), build("b", 7.0)], device=CPU, budget_s=0, min_blocks=4, warm_up_s=0, are_clocked=True
    )
    assert [set(timing.blocks_ms) for timing in timings] == [{3.0}, {7.0}]
    assert "".join(calls).endswith("aabbbbaa" * 2)  # once untimed, once timed


def _find_model(step):
    """Return the model that a step runs."""
    held = (cell.cell_contents for cell in step.run.__closure__)
    return next(found for found in held if isinstance(found, nn.Module))


class _Recorder:
    """Notes, for each forward of a decoder, of the tokens that it reads and caches, and of its layers' matrices."""

    def __init__(self):
        self.forwards, self.addresses = [], []

    def __call__(self, module, arguments, kwargs):
        if not hasattr(module, "layers") or kwargs.get("past_key_values") is None:
            return
        matrices = [[p for p in layer.parameters() if p.ndim > 1] for layer in module.layers]
        read = (kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]).shape[1]
        held = int(kwargs["past_key_values"].get_seq_length())
        self.forwards.append((read, held, sum(m.numel() for layer in matrices for m in layer), len(matrices)))
        self.addresses.append(matrices[0][0].data_ptr())


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "starcoder2"])
def test_generate_runs_what_a_plan_keeps(family):
    config = build_tiny_config(family)
    steps = GenerateSteps(read_traits(config), Workload("decode", 2, 24), device=CPU, dtype=torch.float32)
    layer = steps.layer_elements
    recorder, seen = _Recorder(), {}
    with torch.inference_mode():
        steps.reserve(6)
        built = {}
        for name, plan in {"base": Plan.baseline(6), "joined": JOINED, "dropping": DROPPING}.items():
            built[name] = steps.build(plan, range(6))
        for name, step in built.items():
            hook = _find_model(step).get_decoder().register_forward_pre_hook(recorder, with_kwargs=True)
            recorder.forwards.clear()
            assert step.run() > 0
            hook.remove()
            seen[name] = list(recorder.forwards)
    for forwards in seen.values():  # the last token of the prompt, then 16 steps of which the last reads 24 tokens
        assert [(read, held) for read, held, _, _ in forwards] == [(1, 8), *((1, 9 + step) for step in range(16))]
    sizes = {name: forwards[0][2] for name, forwards in seen.items()}
    assert sizes["base"] == sizes["joined"] > sizes["dropping"]
    assert sizes["base"] <= 6 * layer
    assert max(recorder.addresses) - min(recorder.addresses) < 4 * 6 * layer  # within one model's memory
    steps.close()


@pytest.mark.usefixtures("eager")
def test_prompts_are_read_anew():
    steps = GenerateSteps(
        read_traits(build_tiny_config("llama")), Workload("prefill", 2, 12), device=CPU, dtype=torch.float32
    )
    recorder = _Recorder()
    with torch.inference_mode():
        steps.reserve(6)
        step = steps.build(JOINED, range(6))
        _find_model(step).get_decoder().register_forward_pre_hook(recorder, with_kwargs=True)
        assert step.run() > 0
        assert step.run() > 0
    assert [(read, held) for read, held, _, _ in recorder.forwards] == [(12, 0), (12, 0)]


@pytest.mark.slow
def test_the_step_of_generate_is_compiled():
    steps = GenerateSteps(
        read_traits(build_tiny_config("llama", num_layers=2)), Workload("decode", 1, 8), device=CPU, dtype=torch.float32
    )
    torch._dynamo.utils.counters.clear()
    with torch.inference_mode():
        steps.reserve(2)
        for plan in (Plan.baseline(2), Plan.from_groups([[0, 1]])):
            assert steps.build(plan, range(2)).run() > 0
    stats = torch._dynamo.utils.counters["stats"]
    assert stats["unique_graphs"] >= 2
    assert not torch._dynamo.utils.counters["graph_break"]
    steps.close()


@pytest.mark.usefixtures("eager")
def test_a_profile_names_its_engine_and_is_never_taken_for_anothers(tmp_path, monkeypatch):
    monkeypatch.setenv("LPSEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lpsearch.latency.reuse.LARGEST_QUIET_ERROR", math.inf)  # or it would be measured again
    config = build_tiny_config("llama")
    options = {"device": CPU, "dtype": torch.float32, "context_len": 8, "budget_s": 0.05}
    found = [measure_or_reuse_profile(config, engine=name, **options) for name in ("runtime", "transformers")]
    assert [profile.engine for profile in found] == ["runtime", "transformers"]
    again = [measure_or_reuse_profile(config, engine=name, **options) for name in ("runtime", "transformers")]
    assert again == found
    assert (
        LatencyModel(found[1]).build_metrics(JOINED.from_groups([[0, 1], [2], [3], [4], [5]])).engine == "transformers"
    )
    save_profile(found[1], tmp_path / "profile.json")
    assert load_profile(tmp_path / "profile.json") == found[1]


@pytest.mark.usefixtures("eager")
def test_plans_that_drop_branches_are_measured():
    profile = measure_profile(
        build_tiny_config("llama"),
        device="cpu",
        dtype=torch.float32,
        engine="transformers",
        context_len=8,
        budget_s=0.05,
        allow={"joins", "drop-attention", "drop-mlp"},
    )
    assert LatencyModel(profile).estimate_latency_ms(DROPPING) > 0
    assert set(profile.workloads[0].unmodified_ms) == {"generate"}


def test_the_unmodified_model_keeps_its_own_class():
    config = build_tiny_config("llama")
    assert build_plan_config(config, Plan.baseline(3), [0, 1, 0]).model_type == "llama"
    assert build_plan_config(config, Plan.baseline(3), [0, 1, 0]).num_hidden_layers == 3
    assert build_plan_config(config, JOINED, range(6)).model_type != "llama"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_timing_file_has_the_shapes_of_its_plan(tmp_path, dtype):
    traits = read_traits(build_tiny_config("llama"))
    write_timing_file(traits, DROPPING, tmp_path / "plan.gguf", dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "plan.gguf")
    blocks = lay_out_blocks(traits, DROPPING)
    assert reader.get_field("general.architecture").contents() == "deci"
    assert reader.get_field("deci.attention.head_count").contents() == [block.num_heads for block in blocks]
    assert reader.get_field("deci.attention.head_count_kv").contents() == [block.num_kv_heads for block in blocks]
    assert reader.get_field("deci.feed_forward_length").contents() == [block.feed_forward_length for block in blocks]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for index, block in enumerate(blocks):
        expected = {"ffn_gate": (32, block.feed_forward_length), "ffn_down": (block.feed_forward_length, 32)}
        if block.num_heads:
            expected |= {"attn_q": (32, 8 * block.num_heads), "attn_k": (32, 8 * block.num_kv_heads)}
        for name, shape in expected.items():
            assert tuple(tensors[f"blk.{index}.{name}.weight"].shape) == shape
        assert (f"blk.{index}.attn_q.weight" in tensors) == bool(block.num_heads)
    kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == kind
    assert tensors["blk.0.ffn_norm.weight"].tensor_type.name == "F32"
    assert np.ptp(tensors["output_norm.weight"].data) > 0  # random values, not zeros


RUN_BY_LLAMA_CPP = {"granite", "llama", "seed_oss"}  # the tiny mistral, phi3 and qwen2 slide


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_refuses_families_by_name(family):
    traits = read_traits(build_tiny_config(family))
    if family in RUN_BY_LLAMA_CPP:
        check_llama_cpp_family(traits)
        return
    with pytest.raises(FamilyError, match=f"model type {traits.config.model_type} is not timed there: "):
        check_llama_cpp_family(traits)


@llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*RUN_BY_LLAMA_CPP, "phi3", "qwen2"}))
def test_llama_cpp_is_measured(family):
    profile = measure_profile(
        build_tiny_config(family, layer_types=["full_attention"] * 6, sliding_window=None),
        device="cpu",
        dtype=torch.float32,
        engine="llama.cpp",
        workloads=[Workload("decode", 1, 20), Workload("prefill", 1, 20)],
        budget_s=0.05,
        allow={"joins", "drop-attention", "drop-mlp"},
    )
    assert (profile.engine, profile.versions["xllamacpp"] > "") == ("llama.cpp", True)
    model = LatencyModel(profile)
    assert model.estimate_latency_ms(DROPPING) > 0
    assert model.estimate_kv_bytes_per_token(Plan.baseline(6)) == 6 * 2 * 2 * 8 * 2  # float16


@pytest.mark.parametrize(
    ("engine", "module", "message"),
    [
        ("llama.cpp", "xllamacpp", r"xllamacpp is not installed here; run pip install 'lpsearch\[llamacpp\]'"),
        ("vllm", "vllm", r"vllm is not installed here; run pip install 'lpsearch\[vllm\]'"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, engine, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=message):
        check_engine_package(engine)


@pytest.mark.parametrize(
    ("engine", "family", "options", "message"),
    [
        ("transformers", "llama", {"num_ranks": 2}, "--engine transformers: a model shared by 2 GPUs is not timed"),
        ("transformers", "llama", {"context_len": 0}, "--engine transformers: it decodes after a prompt"),
        ("transformers", "mixtral", {}, "model type mixtral cannot be fused into wide layers"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_by_name(engine, family, options, message):
    workload = Workload("decode", 1, options.get("context_len", 8))
    traits = read_traits(build_tiny_config(family))
    with pytest.raises((ConfigError, FamilyError), match=message):
        check_engine(engine, traits, device=CPU, workloads=[workload], num_ranks=options.get("num_ranks", 1))


@llama_cpp
def test_llama_cpp_refuses_batches_and_a_device_that_it_was_not_built_for():
    traits = read_traits(build_tiny_config("llama"))
    with pytest.raises(ConfigError, match="one sequence is timed at a time, and decode:4x8 has 4"):
        check_engine("llama.cpp", traits, device=CPU, workloads=[Workload("decode", 4, 8)])
    with pytest.raises(ConfigError, match="the installed xllamacpp has no backend for cuda; give --device cpu"):
        check_engine("llama.cpp", traits, device=torch.device("cuda"), workloads=[Workload("decode", 1, 8)])


def test_the_directory_of_llama_cpps_files_goes_with_them(tmp_path: Path, monkeypatch):
    from lpsearch.latency.engines.llama_cpp import LlamaCppSteps

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    steps = LlamaCppSteps(
        read_traits(build_tiny_config("llama")), Workload("decode", 1, 8), device=CPU, dtype=torch.float32
    )
    steps.reserve(6)
    assert len(list(tmp_path.iterdir())) == 1
    steps.close()
    assert list(tmp_path.iterdir()) == []
