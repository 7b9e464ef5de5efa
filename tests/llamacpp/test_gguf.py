"""Exported GGUF files in stock llama.cpp: what they compute, how they tokenise, and what they generate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lpsearch.export.gguf import export_gguf, export_gguf_source
from lpsearch.models import resolve_source
from lpsearch.plan import Plan
from tests.export.gguf_models import (
    BYTE_LEVEL,
    GGUF_OPTIONS,
    TEXTS,
    VOCAB_SIZE,
    build_gguf_model,
    build_tokenizer,
    run_loop,
    write_base_gguf,
)
from tests.fusing import DROPPING, MIXED, PAIRS
from tests.llamacpp.engine import NEEDS_LLAMACPP, ask_llamacpp, compute_log_probabilities
from tests.tolerances import LLAMACPP_LOGITS

pytestmark = NEEDS_LLAMACPP

PROMPTS = (list(range(300, 312)), [7, 99, 431, 5, 600, 33, 2], list(range(40, 100)), [17])

UNCHANGED = Plan.from_groups([[i] for i in range(6)])

PLANS = {
    "unchanged": UNCHANGED,
    "pairs": PAIRS,
    "a pair and a triple": MIXED,
    "all in one group": Plan.from_groups([[0, 1, 2, 3, 4, 5]]),
    **{
        f"{where} {branch} dropped": UNCHANGED.drop({branch: [layer]})
        for branch in ("attention", "mlp")
        for where, layer in (("first", 0), ("middle", 3), ("last", 5))
    },
    "no attention but the last": UNCHANGED.drop({"attention": [0, 1, 2, 3, 4]}),
    "no MLP": UNCHANGED.drop({"mlp": [0, 1, 2, 3, 4, 5]}),
    **DROPPING,
}


def compute_by_loop(model: PreTrainedModel, plan: Plan) -> Tensor:
    return torch.stack([run_loop(model, plan, prompt) for prompt in PROMPTS])


def compute_by_llamacpp(path: Path) -> Tensor:
    return compute_log_probabilities(path, PROMPTS, vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize("where", PLANS)
def test_every_kind_of_plan_gives_the_logits_of_the_loop(where: str, tmp_path: Path) -> None:
    model, plan = build_gguf_model("llama"), PLANS[where]
    path = export_gguf(model, plan, tmp_path / "plan.gguf", tokenizer=build_tokenizer("smollm"))
    expected = compute_by_loop(model, plan)
    assert float((compute_by_llamacpp(path) - expected).abs().max()) < LLAMACPP_LOGITS
    if plan != UNCHANGED:
        assert float((compute_by_loop(model, UNCHANGED) - expected).abs().max()) > 100 * LLAMACPP_LOGITS


@pytest.mark.parametrize("name", GGUF_OPTIONS)
def test_every_family_gives_the_logits_of_the_loop(name: str, tmp_path: Path) -> None:
    model = build_gguf_model(name)
    plan = MIXED.drop({"attention": [2], "mlp": [0, 3, 4]})  # pairs, a triple, single branches, an empty MLP
    path = export_gguf(model, plan, tmp_path / "plan.gguf", tokenizer=build_tokenizer("smollm"))
    assert float((compute_by_llamacpp(path) - compute_by_loop(model, plan)).abs().max()) < LLAMACPP_LOGITS


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
def test_an_unchanged_file_computes_the_same_as_deci(architecture: str, tmp_path: Path) -> None:
    name = {"llama": "llama 3 scaling"}.get(architecture, architecture)
    model, tokenizer = build_gguf_model(name), build_tokenizer("smollm")
    base = write_base_gguf(model, tokenizer, tmp_path / "base.gguf", architecture=architecture)
    assert float((compute_by_llamacpp(base) - compute_by_loop(model, UNCHANGED)).abs().max()) < LLAMACPP_LOGITS
    path = export_gguf_source(resolve_source(str(base)), UNCHANGED, tmp_path / "plan.gguf")
    # The very products, in the same order but for rows within a head.
    assert float((compute_by_llamacpp(path) - compute_by_llamacpp(base)).abs().max()) < LLAMACPP_LOGITS


def test_groups_of_a_gguf_file_give_the_logits_of_the_loop(tmp_path: Path) -> None:
    model, tokenizer = build_gguf_model("qwen2"), build_tokenizer("smollm")
    base = write_base_gguf(model, tokenizer, tmp_path / "base.gguf", architecture="qwen2")
    path = export_gguf_source(resolve_source(str(base)), MIXED, tmp_path / "plan.gguf")
    assert float((compute_by_llamacpp(path) - compute_by_loop(model, MIXED)).abs().max()) < LLAMACPP_LOGITS


@pytest.mark.parametrize(
    ("kind", "metaspace"),
    [*((kind, None) for kind in BYTE_LEVEL), ("llama", None), ("llama", "always"), ("llama", "never")],
)
def test_texts_become_the_same_tokens(kind: str, metaspace: str | None, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(kind, metaspace=metaspace)
    texts = [*TEXTS, "<s>a<tool>b</s>", " ".join(TEXTS)]
    if metaspace == "always":  # which warns that spaces at the beginning are another matter
        texts = [text for text in texts if not text.startswith(" ")]
    path = export_gguf(build_gguf_model("llama"), MIXED, tmp_path / "plan.gguf", tokenizer=tokenizer)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How deep?"}]
    answers = ask_llamacpp(path, texts=texts, chats=[messages], vocab_size=VOCAB_SIZE)
    assert dict(zip(texts, answers["token_ids"], strict=True)) == {text: tokenizer(text)["input_ids"] for text in texts}
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert answers["chats"] == [chat]
    assert "<|user|>How deep?</s>" in chat


def test_greedy_tokens_are_those_of_the_loop(tmp_path: Path) -> None:
    model, plan = build_gguf_model("llama"), DROPPING["within groups"]
    prompt, expected = list(range(300, 312)), []
    for _ in range(12):
        expected.append(int(run_loop(model, plan, [*prompt, *expected]).argmax()))
    path = export_gguf(model, plan, tmp_path / "plan.gguf", tokenizer=build_tokenizer("smollm"))
    answers = ask_llamacpp(path, **{"continue": [prompt], "num_tokens": 12, "vocab_size": VOCAB_SIZE})
    assert answers["continuations"] == [expected]
    assert len(set(expected)) > 3


@pytest.mark.parametrize("quantisation", ["f16", "bf16", "q8_0"])
def test_smaller_formats_run_and_are_near(quantisation: str, tmp_path: Path) -> None:
    model = build_gguf_model("llama", hidden_size=64, intermediate_size=96, head_dim=32)
    tokenizer = build_tokenizer("smollm")
    path = export_gguf(model, MIXED, tmp_path / "plan.gguf", tokenizer=tokenizer, quantisation=quantisation)
    expected = compute_by_loop(model, MIXED)
    difference = (compute_by_llamacpp(path) - expected).abs().mean()
    assert LLAMACPP_LOGITS < float(difference) < 0.05 * float(expected.std())


def test_llamacpp_skips_the_attention_of_a_block_whose_mlp_has_no_width(tmp_path: Path) -> None:
    """The reason that a dropped MLP is written as zeros; when this fails, it need not be any more."""
    from gguf import GGUFReader

    model = build_gguf_model("llama")
    plan = UNCHANGED.drop({"mlp": [3]})
    path = export_gguf(model, plan, tmp_path / "plan.gguf", tokenizer=build_tokenizer("smollm"))
    lengths = GGUFReader(path).fields["deci.feed_forward_length"].contents()
    assert lengths == [48, 48, 48, 32, 48, 48]
    without = write_without_mlp(path, tmp_path / "zero.gguf", block=3)
    skipped = compute_by_loop(model, UNCHANGED.drop({"attention": [3], "mlp": [3]}))
    assert float((compute_by_llamacpp(without) - skipped).abs().max()) < LLAMACPP_LOGITS


def write_without_mlp(path: Path, target: Path, *, block: int) -> Path:
    """Write a file again with a feed-forward length of 0 for a block."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader, writer = GGUFReader(path), GGUFWriter(target, "deci")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = field.contents()
        if key == "deci.feed_forward_length":
            value = [0 if index == block else length for index, length in enumerate(value)]
        item_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(key, value, field.types[0], sub_type=item_type)
    for tensor in reader.tensors:
        if not tensor.name.startswith(f"blk.{block}.ffn"):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.packaged
