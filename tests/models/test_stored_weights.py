"""What a model directory's weight files hold is read, refused by name, or warned of by name."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lpsearch.errors import ModelError
from lpsearch.models import load_model, resolve_source
from lpsearch.models.stored_weights import StoredTensor, name_some, read_stored_tensors
from tests.tiny_models import FAMILIES, build_tiny_model

UP = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture
def directory(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """Copy the tiny model, to be spoilt."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def load(directory: Path):
    return load_model(resolve_source(str(directory)), device="cpu", dtype=torch.float32)


def edit(directory: Path, change: Callable[[dict[str, Tensor]], None] | None = None, **config: Any) -> None:
    """Change the weights, and fields of the configuration."""
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if change is not None:
        weights = load_file(directory / "model.safetensors")
        change(weights)
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in weights.items()},
            directory / "model.safetensors",
            metadata={"format": "pt"},
        )


def replace(directory: Path, family: str, *, config: dict[str, Any] | None = None, **options: Any) -> Path:
    """Put another tiny model into the directory, with the tokenizer that is there."""
    build_tiny_model(family, vocab_size=512, **options).save_pretrained(directory)
    edit(directory, **(config or {}))
    return directory


def quantise(weights: dict[str, Tensor], *, keep_scales: bool = True) -> None:
    """Store projections in float8, each with a scale of the whole tensor."""
    for name in [name for name in weights if "proj" in name]:
        scale = weights[name].abs().max() / 448
        weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        if keep_scales:
            weights[f"{name}_scale_inv"] = scale.reshape(1, 1)


def pack(weights: dict[str, Tensor]) -> None:
    """Store projections in the form of GPTQ."""
    for name in [name for name in weights if "proj" in name]:
        module = name.removesuffix(".weight")
        weights[f"{module}.qweight"] = weights.pop(name)[:4].to(torch.int32)
        weights[f"{module}.scales"] = torch.ones(1, 4)


def test_the_headers_are_what_the_files_hold(tiny_model_dir: Path) -> None:
    weights = load_file(tiny_model_dir / "model.safetensors")
    assert read_stored_tensors(tiny_model_dir) == {
        name: StoredTensor("F32", tuple(tensor.shape)) for name, tensor in weights.items()
    }


@pytest.mark.parametrize("keep_scales", [True, False])
def test_float8_without_quantisation_configuration_is_refused(directory: Path, keep_scales: bool) -> None:
    edit(directory, lambda weights: quantise(weights, keep_scales=keep_scales))
    with pytest.raises(
        ModelError, match=r"42 weights are stored as F8_E4M3, e\.g\. model\.layers\.\d\..*quantization_config"
    ):
        load(directory)


def test_integers_without_quantisation_configuration_are_refused(directory: Path) -> None:
    edit(directory, lambda weights: weights.update({UP: (100 * weights[UP]).to(torch.int8)}))
    with pytest.raises(ModelError, match=rf"1 weights are stored as I8, e\.g\. {UP}, and .* quantization_config"):
        load(directory)


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv", "input_scale", "weight.absmax", "SCB"])
def test_scales_that_nothing_reads_are_refused(directory: Path, suffix: str) -> None:
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    edit(directory, lambda weights: weights.update({name: torch.ones(1)}))
    with pytest.raises(ModelError, match=rf"the weights are quantised: 1 scales .*e\.g\. {name}"):
        load(directory)


def test_packed_weights_are_not_called_missing(directory: Path) -> None:
    edit(directory, pack)
    with pytest.raises(ModelError, match=r"the weights are quantised: 84 scales or packed weights"):
        load(directory)


