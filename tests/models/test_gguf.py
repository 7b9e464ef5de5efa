"""GGUF files: everything in them is read, or refused by name."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import Gemma3TextConfig, PreTrainedModel

from lpsearch.errors import ModelError
from lpsearch.models import load_geometry, load_model, resolve_source
from lpsearch.models.gguf_header import read_gguf_header, read_gguf_vector
from lpsearch.models.gguf_rope import apply_gguf_rope
from tests.models.gguf_files import VOCABULARY, build_llama, write_gguf
from tests.tolerances import FLOAT32_LOGITS

LLAMA_3_1 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA_3_2 = LLAMA_3_1 | {"factor": 32.0}
UNPUBLISHED = {"factor": 5.0, "low_freq_factor": 1.5, "high_freq_factor": 3.7, "original_max_position_embeddings": 300}
CLOSE_BOUNDS = UNPUBLISHED | {"low_freq_factor": 0.3, "high_freq_factor": 0.9, "original_max_position_embeddings": 128}


def build_scaled(rope: dict[str, Any], *, theta: float = 500_000.0) -> PreTrainedModel:
    """Build a Llama with wide heads, so that several frequencies lie between the bounds of the scaling."""
    return build_llama(head_dim=64, max_position_embeddings=131072, rope_parameters={"rope_theta": theta} | rope)


def compute_divisors(rope: dict[str, Any], *, theta: float = 500_000.0, head_dim: int = 64) -> np.ndarray:
    """Compute what llama.cpp's ``convert_hf_to_gguf.py`` writes for a configuration of Llama 3."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        num_waves = rope["original_max_position_embeddings"] / wavelength
        if num_waves > rope["high_freq_factor"]:
            divisors.append(1.0)
        elif num_waves < rope["low_freq_factor"]:
            divisors.append(rope["factor"])
        else:
            bounds = rope["high_freq_factor"] - rope["low_freq_factor"]
            smooth = (num_waves - rope["low_freq_factor"]) / bounds
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, dtype=np.float32)


def load(path: Path) -> PreTrainedModel:
    return load_model(resolve_source(str(path)), device="cpu", dtype=torch.float32).model


def compute_logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(len(VOCABULARY), (1, 120), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids).logits


def test_a_quantisation_that_is_not_known_yet_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", build_llama())
    name = b"blk.0.attn_norm.weight"
    before, after = path.read_bytes().split(name)
    path.write_bytes(before + name + after[:12] + struct.pack("<I", 900) + after[16:])  # after the one dimension
    with pytest.raises(ModelError, match="does not know quantisation 900; update gguf"):
        load(path)


def test_a_file_without_scaling_is_the_model_it_was_written_from(tmp_path: Path) -> None:
    model = build_llama()
    loaded = load_model(resolve_source(str(write_gguf(tmp_path / "m.gguf", model))), device="cpu", dtype=torch.float32)
    torch.testing.assert_close(compute_logits(loaded.model), compute_logits(model), atol=FLOAT32_LOGITS, rtol=0)
    assert loaded.tokenizer.decode(loaded.tokenizer("the rain")["input_ids"]) == "the rain"
    assert len(loaded.tokenizer("th")["input_ids"]) == 1


@pytest.mark.parametrize("rope", [LLAMA_3_1, LLAMA_3_2, UNPUBLISHED, CLOSE_BOUNDS])
def test_llama_3_scaling_is_the_original_models(rope: dict[str, Any], tmp_path: Path) -> None:
    model = build_scaled({"rope_type": "llama3"} | rope)
    path = write_gguf(tmp_path / "m.gguf", model, extra={"rope_freqs.weight": compute_divisors(rope)})
    loaded = load(path)
    torch.testing.assert_close(compute_logits(loaded), compute_logits(model), atol=FLOAT32_LOGITS, rtol=0)
    unscaled = build_scaled({"rope_type": "default"})
    assert (compute_logits(unscaled) - compute_logits(model)).abs().max() > 1000 * FLOAT32_LOGITS
    assert loaded.config.rope_parameters["rope_type"] == "llama3"
    assert load_geometry(str(path)).rope_parameters == loaded.config.rope_parameters
    if rope in (LLAMA_3_1, LLAMA_3_2):
        assert loaded.config.rope_parameters == model.config.rope_parameters


def test_divisors_of_another_form_are_refused(tmp_path: Path) -> None:
    divisors = np.linspace(1, 8, 32, dtype=np.float32)
    path = write_gguf(tmp_path / "m.gguf", build_scaled({}), extra={"rope_freqs.weight": divisors})
    with pytest.raises(ModelError, match=r"rope_freqs\.weight divides .* by 1 to 8 .* the model's own directory"):
        load(path)
    path = write_gguf(tmp_path / "m.gguf", build_scaled({}), extra={"rope_freqs.weight": divisors[:5]})
    with pytest.raises(ModelError, match=r"5 divisors, expected 32"):
        load(path)


def test_divisors_of_one_change_nothing(tmp_path: Path) -> None:
    model = build_llama()
    path = write_gguf(tmp_path / "m.gguf", model, extra={"rope_freqs.weight": np.ones(4, dtype=np.float32)})
    assert load(path).config.rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize("key", ["llama.rope.scaling.factor", "llama.rope.scale_linear"])
def test_linear_scaling_is_the_original_models(key: str, tmp_path: Path) -> None:
    model = build_llama(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0})
    loaded = load(write_gguf(tmp_path / "m.gguf", model, metadata={key: 4.0}))
    torch.testing.assert_close(compute_logits(loaded), compute_logits(model), atol=FLOAT32_LOGITS, rtol=0)