@pytest.mark.slow
def test_smollm2_generates_what_transformers_does(tmp_path: Path) -> None:
    from lpsearch.models import load_model
    from lpsearch.transform import applied_plan

    plan = Plan.from_groups([*([i] for i in range(10)), [10, 11], [12], [13, 14], *([i] for i in range(15, 30))])
    source = resolve_source("smollm2-135m")
    loaded = load_model(source, device="cpu", dtype=torch.float32)
    texts = ["The capital of France is", "In 1969, the first person", "<|im_start|>user\nHi 123!<|im_end|>\n"]
    prompts = [loaded.tokenizer(text)["input_ids"] for text in texts]
    path = export_gguf_source(source, plan, tmp_path / "plan.gguf")
    answers = ask_llamacpp(
        path,
        **{"continue": prompts[:2], "num_tokens": 12, "texts": texts, "vocab_size": loaded.model.config.vocab_size},
    )
    assert answers["token_ids"] == prompts
    with applied_plan(loaded.model, plan), torch.no_grad():
        for prompt, continuation in zip(prompts[:2], answers["continuations"], strict=True):
            # llama.cpp rounds activations to 8 bits before it multiplies by quantised weights, so a near tie may turn.
            logits = loaded.model(torch.tensor([prompt + continuation])).logits[0, len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(continuation)[:, None])[:, 0]
            assert float((logits.amax(1) - chosen).max()) < 0.5
