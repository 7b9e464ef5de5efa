"""GGUF files without llama.cpp: what is in them, what is copied byte for byte, and what is refused."""

from __future__ import annotations

import json
import resource
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import lpsearch.commands.export
from lpsearch.errors import FamilyError, LpsearchError, ModelError, PlanError, UsageError
from lpsearch.export.gguf import QUANTISATIONS, check_gguf, export_gguf, export_gguf_source
from lpsearch.export.gguf.rotary import order_rows
from lpsearch.latency.engines.llama_cpp import check_llama_cpp_family
from lpsearch.latency.engines.timing_file import write_timing_file
from lpsearch.models import fingerprint_model, resolve_source
from lpsearch.models.traits import read_traits
from lpsearch.plan import ModelIdentity, Plan, PlanMetadata
from lpsearch.plan.stage_blocks import Block, arrange_blocks
from lpsearch.transform.deci import find_deci_obstacle
from tests.export.gguf_models import VOCAB_SIZE, build_gguf_model, build_tokenizer, write_base_gguf
from tests.fusing import DROPPING, MIXED
from tests.tiny_models import build_tiny_config
from tests.tolerances import FLOAT32_FUSED

SMOL = "smollm"
UNCHANGED = Plan.from_groups([[i] for i in range(6)])


def read_fields(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


def read_tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def get_bytes(tensor: Any) -> bytes:
    return bytes(np.ascontiguousarray(tensor.data).view(np.uint8))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A tiny model as a directory, with a tokenizer that llama.cpp has."""
    build_gguf_model("llama").save_pretrained(tmp_path / "base")
    build_tokenizer(SMOL).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (MIXED, [((0,), (0,)), ((1, 2), (1, 2)), ((3, 4, 5), (3, 4, 5))]),
        # An attention whose MLP is dropped takes the MLP of the next group, whose attention is.
        (
            UNCHANGED.drop({"attention": [2], "mlp": [1]}),
            [((0,), (0,)), ((1,), (2,)), ((3,), (3,)), ((4,), (4,)), ((5,), (5,))],
        ),
        (
            UNCHANGED.drop({"attention": [0, 3], "mlp": [4, 5]}),
            [((), (0,)), ((1,), (1,)), ((2,), (2,)), ((), (3,)), ((4,), ()), ((5,), ())],
        ),
        (UNCHANGED.drop({"attention": [2, 3], "mlp": [2, 3]}), [((i,), (i,)) for i in (0, 1, 4, 5)]),
    ],
)
def test_stages_are_laid_into_few_blocks(plan: Plan, expected: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    assert arrange_blocks(plan) == tuple(Block(*block) for block in expected)


@pytest.mark.parametrize("plan", [MIXED, *DROPPING.values()])
def test_the_arrays_say_the_shapes_of_the_tensors(plan: Plan, tmp_path: Path) -> None:
    path = export_gguf(build_gguf_model("llama"), plan, tmp_path / "plan.gguf", tokenizer=build_tokenizer(SMOL))
    fields, tensors = read_fields(path), read_tensors(path)
    num_blocks = fields["deci.block_count"]
    heads, kv_heads = fields["deci.attention.head_count"], fields["deci.attention.head_count_kv"]
    lengths = fields["deci.feed_forward_length"]
    assert len(heads) == len(kv_heads) == len(lengths) == num_blocks
    assert heads[0] > 0  # llama.cpp takes the size of a head for none otherwise
    assert 0 not in lengths  # for which llama.cpp leaves the attention out too
    num_attentions = 6 - len(plan.dropped["attention"])
    is_empty = not arrange_blocks(plan)[0].attention
    assert sum(heads) == 4 * num_attentions + is_empty
    assert sum(kv_heads) == 2 * num_attentions + is_empty
    assert sum(length for length in lengths if length != 32) == 48 * (6 - len(plan.dropped["mlp"]))
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        assert fields[f"deci.{name}"] == 8
    for block in range(num_blocks):
        shapes = {
            "ffn_up": (32, lengths[block]), "ffn_gate": (32, lengths[block]), "ffn_down": (lengths[block], 32),
            "ffn_norm": (32,),
        }  # fmt: skip
        if heads[block]:
            shapes |= {
                "attn_q": (32, 8 * heads[block]), "attn_k": (32, 8 * kv_heads[block]),
                "attn_v": (32, 8 * kv_heads[block]), "attn_output": (8 * heads[block], 32), "attn_norm": (32,),
            }  # fmt: skip
        found = {
            name.split(".")[2]: tuple(tensor.shape.tolist())
            for name, tensor in tensors.items()
            if name.startswith(f"blk.{block}.")
        }
        assert found == shapes
    assert not any(name.startswith(f"blk.{num_blocks}.") for name in tensors)


@pytest.mark.parametrize("plan", [MIXED, *DROPPING.values(), UNCHANGED.drop({"attention": range(6), "mlp": range(6)})])
@pytest.mark.parametrize("model", ["llama", "llama with biases", "granite", "qwen2"])
def test_what_is_timed_has_the_shapes_of_what_is_written(model: str, plan: Plan, tmp_path: Path) -> None:
    base = build_gguf_model(model)
    export_gguf(base, plan, tmp_path / "plan.gguf")
    write_timing_file(read_traits(base.config), plan, tmp_path / "timed.gguf", dtype=torch.float32)
    written, timed = (
        {name: (tensor.shape.tolist(), tensor.tensor_type) for name, tensor in read_tensors(tmp_path / file).items()}
        for file in ("plan.gguf", "timed.gguf")
    )
    assert timed == written
    written, timed = (read_fields(tmp_path / file) for file in ("plan.gguf", "timed.gguf"))
    keys = {key for key in written if key.startswith("deci.")}
    assert keys == {key for key in timed if key.startswith("deci.")}
    assert all(timed[key] == written[key] for key in keys - {"deci.context_length"})


def test_the_file_says_what_it_is(model_dir: Path, tmp_path: Path) -> None:
    plan = MIXED.drop({"mlp": [0]})
    export_gguf_source(resolve_source(str(model_dir)), plan, tmp_path / "plan.gguf")
    fields = read_fields(tmp_path / "plan.gguf")
    assert fields["general.architecture"] == "deci"
    assert fields["general.name"] == fields["lpsearch.base_model"] == "base"  # no directory of this machine
    assert json.loads(fields["lpsearch.plan"]) == json.loads(plan.key)
    assert fields["deci.context_length"] == 128
    assert fields["deci.vocab_size"] == len(fields["tokenizer.ggml.tokens"]) == VOCAB_SIZE
    assert fields["tokenizer.ggml.tokens"][1] == "<s>"
    assert fields["tokenizer.ggml.tokens"][-1] == f"[PAD{VOCAB_SIZE - 1}]"  # a row without a token
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert fields["tokenizer.chat_template"] == build_tokenizer(SMOL).chat_template
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["plan.gguf"]


def test_rows_are_brought_into_pairs_and_back() -> None:
    order = order_rows(2, 8, 8)
    assert order.tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert order_rows(1, 8, 4).tolist() == [0, 2, 1, 3, 4, 5, 6, 7]  # what is not turned stays
    rows = torch.randn(16, 5)
    back = rows[order].reshape(2, 4, 2, 5).swapaxes(1, 2).reshape(16, 5)  # as llama.cpp's users undo it
    assert torch.equal(back, rows)


def test_single_layers_of_a_directory_keep_their_weights(model_dir: Path, tmp_path: Path) -> None:
    export_gguf_source(resolve_source(str(model_dir)), MIXED, tmp_path / "plan.gguf")
    tensors, base = read_tensors(tmp_path / "plan.gguf"), load_file(model_dir / "model.safetensors")
    for name, stored in (
        ("attn_v", "self_attn.v_proj"),
        ("ffn_down", "mlp.down_proj"),
        ("attn_norm", "input_layernorm"),
    ):
        weight = base[f"model.layers.0.{stored}.weight"]
        assert np.array_equal(tensors[f"blk.0.{name}.weight"].data, weight.numpy())
    order = order_rows(4, 8, 8)
    queries = base["model.layers.0.self_attn.q_proj.weight"][order]
    assert np.array_equal(tensors["blk.0.attn_q.weight"].data, queries.numpy())
    # And those of a group are the members' own, but for the norm that they share.
    shared = torch.from_numpy(tensors["blk.1.ffn_norm.weight"].data.copy())
    ups = torch.from_numpy(tensors["blk.1.ffn_up.weight"].data.copy()) * shared
    for layer, rows in zip((1, 2), ups.chunk(2), strict=True):
        norm = base[f"model.layers.{layer}.post_attention_layernorm.weight"]
        torch.testing.assert_close(
            rows, base[f"model.layers.{layer}.mlp.up_proj.weight"] * norm, rtol=FLOAT32_FUSED, atol=1e-6
        )


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0])
def test_what_a_gguf_file_holds_is_copied_byte_for_byte(
    architecture: str, kind: GGMLQuantizationType, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
    model = build_gguf_model(architecture, **sizes)
    base = write_base_gguf(
        model, build_tokenizer(SMOL), tmp_path / "base.gguf", architecture=architecture, quantisation=kind
    )
    plan = MIXED.drop({"mlp": [0]})
    export_gguf_source(resolve_source(str(base)), plan, tmp_path / "plan.gguf", quantisation="f16")
    before, after = read_tensors(base), read_tensors(tmp_path / "plan.gguf")
    for name in ("token_embd.weight", "output.weight", "output_norm.weight"):
        assert get_bytes(after[name]) == get_bytes(before[name]), name
        assert after[name].tensor_type == before[name].tensor_type
    if architecture == "llama":
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "attn_norm"):
            assert get_bytes(after[f"blk.0.{name}.weight"]) == get_bytes(before[f"blk.0.{name}.weight"]), name
    else:  # the same rows, in another order within each head
        head_dim = 16
        stacked = before["blk.0.attn_qkv.weight" if architecture == "phi3" else "blk.0.attn_q.weight"].data
        queries = stacked[: 4 * head_dim][order_rows(4, head_dim, head_dim).numpy()]
        assert np.array_equal(after["blk.0.attn_q.weight"].data, queries)
        assert after["blk.0.attn_q.weight"].tensor_type == kind
    assert after["blk.1.ffn_up.weight"].tensor_type == GGMLQuantizationType.F16
    old, new = read_fields(base), read_fields(tmp_path / "plan.gguf")
    kept = {key for key in old if key.startswith("tokenizer.")}
    assert len(kept) > 8
    assert all(new[key] == old[key] for key in kept)
    assert new["general.name"] == "a base"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("Q4_1", "Q8_0"), ("Q8_0", "Q8_0"), ("F16", "F16"), ("BF16", "BF16"), ("F32", "F32")],
)
def test_groups_are_stored_as_the_source_is(kind: str, expected: str, tmp_path: Path) -> None:
    model = build_gguf_model("llama", hidden_size=64, intermediate_size=96)
    base = write_base_gguf(
        model, build_tokenizer(SMOL), tmp_path / "base.gguf", architecture="llama",
        quantisation=GGMLQuantizationType[kind],
    )  # fmt: skip
    export_gguf_source(resolve_source(str(base)), MIXED, tmp_path / "plan.gguf")
    tensors = read_tensors(tmp_path / "plan.gguf")
    assert tensors["blk.1.ffn_up.weight"].tensor_type.name == expected
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == kind
    assert tensors["blk.1.ffn_norm.weight"].tensor_type.name == "F32"


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_matrices_are_stored_as_asked_for(quantisation: Any, tmp_path: Path) -> None:
    model = build_gguf_model("llama with biases", hidden_size=64, intermediate_size=80)
    export_gguf(model, MIXED, tmp_path / "plan.gguf", tokenizer=build_tokenizer(SMOL), quantisation=quantisation)
    tensors = read_tensors(tmp_path / "plan.gguf")
    for name, tensor in tensors.items():
        if len(tensor.shape) == 1:
            assert tensor.tensor_type.name == "F32", name
        elif quantisation == "q8_0" and int(tensor.shape[0]) % 32:  # rows that are no whole number of blocks
            assert tensor.tensor_type.name == "F16", name
        else:
            assert tensor.tensor_type.name == quantisation.upper(), name
    stored = gguf.dequantize(tensors["blk.0.attn_v.weight"].data, tensors["blk.0.attn_v.weight"].tensor_type)
    expected = model.model.layers[0].self_attn.v_proj.weight.detach().numpy()
    assert float(np.abs(stored - expected).max()) < 0.02 * float(np.abs(expected).max())
    assert (
        read_fields(tmp_path / "plan.gguf")["general.file_type"]
        == {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}[quantisation]
    )


def test_repaired_weights_are_written_in_place_of_the_files(tmp_path: Path) -> None:
    model = build_gguf_model("llama", hidden_size=64, intermediate_size=96)
    base = write_base_gguf(
        model, build_tokenizer(SMOL), tmp_path / "base.gguf", architecture="llama",
        quantisation=GGMLQuantizationType.Q4_1,
    )  # fmt: skip
    repaired = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    source = resolve_source(str(base))
    weights = {"layers.0.mlp.down_proj.weight": repaired}
    export_gguf_source(source, MIXED, tmp_path / "plan.gguf", weights=weights, quantisation="f32")
    tensors, before = read_tensors(tmp_path / "plan.gguf"), read_tensors(base)
    assert np.array_equal(tensors["blk.0.ffn_down.weight"].data, repaired.numpy())
    assert get_bytes(tensors["blk.0.ffn_up.weight"]) == get_bytes(before["blk.0.ffn_up.weight"])


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "gpt_neox"])
def test_what_llamacpp_computes_otherwise_is_refused_with_the_same_reason_everywhere(family: str) -> None:
    config = build_tiny_config(family)
    reason = find_deci_obstacle(read_traits(config))
    assert reason is not None
    with pytest.raises(FamilyError) as caught:
        check_gguf(config)
    assert str(caught.value).startswith(f"model type {config.model_type} cannot be written as a GGUF file: {reason}. ")
    with pytest.raises(FamilyError) as caught:
        check_llama_cpp_family(read_traits(config))
    assert str(caught.value).startswith(
        f"--engine llama.cpp: model type {config.model_type} is not timed there: {reason}."
    )


def test_a_tokenizer_that_llamacpp_has_not_is_refused(tmp_path: Path) -> None:
    cut = Tokenizer(models.BPE(vocab={"<s>": 0, "a": 1}, merges=[]))
    cut.pre_tokenizer = pre_tokenizers.Whitespace()
    word = Tokenizer(models.WordLevel(vocab={"<s>": 0, "a": 1}, unk_token="<s>"))
    for backend, reason in ((cut, "pre-tokenizer Whitespace"), (word, "it is WordLevel")):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
        with pytest.raises(ModelError, match=f"none that is known to be one of llama.cpp's: .*{reason}"):
            export_gguf(build_gguf_model("llama"), MIXED, tmp_path / "plan.gguf", tokenizer=tokenizer)
    with pytest.raises(ModelError, match="a token with the id 632, and the embedding 600 rows"):
        export_gguf(
            build_gguf_model("llama", vocab_size=600), MIXED, tmp_path / "plan.gguf", tokenizer=build_tokenizer(SMOL)
        )
    assert not list(tmp_path.iterdir())


def test_a_window_of_a_gguf_file_is_refused(tmp_path: Path) -> None:
    model = build_gguf_model("phi3")
    base = write_base_gguf(model, build_tokenizer(SMOL), tmp_path / "base.gguf", architecture="phi3", sliding_window=64)
    with pytest.raises(FamilyError, match="slides over a window of 64 tokens"):
        export_gguf_source(resolve_source(str(base)), MIXED, tmp_path / "plan.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]


def test_a_space_that_llamacpp_puts_elsewhere_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for scheme, warned in (("always", "begins with one."), ("never", ""), ("first", "nor after special tokens.")):
        caplog.clear()
        tokenizer = build_tokenizer("llama", metaspace=scheme)
        path = export_gguf(build_gguf_model("llama"), MIXED, tmp_path / f"{scheme}.gguf", tokenizer=tokenizer)
        assert read_fields(path)["tokenizer.ggml.add_space_prefix"] == (scheme != "never")
        assert ("puts a space before every text" in caplog.text) == bool(warned)
        assert warned in caplog.text


def test_a_quantised_directory_is_refused(model_dir: Path, tmp_path: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (model_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantised \(gptq\); give the unquantised model, or a \.gguf file"):
        export_gguf_source(resolve_source(str(model_dir)), MIXED, tmp_path / "plan.gguf")


def test_an_unknown_quantisation_is_refused(model_dir: Path, tmp_path: Path) -> None:
    bad: Any = "q3_k"
    with pytest.raises(UsageError, match=r"'q3_k' is none that is written; choose one of f32, f16, bf16, q8_0"):
        export_gguf_source(resolve_source(str(model_dir)), MIXED, tmp_path / "plan.gguf", quantisation=bad)
    with pytest.raises(UsageError, match="'q3_k' is none"):
        export_gguf(build_gguf_model("llama"), MIXED, tmp_path / "plan.gguf", quantisation=bad)


def test_a_file_that_exists_is_refused_and_kept(model_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "plan.gguf"
    target.write_text("kept")
    with pytest.raises(UsageError, match=r"plan\.gguf exists; name a new file"):
        export_gguf_source(resolve_source(str(model_dir)), MIXED, target)
    with pytest.raises(UsageError, match=r"ends in \.gguf"):
        export_gguf_source(resolve_source(str(model_dir)), MIXED, tmp_path / "plan.bin")
    assert target.read_text() == "kept"


def test_a_disk_without_room_is_refused_first(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(LpsearchError, match=r"needs 0\.07 GB and 0\.00 GB are free.*--quant q8_0"):
        export_gguf_source(resolve_source(str(model_dir)), MIXED, tmp_path / "plan.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_disk_that_is_full_before_the_end_is_named(model_dir: Path, tmp_path: Path) -> None:
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, former[1]))  # of every file; this one has more bytes
    try:
        with pytest.raises(LpsearchError, match=r"plan\.gguf: the file could not be written to its end .*; free some"):
            export_gguf_source(resolve_source(str(model_dir)), MIXED, tmp_path / "plan.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_interrupted_export_leaves_nothing(model_dir: Path, tmp_path: Path) -> None:
    seen = []

    def interrupt(done: int, total: int) -> None:
        seen.append([path.suffix for path in tmp_path.iterdir() if path.is_file()])
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf_source(resolve_source(str(model_dir)), MIXED, tmp_path / "plan.gguf", on_progress=interrupt)
    assert seen[-1] == [".tmp"]  # it was being written
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_plan_of_another_model_is_refused(model_dir: Path, tmp_path: Path) -> None:
    source = resolve_source(str(model_dir))
    with pytest.raises(PlanError, match="cover 4 layers and this model"):
        export_gguf_source(source, Plan.from_groups([[0, 1], [2, 3]]), tmp_path / "plan.gguf")
    model = LlamaForCausalLM.from_pretrained(model_dir)
    identity = ModelIdentity(id=str(model_dir), num_layers=6, fingerprint=fingerprint_model(model))
    plan = Plan.from_groups(MIXED.groups, metadata=PlanMetadata(model=identity))
    weights = load_file(model_dir / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError, match="has other weights or another geometry"):
        export_gguf_source(source, plan, tmp_path / "plan.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_the_command_offers_what_is_written() -> None:
    assert get_args(lpsearch.commands.export.Quantisation) == QUANTISATIONS
