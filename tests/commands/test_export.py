"""``lpsearch export`` and ``lpsearch generate`` on what it wrote."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoTokenizer, LlamaForCausalLM

from lpsearch.models import fingerprint_model
from lpsearch.plan import ModelIdentity, Plan, PlanMetadata, load_plan, save_plan
from lpsearch.transform import applied_plan
from tests.commands.conftest import Run, Start
from tests.export.gguf_models import VOCAB_SIZE, build_gguf_model, build_tokenizer
from tests.fusing import silence_dropped
from tests.tiny_models import build_tiny_config


def write_plan(tiny_model_dir: Path, path: Path, fingerprint: str | None = None) -> Path:
    fingerprint = fingerprint or fingerprint_model(LlamaForCausalLM.from_pretrained(tiny_model_dir))
    identity = ModelIdentity(id=str(tiny_model_dir), num_layers=6, fingerprint=fingerprint)
    save_plan(Plan.from_groups([[0], [1, 2], [3, 4], [5]], metadata=PlanMetadata(model=identity)), path)
    return path


def test_export_then_generate(run_lpsearch: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    plan = write_plan(tiny_model_dir, tmp_path / "plan.json")
    exported = run_lpsearch("export", plan, tmp_path / "out")
    assert exported.exit_code == 0
    document = exported.document
    assert (document["depth"], document["dtype"]) == (4, "float32")
    assert document["num_bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    options = ("--prompt", "The square", "--max-new-tokens", 6, "--device", "cpu", "--dtype", "float32")
    fused = run_lpsearch("generate", tmp_path / "out", *options, "--compare")
    planned = run_lpsearch("generate", plan, *options, "--compare")
    assert fused.exit_code == planned.exit_code == 0
    assert fused.document["text"] == planned.document["text"]
    assert fused.document["base"]["text"] == planned.document["base"]["text"]
    assert fused.document["text"] != fused.document["base"]["text"]
    assert fused.document["tokens_per_s"] > 0
    assert "tokens/s" in fused.stderr
    assert fused.document["text"] in fused.stderr


def test_a_plan_that_drops_branches_is_exported_without_them(
    run_lpsearch: Run, tiny_model_dir: Path, tmp_path: Path
) -> None:
    whole = write_plan(tiny_model_dir, tmp_path / "whole.json")
    save_plan(load_plan(whole).drop({"attention": [1, 2], "mlp": [5]}), tmp_path / "plan.json")
    sizes = []
    for plan in (whole, tmp_path / "plan.json"):
        exported = run_lpsearch("export", plan, tmp_path / plan.stem)
        assert exported.exit_code == 0
        sizes.append(exported.document["num_bytes"])
    assert exported.document["depth"] == 3
    assert sizes[1] < 0.9 * sizes[0]
    options = ("--prompt", "The square", "--max-new-tokens", 6, "--device", "cpu", "--dtype", "float32")
    generated = run_lpsearch("generate", tmp_path / "plan", *options)
    assert generated.exit_code == 0
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    ids = tokenizer("The square", return_tensors="pt").input_ids
    with applied_plan(model, silence_dropped(model, load_plan(tmp_path / "plan.json"))):
        tokens = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert generated.document["text"] == tokenizer.decode(tokens, skip_special_tokens=True)


def test_export_in_another_dtype_and_model(run_lpsearch: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    plan = write_plan(Path("/nowhere"), tmp_path / "plan.json", fingerprint_model_of(tiny_model_dir))
    gone = run_lpsearch("export", plan, tmp_path / "out")
    assert gone.exit_code == 2
    assert "/nowhere" in gone.document["error"]["message"]
    done = run_lpsearch("export", plan, tmp_path / "out", "--model", tiny_model_dir, "--dtype", "bfloat16")
    assert done.exit_code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    again = run_lpsearch("export", plan, tmp_path / "out", "--model", tiny_model_dir)
    assert again.exit_code == 2
    assert "is not empty" in again.document["error"]["message"]


def fingerprint_model_of(directory: Path) -> str:
    return fingerprint_model(LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32))


def test_a_damaged_directory_is_refused(run_lpsearch: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    plan = write_plan(tiny_model_dir, tmp_path / "plan.json")
    assert run_lpsearch("export", plan, tmp_path / "out").exit_code == 0
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")
    outcome = run_lpsearch("generate", tmp_path / "out", "--prompt", "a", "--device", "cpu")
    assert outcome.exit_code == 2
    assert "cannot be loaded" in outcome.document["error"]["message"]


def test_export_of_a_gguf_file(run_lpsearch: Run, tmp_path: Path) -> None:
    build_gguf_model("llama").save_pretrained(tmp_path / "base")
    build_tokenizer("qwen2").save_pretrained(tmp_path / "base")
    plan = write_plan(tmp_path / "base", tmp_path / "plan.json")
    for name, options, file_type in (
        ("by its name.gguf", (), "ALL_F32"),
        ("smaller.gguf", ("--format", "gguf", "--quant", "q8_0"), "MOSTLY_Q8_0"),
    ):
        exported = run_lpsearch("export", plan, tmp_path / name, *options)
        assert exported.exit_code == 0, exported.stderr
        document = exported.document
        assert (document["file"], document["file_type"], document["depth"]) == (str(tmp_path / name), file_type, 4)
        assert document["num_bytes"] == (tmp_path / name).stat().st_size
        assert GGUFReader(tmp_path / name).fields["deci.attention.head_count"].contents() == [4, 8, 8, 4]
    again = run_lpsearch("export", plan, tmp_path / "smaller.gguf")
    assert again.exit_code == 2
    assert "smaller.gguf exists; name a new file" in again.document["error"]["message"]
    as_model = run_lpsearch("evaluate", plan, "--model", tmp_path / "smaller.gguf", "--data", "self")
    assert as_model.exit_code == 2
    assert "lpsearch wrote it" in as_model.document["error"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_gguf_export_that_is_interrupted_leaves_nothing(
    start_lpsearch: Start, tmp_path: Path, number: signal.Signals
) -> None:
    large = build_gguf_model("llama", hidden_size=512, intermediate_size=2048)  # seconds to write in 8 bits
    large.save_pretrained(tmp_path / "base")
    build_tokenizer("smollm").save_pretrained(tmp_path / "base")
    plan = write_plan(tmp_path / "base", tmp_path / "plan.json")
    (tmp_path / "out").mkdir()
    process = start_lpsearch("export", plan, tmp_path / "out" / "plan.gguf", "--quant", "q8_0")
    while not (seen := [path.name for path in (tmp_path / "out").iterdir()]):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(number)
    stdout, stderr = process.communicate()
    assert seen[0].endswith(".tmp")
    assert process.returncode == 130, stderr
    assert json.loads(stdout.splitlines()[-1])["error"]["type"] == "Interrupted"
    assert list((tmp_path / "out").iterdir()) == []


def test_options_of_another_format_are_refused(run_lpsearch: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    plan = write_plan(tiny_model_dir, tmp_path / "plan.json")
    for words, said in (
        ((tmp_path / "out", "--quant", "q8_0"), "--quant q8_0 is for a GGUF file"),
        ((tmp_path / "out.gguf", "--format", "hf", "--quant", "f16"), "--quant f16 is for a GGUF file"),
        ((tmp_path / "out.gguf", "--dtype", "bfloat16"), "--dtype bfloat16 is for a directory"),
        ((tmp_path / "out", "--format", "gguf"), "ends in .gguf"),
        ((tmp_path / "out.gguf", "--quant", "q3_k"), "q3_k"),
        ((tmp_path / "out", "--format", "onnx"), "onnx"),
    ):
        refused = run_lpsearch("export", plan, *words)
        assert refused.exit_code == 2, words
        assert said in refused.document["error"]["message"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == []


def test_a_family_that_llamacpp_computes_otherwise_is_refused_without_weights(
    run_lpsearch: Run, tmp_path: Path
) -> None:
    config = build_tiny_config("qwen3", vocab_size=VOCAB_SIZE, use_sliding_window=False)
    config.save_pretrained(tmp_path / "base")  # and no weights
    build_tokenizer("qwen2").save_pretrained(tmp_path / "base")
    identity = ModelIdentity(id=str(tmp_path / "base"), num_layers=6, fingerprint="0" * 16)
    plan = Plan.from_groups([[0], [1, 2], [3, 4], [5]], metadata=PlanMetadata(model=identity))
    save_plan(plan, tmp_path / "plan.json")
    refused = run_lpsearch("export", tmp_path / "plan.json", tmp_path / "out.gguf")
    assert refused.exit_code == 2
    assert (
        "model type qwen3 cannot be written as a GGUF file: its queries and keys are normed by head"
        in (refused.document["error"]["message"])
    )
