"""Exported directories: that they load anywhere and compute what the plan computes, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, LlamaModel

from lpsearch.errors import FamilyError, LpsearchError, ModelError, PlanError, UsageError
from lpsearch.export import export_checkpoint, export_source, load_exported
from lpsearch.models import ModelSource, fingerprint_model, resolve_source
from lpsearch.plan import ModelIdentity, Plan, PlanMetadata, PlanMetrics, ProxyMetrics, load_plan
from tests.export.byte_tokenizer import write_byte_tokenizer
from tests.fusing import (
    DROPPING,
    MIXED,
    PAIRS,
    compute_logits,
    compute_planned_logits,
    relative_difference,
    silence_dropped,
)
from tests.tiny_models import FUSED_FAMILIES, build_tiny_model
from tests.tolerances import FLOAT32_FUSED
from tests.warm import run_warm

ROOT = Path(__file__).parents[2]

GENERATE = """
import json, sys
sys.modules["lpsearch"] = None  # importing it fails
import torch, transformers
from transformers import AutoModelForCausalLM
# Versions differ in what they choose for Gemma 2, and its soft cap is for eager attention alone.
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, attn_implementation="eager")
input_ids = torch.arange(3, 15)[None]
runs = [
    model.generate(input_ids, max_new_tokens=5, do_sample=False, cache_implementation=kind)[0].tolist()
    for kind in ("dynamic", "static")
]
assert type(model).__module__.startswith("transformers_modules."), type(model)
print(json.dumps({"version": transformers.__version__, "runs": runs, "logits": model(input_ids).logits[0].tolist()}))
"""


@pytest.fixture
def tiny_plan(tiny_model_dir: Path) -> Plan:
    """A plan of the tiny model directory, as a search writes it."""
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    identity = ModelIdentity(id=str(tiny_model_dir), num_layers=6, fingerprint=fingerprint_model(model))
    loss = ProxyMetrics(
        nll=3.25, delta_nll=0.125, delta_nll_se=0.01, perplexity=25.79, data="self", windows=2, seq_len=16,
        num_tokens=30, dtype="float32", device="cpu",
    )  # fmt: skip
    return Plan.from_groups(MIXED.groups, metadata=PlanMetadata(model=identity, metrics=PlanMetrics(proxy=loss)))


def run_elsewhere(directory: Path, tmp_path: Path, **environment: str) -> dict[str, Any]:
    """Load a directory in a process that has no lpsearch, and return what it generates."""
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, str(directory)],
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize("plan", [MIXED, DROPPING["within groups"]], ids=["joins", "drops"])
@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_a_directory_computes_what_the_plan_computes(family: str, plan: Plan, tmp_path: Path) -> None:
    model = build_tiny_model(family)
    expected = compute_planned_logits(model, plan)
    untouched = compute_logits(model)
    assert export_checkpoint(model, plan, tmp_path / "out") == tmp_path / "out"
    assert torch.equal(compute_logits(model), untouched)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert relative_difference(compute_logits(loaded), expected) < FLOAT32_FUSED


def test_a_directory_loads_without_lpsearch(tiny_model_dir: Path, tiny_plan: Plan, tmp_path: Path) -> None:
    export_source(resolve_source(str(tiny_model_dir)), tiny_plan, tmp_path / "out")
    answer = run_elsewhere(tmp_path / "out", tmp_path)
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir).eval()
    from lpsearch import applied_plan

    with applied_plan(model, tiny_plan), torch.no_grad():
        input_ids = torch.arange(3, 15)[None]
        logits = model(input_ids).logits[0]
        tokens = model.generate(input_ids, max_new_tokens=5, do_sample=False)[0].tolist()
    assert answer["runs"] == [tokens, tokens]
    assert relative_difference(torch.tensor(answer["logits"]), logits) < FLOAT32_FUSED


@pytest.mark.parametrize("where", DROPPING)
def test_what_a_plan_drops_is_not_stored(where: str, tiny_model_dir: Path, tiny_plan: Plan, tmp_path: Path) -> None:
    source, dropped = resolve_source(str(tiny_model_dir)), DROPPING[where]
    export_source(source, Plan(dropped.groups, tiny_plan.metadata), tmp_path / "out")
    base, stored = load_file(tiny_model_dir / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")

    def count_elements(*parts: str, layers: set[int] | None = None) -> int:
        return sum(
            tensor.numel()
            for name, tensor in (stored if layers is None else base).items()
            if any(part in name for part in parts) and (layers is None or int(name.split(".")[2]) in layers)
        )

    layers = set(range(6))
    assert count_elements("_proj.") == count_elements(
        ".self_attn.", layers=layers - set(dropped.dropped["attention"])
    ) + count_elements(".mlp.", layers=layers - set(dropped.dropped["mlp"]))
    num_norms = sum(group.num_stages for group in dropped.groups)
    assert sum("layernorm" in name for name in stored) == num_norms
    assert load_plan(tmp_path / "out") == dropped
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir).eval()
    loaded, _ = load_exported(tmp_path / "out", device="cpu", dtype=torch.float32)
    assert relative_difference(compute_logits(loaded), compute_planned_logits(model, dropped)) < FLOAT32_FUSED
    export_checkpoint(model, Plan(dropped.groups, tiny_plan.metadata), tmp_path / "memory")
    assert (tmp_path / "memory" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LPLlamaForCausalLM"]  # not the stock one, whatever is left


def test_a_directory_without_some_branches_loads_without_lpsearch(
    tiny_model_dir: Path, tiny_plan: Plan, tmp_path: Path
) -> None:
    plan = DROPPING["before the first attention and after another"]
    export_source(resolve_source(str(tiny_model_dir)), Plan(plan.groups, tiny_plan.metadata), tmp_path / "out")
    answer = run_elsewhere(tmp_path / "out", tmp_path)
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir).eval()
    from lpsearch import applied_plan

    with applied_plan(model, silence_dropped(model, plan)), torch.no_grad():
        tokens = model.generate(torch.arange(3, 15)[None], max_new_tokens=5, do_sample=False)[0].tolist()
    assert answer["runs"] == [tokens, tokens]


def test_a_plan_that_drops_from_single_layers_alone_is_no_stock_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    plan = Plan.baseline(6).drop(
        {"attention": [3], "mlp": [3]}
    )  # five stock layers would be the same: one name for all
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir).eval()
    export_checkpoint(model, plan, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LPLlamaForCausalLM"]
    assert config["num_hidden_layers"] == 5
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Left out, and not stored: the attention of layer 3 and the MLP of layer 3." in card
    assert "6 layers as 5" in card
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    expected = compute_planned_logits(model, plan)
    assert relative_difference(compute_logits(loaded), expected) < FLOAT32_FUSED


@pytest.mark.skipif("LPSEARCH_OTHER_TRANSFORMERS" not in os.environ, reason="names another transformers to load with")
@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_a_directory_loads_in_another_transformers(family: str, tmp_path: Path) -> None:
    model = build_tiny_model(family)
    export_checkpoint(model, MIXED, tmp_path / "out")
    other = run_elsewhere(tmp_path / "out", tmp_path, PYTHONPATH=os.environ["LPSEARCH_OTHER_TRANSFORMERS"])
    this = run_elsewhere(tmp_path / "out", tmp_path)
    assert other["version"] != this["version"]
    assert other["runs"] == this["runs"]
    assert relative_difference(torch.tensor(other["logits"]), torch.tensor(this["logits"])) < FLOAT32_FUSED


def test_streaming_writes_what_memory_writes(tiny_model_dir: Path, tiny_plan: Plan, tmp_path: Path) -> None:
    source = resolve_source(str(tiny_model_dir))
    export_source(source, tiny_plan, tmp_path / "streamed")
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    export_checkpoint(model, tiny_plan, tmp_path / "memory", tokenizer=tokenizer)
    names = {file.name for file in (tmp_path / "streamed").iterdir()}
    assert names >= {"README.md", "config.json", "generation_config.json", "model.safetensors", "plan.json"}
    assert names >= {"modeling_lpsearch.py", "tokenizer.json", "tokenizer_config.json"}
    assert names == {file.name for file in (tmp_path / "memory").iterdir()}
    for name in names:
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes(), name
    code = ROOT / "lpsearch" / "transform" / "modeling_lpsearch.py"
    assert (tmp_path / "streamed" / code.name).read_bytes() == code.read_bytes()
    assert load_plan(tmp_path / "streamed") == tiny_plan
    assert AutoTokenizer.from_pretrained(tmp_path / "streamed")("a b").input_ids == tokenizer("a b").input_ids


@pytest.mark.parametrize("change", [{"stem": None}, {"stem": "NoSuch"}])
def test_a_directory_of_another_version_is_refused_with_what_to_do(
    tiny_model_dir: Path, tiny_plan: Plan, tmp_path: Path, change: dict[str, Any]
) -> None:
    export_source(resolve_source(str(tiny_model_dir)), tiny_plan, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["lpsearch"] |= change
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="export it again"):
        load_exported(tmp_path / "out", device="cpu", dtype=torch.float32)


def test_many_shards_hold_what_one_holds(tiny_model_dir: Path, tiny_plan: Plan, tmp_path: Path) -> None:
    source = resolve_source(str(tiny_model_dir))
    export_source(source, tiny_plan, tmp_path / "one")
    export_source(source, tiny_plan, tmp_path / "many", max_shard_bytes=100_000)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    parts = [load_file(shard) for shard in shards]
    joined = {name: tensor for part in parts for name, tensor in part.items()}
    assert sum(len(part) for part in parts) == len(whole)
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[name], tensor) for name, tensor in whole.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "many", trust_remote_code=True)
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "one", trust_remote_code=True)
    assert torch.equal(compute_logits(again), compute_logits(one))


def test_what_is_folded_is_rounded_once(tiny_model_dir: Path, tiny_plan: Plan, tmp_path: Path) -> None:
    export_source(resolve_source(str(tiny_model_dir)), tiny_plan, tmp_path / "out", dtype=torch.bfloat16)
    fused = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(tiny_model_dir / "model.safetensors")
    assert {tensor.dtype for tensor in fused.values()} == {torch.bfloat16}
    shared = fused["model.layers.1.input_layernorm.weight"]
    norms = {layer: base[f"model.layers.{layer}.input_layernorm.weight"] for layer in (1, 2)}
    assert torch.equal(shared, (norms[1].abs() * norms[2].abs()).sqrt().to(torch.bfloat16))
    rows = []
    for head in range(2):  # the key heads of layers 1 and 2 take turns
        for layer in (1, 2):
            weight = base[f"model.layers.{layer}.self_attn.k_proj.weight"][8 * head : 8 * head + 8]
            rows.append((weight * (norms[layer] / shared.float())).to(torch.bfloat16))
    assert torch.equal(fused["model.layers.1.self_attn.k_proj.weight"], torch.cat(rows))
    alone = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(fused[alone], base[alone].to(torch.bfloat16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_weights_under_other_names_are_loaded_whole(tmp_path: Path) -> None:
    model = build_tiny_model("llama", tie_word_embeddings=True, vocab_size=512)
    decoder: LlamaModel = model.model
    decoder.save_pretrained(
        tmp_path / "base"
    )  # stores "layers.0..." for what the language model calls "model.layers.0..."
    write_byte_tokenizer(tmp_path / "base")
    expected = compute_planned_logits(model, PAIRS)
    export_source(resolve_source(str(tmp_path / "base")), PAIRS, tmp_path / "out")
    loaded, _ = load_exported(tmp_path / "out", device="cpu", dtype=torch.float32)
    assert relative_difference(compute_logits(loaded), expected) < FLOAT32_FUSED
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_a_head_under_its_former_name_is_exported(tmp_path: Path) -> None:
    model = build_tiny_model("gpt_neox_sequential", vocab_size=512)
    model.save_pretrained(tmp_path / "base")
    write_byte_tokenizer(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["embed_out.weight"] = weights.pop("lm_head.weight", weights.get("embed_out.weight"))
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    expected = compute_planned_logits(model, MIXED)
    export_source(resolve_source(str(tmp_path / "base")), MIXED, tmp_path / "out")
    loaded, _ = load_exported(tmp_path / "out", device="cpu", dtype=torch.float32)
    assert relative_difference(compute_logits(loaded), expected) < FLOAT32_FUSED


def check_that_the_loaded_model_is_exported(source: Path, out: Path) -> None:
    """Compare an exported directory with the plan on the model as transformers loads it."""
    model = LlamaForCausalLM.from_pretrained(source).eval()
    expected = compute_planned_logits(model, PAIRS)
    export_source(resolve_source(str(source)), PAIRS, out)
    loaded, _ = load_exported(out, device="cpu", dtype=torch.float32)
    assert relative_difference(compute_logits(loaded), expected) < FLOAT32_FUSED


def set_option(directory: Path, **options: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | options))


@pytest.mark.parametrize("kept", [("lm_head", "embed_tokens"), ("lm_head",), ("embed_tokens",)])
def test_what_is_tied_is_told_from_the_weights(kept: tuple[str, ...], tiny_model_dir: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_model_dir, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    ends = {"lm_head": "lm_head.weight", "embed_tokens": "model.embed_tokens.weight"}
    for name in ends.keys() - set(kept):
        del weights[ends[name]]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    set_option(source, tie_word_embeddings=True)
    check_that_the_loaded_model_is_exported(source, tmp_path / "out")
    is_tied = len(kept) == 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == is_tied
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) != is_tied
    export_checkpoint(LlamaForCausalLM.from_pretrained(source), PAIRS, tmp_path / "memory")
    exported = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert (tmp_path / "memory" / "model.safetensors").read_bytes() == exported


def test_only_the_files_count_that_transformers_reads(tiny_model_dir: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_model_dir, tmp_path / "source")
    other = {name: tensor + 1 for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(other, source / "zz-optimizer.safetensors", metadata={"format": "pt"})
    check_that_the_loaded_model_is_exported(source, tmp_path / "left over")
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "zz-optimizer.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    check_that_the_loaded_model_is_exported(source, tmp_path / "stale index")


def test_an_adapter_beside_the_weights_is_to_be_merged_first(tiny_model_dir: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_model_dir, tmp_path / "source")
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds an adapter .* merge it first"):
        export_source(resolve_source(str(source)), PAIRS, tmp_path / "out")
    with pytest.raises(ModelError, match=r"holds an adapter .* merge it first"):
        export_source(ModelSource("directory", str(source), path=source), PAIRS, tmp_path / "out")


def test_the_card_says_what_was_done_and_keeps_the_licence(
    tiny_model_dir: Path, tiny_plan: Plan, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_model_dir, tmp_path / "source")
    (source / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nA model.\n")
    (source / "LICENSE").write_text("the terms")
    export_source(resolve_source(str(source)), tiny_plan, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\n")
    header = card.split("---\n")[1]
    assert "license: apache-2.0\n" in header
    assert str(tmp_path) not in card  # where the model lay on this machine is nobody's business
    assert (tmp_path / "out" / "LICENSE").read_text() == "the terms"
    for said in (
        "6 layers as 3",
        "50.0% less depth",
        "1 to 2, 3 to 5",
        "3.2500",
        "+0.1250",
        "25.79",
        "trust_remote_code",
    ):
        assert said in card, said


def test_a_target_that_holds_something_is_refused(tiny_model_dir: Path, tiny_plan: Plan, tmp_path: Path) -> None:
    source = resolve_source(str(tiny_model_dir))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    with pytest.raises(UsageError, match="full is not empty; name a new directory"):
        export_source(source, tiny_plan, tmp_path / "full")
    with pytest.raises(UsageError, match="file is a file"):
        export_source(source, tiny_plan, tmp_path / "full" / "file")
    assert (tmp_path / "full" / "file").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    export_source(source, tiny_plan, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_a_disk_without_room_is_refused_first(
    tiny_model_dir: Path, tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(LpsearchError, match=r"needs 0\.07 GB and 0\.00 GB are free.*bfloat16"):
        export_source(resolve_source(str(tiny_model_dir)), tiny_plan, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_quantised_weights_are_refused(tiny_model_dir: Path, tiny_plan: Plan, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_model_dir, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantised \(gptq\); give the unquantised model"):
        export_source(resolve_source(str(source)), tiny_plan, tmp_path / "out")
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    weights = load_file(source / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"] = weights["model.layers.3.mlp.up_proj.weight"].to(torch.int8)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"stored as I8, e\.g\. model\.layers\.3\.mlp.*give the unquantised model"):
        export_source(resolve_source(str(source)), Plan.from_groups(tiny_plan.groups), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_changed_is_refused(tiny_model_dir: Path, tiny_plan: Plan, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_model_dir, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError, match="has other weights or another geometry"):
        export_source(resolve_source(str(source)), tiny_plan, tmp_path / "out")
    with pytest.raises(PlanError, match="has other weights or another geometry"):
        export_checkpoint(LlamaForCausalLM.from_pretrained(source), tiny_plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_fused_is_refused(tmp_path: Path) -> None:
    model = build_tiny_model("mixtral")
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(FamilyError, match=r"model type mixtral cannot be fused.*mixture of experts"):
        export_source(resolve_source(str(tmp_path / "source")), MIXED, tmp_path / "out")
    with pytest.raises(FamilyError, match=r"model type mixtral cannot be fused.*mixture of experts"):
        export_checkpoint(model, MIXED, tmp_path / "out")


def test_a_damaged_source_is_refused(tiny_model_dir: Path, tiny_plan: Plan, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_model_dir, tmp_path / "source")
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="source"):
        export_source(resolve_source(str(source)), tiny_plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


INTERRUPTED = """
import os, signal, sys
from lpsearch.commands.console import run_command
from lpsearch.export import export_source
from lpsearch.models import resolve_source
from lpsearch.plan import load_plan

def interrupt(done, total):
    if done == 7:
        print(len(os.listdir(os.path.dirname(sys.argv[3]))), flush=True)
        os.kill(os.getpid(), int(sys.argv[4]))

plan = load_plan(sys.argv[2])
run_command(lambda: export_source(resolve_source(sys.argv[1]), plan, sys.argv[3], on_progress=interrupt))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_export_leaves_nothing(
    tiny_model_dir: Path, tiny_plan: Plan, tmp_path: Path, number: signal.Signals
) -> None:
    from lpsearch.plan import save_plan

    save_plan(tiny_plan, tmp_path / "plan.json")
    (tmp_path / "exports").mkdir()
    out = tmp_path / "exports" / "out"
    done = run_warm(tiny_model_dir, tmp_path / "plan.json", out, int(number), code=INTERRUPTED)
    assert done.returncode == 130, done.stderr
    assert done.stdout.splitlines()[0] == "1"  # the directory under its temporary name
    assert not list((tmp_path / "exports").iterdir())
