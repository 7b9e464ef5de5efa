"""Repaired weights that anybody may have written: read, or refused with a message, and the model is left as it was."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from lpsearch.errors import LpsearchError
from lpsearch.plan import load_plan
from lpsearch.recovery import read_recovery
from tests.recovery.test_directory import write_refit
from tests.tiny_models import build_tiny_model

_DTYPES = ("F32", "F64", "F16", "BF16", "I64", "I8", "U8", "BOOL", "C64", "F8_E4M3", "F4", "NO", "", None, 3)
_NUMBERS = (-1, 0, 1, 31, 32, 10**6, 2**40, 2**63, 2**64, 1.5, None, "2", True)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build_tiny_model("llama")


@pytest.fixture(scope="module")
def written(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hostile") / "recovered"
    write_refit(model, directory)
    return directory


def split_file(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header of a safetensors file and what follows it."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@st.composite
def hostile_files(draw: st.DrawFn, content: bytes) -> bytes:
    """Return a safetensors file whose header says something else, or whose bytes were cut, doubled or overwritten."""
    if draw(st.booleans()):
        start = draw(st.integers(0, len(content)) | st.integers(0, 1500))
        stop = draw(st.integers(start, len(content)) | st.integers(start, start + 9))
        return content[:start] + draw(st.binary(max_size=9)) + content[stop:]
    header, data = split_file(content)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(header)))
        entry = header[name]
        if name == "__metadata__" or not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            header[name] = draw(st.sampled_from(({}, [], None, {"format": 3}, {"dtype": "F32"})))
            continue
        change = draw(st.sampled_from(("dtype", "shape", "data_offsets", "name", "remove", "flatten")))
        if change == "dtype":
            entry["dtype"] = draw(st.sampled_from(_DTYPES))
        elif change == "flatten":
            entry["shape"] = [entry["shape"][0] * entry["shape"][-1]] if len(entry["shape"]) == 2 else []
        elif change in ("shape", "data_offsets"):
            entry[change] = draw(st.lists(st.sampled_from(_NUMBERS), max_size=4))
        elif change == "name":
            header[
                draw(st.sampled_from(("layers.0", "", "../x", "layers.99.mlp.down_proj.weight", "lm_head.weight")))
            ] = header.pop(name)
        else:
            del header[name]
        if not header:
            break
    text = json.dumps(header).encode()
    return struct.pack("<Q", draw(st.just(len(text)) | st.sampled_from((0, 1, 2**63, 2**64 - 1)))) + text + data


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_hostile_weights(model: PreTrainedModel, written: Path, data: st.DataObject) -> None:
    plan, file = load_plan(written), written / "recovered.safetensors"
    whole = file.read_bytes()
    before = [parameter.data.clone() for parameter in model.parameters()]
    file.write_bytes(data.draw(hostile_files(whole)))
    message, weights = "", {}
    try:
        weights = read_recovery(model, plan, written)
    except LpsearchError as error:
        message = str(error)
    finally:
        file.write_bytes(whole)
    assert len(message) < 2000
    assert not message or str(written) in message
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert all(tensor.shape == shapes[name] for name, tensor in weights.items())
    assert all(torch.equal(kept, now) for kept, now in zip(before, model.parameters(), strict=True))
