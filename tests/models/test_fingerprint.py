"""Fingerprints of models."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lpsearch.errors import ResumeError
from lpsearch.models import (
    check_parts,
    fingerprint_model,
    fingerprint_parts,
    fingerprints_match,
    get_decoder_layers,
)
from tests.tiny_models import FAMILIES, build_tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_in_float32_and_bfloat16(family: str) -> None:
    model = build_tiny_model(family)
    fingerprint = fingerprint_model(model)
    geometry, weights = fingerprint.split("-")
    assert len(geometry) == len(weights) == 16
    assert fingerprint_model(copy.deepcopy(model).to(torch.bfloat16)) == fingerprint
    assert fingerprint_model(build_tiny_model(family, seed=1)).split("-")[0] == geometry
    assert not fingerprints_match(fingerprint, fingerprint_model(build_tiny_model(family, seed=1)))


def test_equal_after_saving(tmp_path: Path) -> None:
    model = build_tiny_model("qwen3")
    model.save_pretrained(tmp_path)
    assert fingerprint_model(AutoModelForCausalLM.from_pretrained(tmp_path)) == fingerprint_model(model)


@pytest.mark.parametrize("change", ["num_hidden_layers", "intermediate_size", "num_key_value_heads", "vocab_size"])
def test_geometry_counts(change: str) -> None:
    model = build_tiny_model("llama")
    value = {"num_hidden_layers": 7, "intermediate_size": 64, "num_key_value_heads": 4, "vocab_size": 98}[change]
    with torch.device("meta"):
        config = copy.deepcopy(model.config)
        setattr(config, change, value)
        other = AutoModelForCausalLM.from_config(config)
    assert fingerprint_model(other).split("-")[0] != fingerprint_model(model).split("-")[0]


def test_one_changed_layer_counts() -> None:
    model = build_tiny_model("llama")
    before = fingerprint_model(model)
    layers = get_decoder_layers(model)
    layers[2], layers[3] = layers[3], layers[2]
    assert fingerprint_model(model) != before


def test_patched_forwards_do_not_count() -> None:
    model = build_tiny_model("llama")
    before = fingerprint_model(model)
    for layer in get_decoder_layers(model):
        layer.forward = lambda *args, **kwargs: args[0]
    assert fingerprint_model(model) == before


def test_float16_and_meta_compare_geometries_only() -> None:
    model = build_tiny_model("llama")
    fingerprint = fingerprint_model(model)
    half = fingerprint_model(copy.deepcopy(model).to(torch.float16))
    assert fingerprints_match(fingerprint, half)
    with torch.device("meta"):
        empty = fingerprint_model(AutoModelForCausalLM.from_config(model.config))
    assert empty == fingerprint.split("-")[0] + "-" + "0" * 16
    assert fingerprints_match(fingerprint, empty)
    other = fingerprint_model(build_tiny_model("llama", num_layers=5))
    assert not fingerprints_match(fingerprint, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one CUDA device")
def test_equal_on_the_gpu() -> None:
    model = build_tiny_model("llama")
    before = fingerprint_model(model)
    assert fingerprint_model(model.to("cuda")) == before


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model_dir)
    return tokenizer


@torch.no_grad()
def change(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, part: str) -> None:
    """Change one part of a Llama, and as little of it as a training of one token does."""
    if part == "embedding":
        model.get_input_embeddings().weight[7] += 1
    elif part == "head":
        model.get_output_embeddings().weight[7] += 1
    elif part == "decoder":
        model.model.layers[3].mlp.up_proj.weight += 1
    elif part == "final norm":
        model.model.norm.weight[5] += 1
    elif part == "configuration":
        model.config.rms_norm_eps *= 10
    elif part == "rotary frequencies":
        model.model.rotary_emb.original_inv_freq *= 2
    else:
        tokenizer.add_tokens(["<new>"])


@pytest.mark.parametrize(
    "part", ["embedding", "head", "decoder", "final norm", "configuration", "rotary frequencies", "tokenizer"]
)
def test_every_part_counts_alone(part: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model, words = build_tiny_model("llama"), copy.deepcopy(tokenizer)
    before = fingerprint_parts(model, words)
    change(model, words, part)
    after = fingerprint_parts(model, words)
    name = "configuration" if part == "rotary frequencies" else part
    assert [name for name in before if before[name] != after[name]] == [name]
    with pytest.raises(ResumeError, match=f"owner/name: .* the {name} differs"):
        check_parts(before, after, name="owner/name")
    check_parts({key: value for key, value in before.items() if key != name}, after, name="a study of old")


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_equal_in_float32_and_bfloat16(family: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = build_tiny_model(family)
    parts = fingerprint_parts(model, tokenizer)
    assert fingerprint_parts(copy.deepcopy(model).to(torch.bfloat16), tokenizer) == parts
    other = fingerprint_parts(build_tiny_model(family, seed=1), tokenizer)
    assert [name for name in parts if parts[name] == other[name]] == ["configuration", "tokenizer"]


def test_parts_in_float16_are_compared_with_float16_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    model = build_tiny_model("llama")
    half = copy.deepcopy(model).to(torch.float16)
    parts = fingerprint_parts(half, tokenizer)
    check_parts(fingerprint_parts(model, tokenizer), parts, name="owner/name")
    change(half, tokenizer, "head")
    with pytest.raises(ResumeError, match="the head differs"):
        check_parts(parts, fingerprint_parts(half, tokenizer), name="owner/name")


def test_a_tied_head_is_the_same_head_untied(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tied = build_tiny_model("llama", tie_word_embeddings=True)
    untied = build_tiny_model("llama", tie_word_embeddings=False)
    untied.load_state_dict(tied.state_dict())
    assert fingerprint_parts(untied, tokenizer) == fingerprint_parts(tied, tokenizer)