@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
def test_quantised_checkpoints_are_refused(directory: Path, field: str) -> None:
    edit(directory, **{field: {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(ModelError, match=r"quantised \(gptq\)"):
        load(directory)


def test_biases_that_are_switched_off_are_warned_of(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    replace(directory, "llama", attention_bias=True, config={"attention_bias": False})
    load(directory)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "24 weights in the files are not used, e.g. model.layers.0.self_attn.k_proj.bias" in warning
    assert "switches these biases off" in warning


def test_more_layers_than_the_configuration_says_are_warned_of(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(directory, num_hidden_layers=4)
    assert load(directory).identity.num_layers == 4
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "18 weights in the files are not used, e.g. model.layers.4.input_layernorm.weight" in warning
    assert "num_hidden_layers 4, and the files hold layers up to 5" in warning


def test_what_is_known_to_be_harmless_is_not_warned_of(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    def add(weights: dict[str, Tensor]) -> None:
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        weights["vision_tower.layers.0.mlp.fc1.weight"] = torch.ones(4, 4)

    edit(directory, add)
    with caplog.at_level(logging.INFO, logger="lpsearch"):
        load(directory)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert "1 weights outside the decoder are not used, e.g. vision_tower.layers.0.mlp.fc1.weight" in caplog.text
    caplog.clear()
    load(replace(directory, "gemma", tie_word_embeddings=True))
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING and "weights" in record.msg] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_is_warned_of_without_cause(family: str, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lpsearch.models.stored_weights"):
        load(replace(directory, family))
    assert [record for record in caplog.records if record.name == "lpsearch.models.stored_weights"] == []


def test_missing_weights_are_not_made_up(directory: Path) -> None:
    edit(directory, lambda weights: weights.pop(UP))
    with pytest.raises(ModelError, match=rf"1 weights are missing, e\.g\. {UP}; fetch the model again"):
        load(directory)


def test_weights_under_another_name_are_said_beside_the_missing(directory: Path) -> None:
    edit(directory, lambda weights: weights.update({UP.replace("up_proj", "w3"): weights.pop(UP)}))
    with pytest.raises(ModelError, match=rf"{UP}, and the files hold model\.layers\.3\.mlp\.w3\.weight instead"):
        load(directory)


def test_a_weight_of_another_shape_is_named(directory: Path) -> None:
    edit(directory, intermediate_size=40)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.down_proj\.weight has shape 32 x 48, expected 32 x 40"):
        load(directory)


def test_a_narrower_layer_is_named(directory: Path) -> None:
    edit(directory, lambda weights: weights.update({UP: weights[UP][:32]}))
    with pytest.raises(ModelError, match=rf"of unlike size: {UP} has shape 32 x 32, in the others 48 x 32 is usual"):
        load(directory)


def test_a_narrower_expert_is_named(directory: Path) -> None:
    replace(directory, "mixtral")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    edit(directory, lambda weights: weights.update({name: weights[name][:32]}))
    with pytest.raises(ModelError, match=rf"of unlike size: {name} has shape 32 x 32, in the others 48 x 32 is usual"):
        load(directory)


def test_experts_that_do_not_fit_together_are_named(directory: Path) -> None:
    replace(directory, "mixtral")

    def narrow(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if name.endswith("w1.weight")]:
            weights[name] = weights[name][:, :16]

    edit(directory, narrow)
    says = r"mlp\.experts\.gate_up_proj cannot be made of the weights in the files: RuntimeError: Sizes of tensors must"
    with pytest.raises(ModelError, match=says):
        load(directory)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (
            {"model_type": "openelm", "num_query_heads": [12, 12, 16], "ffn_multipliers": [0.5, 1.0, 2.0]},
            "num_query_heads",
        ),
        ({"model_type": "nemotron-nas", "block_configs": [{"attention": {}}, {"attention": None}]}, "block_configs"),
        ({"model_type": "deci", "num_key_value_heads_per_layer": [4, 4, 2]}, "num_key_value_heads_per_layer"),
        ({"per_layer_config": {"1": {"intermediate_size": 32}}}, "per_layer_config"),
    ],
)
def test_layers_of_unlike_size_are_refused_from_the_configuration(
    directory: Path, fields: dict[str, Any], named: str
) -> None:
    edit(directory, **fields, auto_map={"AutoConfig": "configuration_my.MyConfig"})
    with pytest.raises(ModelError, match=rf"config\.json: its layers are of unlike size \({named}\); lpsearch takes"):
        load(directory)


def test_pickled_weights_are_refused(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"its weights are pickled \(pytorch_model\.bin\).*use_safetensors=False"):
        load(directory)


def test_the_remedy_for_pickled_weights_is_true(directory: Path) -> None:
    from transformers import AutoModelForCausalLM

    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin")
    AutoModelForCausalLM.from_pretrained(directory, use_safetensors=False).save_pretrained(directory)
    for name, parameter in load(directory).model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: (d / "model.safetensors").unlink(), "there are no weights: expected model.safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes(b"no weights"), r"model\.safetensors is damaged"),
        (
            lambda d: (d / "model.safetensors").rename(d / "weights.safetensors"),
            "it has weights.safetensors, and neither",
        ),
    ],
)
def test_weight_files_that_cannot_be_read(directory: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(directory)
    with pytest.raises(ModelError, match=says):
        load(directory)


def test_an_index_is_checked(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    parts = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": parts}))
    with pytest.raises(ModelError, match=r"1 of the 2 files .* e\.g\. model-00002-of-00002\.safetensors"):
        load(directory)
    for damaged in ("{", "[]", "{}", '{"weight_map": {"a": 1}}'):
        index.write_text(damaged)
        with pytest.raises(ModelError, match="not an index of safetensors files"):
            load(directory)


def test_names_of_one_kind_are_given_once() -> None:
    names = ["a.0.q", "a.1.q", "a.0.k", "b", "c", "d"]
    assert name_some(names) == "a.0.q, a.0.k, b"
