"""The sampled windows that come with the package are what the packaged models say of themselves."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
import torch

from lpsearch.config import load_preset
from lpsearch.data import Windows, build_windows
from lpsearch.data.shipped import ShippedWindows, find_shipped, list_shipped, name_sampled
from lpsearch.models import LoadedModel, fingerprint_parts, list_aliases, load_model, resolve_source

NUM_SAMPLED_AGAIN = 12
"""Tokens of each window that are drawn again; one in many thousands differs where a machine rounds in another way."""


def _read(shipped: ShippedWindows) -> np.ndarray:
    file = find_shipped(shipped.file)
    assert file is not None
    return np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)


def test_every_packaged_model_has_the_windows_of_its_preset() -> None:
    packaged = [alias.name for alias in list_aliases() if alias.kind == "package"]
    wanted = {(name, split) for name in packaged for split in ("proxy", "heldout")}
    assert {(shipped.model, shipped.split) for shipped in list_shipped()} == wanted
    for shipped in list_shipped():
        preset = load_preset(shipped.model)
        assert (preset["data"], preset["windows"], preset["seq_len"]) == ("self", shipped.windows, shipped.seq_len)
        assert shipped.seed == 0  # that of a search whose seed is not named


@pytest.mark.parametrize("shipped", list_shipped(), ids=lambda shipped: f"{shipped.model} {shipped.split}")
def test_the_file_is_what_the_index_says(shipped: ShippedWindows) -> None:
    tokens = _read(shipped)
    assert (tokens.dtype, tokens.shape) == (np.int32, (shipped.windows, shipped.seq_len))
    assert Windows(tokens, "self").sha256 == shipped.sha256
    assert shipped.file == name_sampled(
        split=shipped.split,
        seed=shipped.seed,
        parts=shipped.parts,
        num_windows=shipped.windows,
        seq_len=shipped.seq_len,
    )


def test_other_files_do_not_come_along() -> None:
    assert find_shipped("self-000000000000000000000000.npy") is None


@pytest.fixture(scope="module", params=sorted({shipped.model for shipped in list_shipped()}))
def packaged(request: pytest.FixtureRequest) -> tuple[str, LoadedModel]:
    return request.param, load_model(resolve_source(request.param), device="cpu", dtype=torch.float32)


@pytest.mark.packaged
@pytest.mark.slow
def test_a_search_takes_them_and_the_model_draws_the_same_tokens(
    packaged: tuple[str, LoadedModel], tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference draws from whole forwards, without a cache of keys and values, and counts what it skips."""
    monkeypatch.setenv("LPSEARCH_CACHE", str(tmp_path))  # with nothing in it
    name, loaded = packaged
    for shipped in (shipped for shipped in list_shipped() if shipped.model == name):
        assert fingerprint_parts(loaded.model, loaded.tokenizer) == shipped.parts, "run studies/packaged_windows.py"
        expected = _read(shipped)
        taken = build_windows(
            "self",
            tokenizer=loaded.tokenizer,
            num_windows=shipped.windows,
            seq_len=shipped.seq_len,
            split=shipped.split,
            seed=shipped.seed,
            model=loaded.model,
        )
        np.testing.assert_array_equal(taken.input_ids, expected)

        digest = hashlib.sha256(f"{shipped.split}:{shipped.seed}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        uniforms = torch.rand((shipped.windows, shipped.seq_len - 1), generator=generator, dtype=torch.float64)
        tokens = torch.from_numpy(expected[:, :NUM_SAMPLED_AGAIN]).long()
        with torch.inference_mode():
            logits = loaded.model(input_ids=tokens, use_cache=False).logits.double()
        cumulative = logits.softmax(-1).cumsum(-1)  # (windows, tokens, vocab)
        drawn = (cumulative <= uniforms[:, :NUM_SAMPLED_AGAIN, None] * cumulative[..., -1:]).sum(-1)
        agree = drawn[:, :-1].numpy() == expected[:, 1:NUM_SAMPLED_AGAIN]
        assert agree.all(), f"{(~agree).sum()} of {agree.size} tokens are others"
