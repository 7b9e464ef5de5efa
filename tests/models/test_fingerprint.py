"""Fingerprints of models."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lpsearch.models import fingerprint_model, fingerprints_match, get_decoder_layers
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