def test_linear_scaling_of_gemma_3_is_of_its_layers_with_full_attention(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma3")  # as the 4B model's file has it
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    config = Gemma3TextConfig()
    sliding = config.rope_parameters["sliding_attention"]
    full = config.rope_parameters["full_attention"] | {"rope_type": "linear", "factor": 8.0}
    scaled = apply_gguf_rope(config, tmp_path / "m.gguf")
    assert scaled.rope_parameters == {"sliding_attention": sliding, "full_attention": full}


def test_a_scaling_that_is_left_out_is_refused(tmp_path: Path) -> None:
    scaling = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    path = write_gguf(tmp_path / "m.gguf", build_llama(), metadata=scaling)
    with pytest.raises(ModelError, match=r"llama\.rope\.scaling\.type is 'yarn', the factor 4\)"):
        load(path)
    load(write_gguf(tmp_path / "m.gguf", build_llama(), metadata=scaling | {"llama.rope.scaling.type": "none"}))


def test_tensors_that_nothing_takes_are_refused(tmp_path: Path) -> None:
    biased = build_llama(attention_bias=True)
    with pytest.raises(ModelError, match=r"leaves out 12 tensors, e\.g\. blk\.0\.attn_q\.bias, blk\.0\.attn_k"):
        load(write_gguf(tmp_path / "m.gguf", biased))
    with pytest.raises(ModelError, match=r"leaves out 9 tensors, e\.g\. blk\.2\.attn_q\.weight"):
        load(write_gguf(tmp_path / "m.gguf", build_llama(), block_count=2))
    frequencies = {"blk.0.attn_rot_embd.weight": np.ones(4, dtype=np.float32)}
    load(write_gguf(tmp_path / "m.gguf", build_llama(), extra=frequencies))


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"9 weights are missing, e\.g\. model\.layers\.3\."):
        load(write_gguf(tmp_path / "m.gguf", build_llama(), block_count=4))
    model = build_llama()
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.ones(40, 32), requires_grad=False)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight has shape 40 x 32, expected 48 x 32"):
        load(write_gguf(tmp_path / "m.gguf", model))


@pytest.mark.parametrize("number", [1, 2])
def test_a_part_of_a_split_file_is_refused(number: int, tmp_path: Path) -> None:
    part = tmp_path / f"m-0000{number}-of-00003.gguf"
    part.touch()
    merge = rf"llama-gguf-split --merge {tmp_path}/m-00001-of-00003\.gguf {tmp_path}/m\.gguf"
    with pytest.raises(ModelError, match=merge):
        resolve_source(str(part))
    with pytest.raises(ModelError, match=rf"give its file {part}"):
        resolve_source(str(tmp_path))


def test_a_renamed_part_and_a_single_part(tmp_path: Path) -> None:
    renamed = write_gguf(tmp_path / "m.gguf", build_llama(), metadata={"split.count": 3})
    with pytest.raises(ModelError, match=r"one of 3 parts"):
        load(renamed)
    load(write_gguf(tmp_path / "m-00001-of-00001.gguf", build_llama(), metadata={"split.count": 1}))


def test_the_header_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", build_llama(), extra={"rope_freqs.weight": np.arange(4, dtype=np.float32)})
    header, reader = read_gguf_header(path), gguf.GGUFReader(path)
    expected = {t.name: (tuple(int(n) for n in t.shape[::-1]), t.tensor_type, t.data_offset) for t in reader.tensors}
    assert {name: (t.shape, t.type, t.start) for name, t in header.tensors.items()} == expected
    assert all(header.tensors[t.name].num_bytes == t.n_bytes for t in reader.tensors)
    scalars = {key: value for key, value in header.metadata.items() if not isinstance(value, tuple | None)}
    assert scalars == {key: reader.fields[key].contents() for key in scalars}
    assert header.metadata["tokenizer.ggml.tokens"] is None
    assert header.metadata["tokenizer.ggml.token_type"] == tuple([3] + [1] * (len(VOCABULARY) - 1))
    np.testing.assert_array_equal(read_gguf_vector(path, header.tensors["rope_freqs.weight"]), [0, 1, 2, 3])
    assert read_gguf_vector(path, header.tensors["blk.0.attn_q.weight"]) is None


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: b"", "empty"),
        (lambda data: b"GGML" + data[4:], "expected b'GGUF'"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "version is 50331648"),
        (lambda data: data[:8] + b"\xff" * 16 + data[24:], "not a GGUF file"),
        (lambda data: data[:24] + b"\xff" * 8 + data[32:], "ends within a string"),
        (lambda data: data[:600], "not a GGUF file"),
        (lambda data: data[:-100], "cut short"),
    ],
)
def test_damaged_files_end_in_one_message(damage: Any, says: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", build_llama())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelError, match=says):
        load(path)


def test_a_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes most of the time of loading one; transformers would do it for each thing that it reads."""
    parsed: list[Path] = []

    class Reader(gguf.GGUFReader):
        def __init__(self, path: Any, *options: Any) -> None:
            parsed.append(Path(path))
            super().__init__(path, *options)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    path = tmp_path / "model.gguf"
    write_gguf(path, build_llama())
    load(path)
    assert parsed == [path]
    assert gguf.GGUFReader is Reader
    load(path)  # what was parsed is not kept
    assert parsed == [path, path]
