"""Fixtures that several test packages use: a tiny model directory and a text file, both made on the spot."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs more CUDA devices than there are, with the reason."""
    needed = {"gpu": 1, "multi_gpu": 2}
    marked = [(item, count) for item in items for name, count in needed.items() if item.get_closest_marker(name)]
    if not marked:
        return
    import torch

    present = torch.cuda.device_count()
    for item, count in marked:
        if present < count:
            item.add_marker(pytest.mark.skip(reason=f"needs {count} CUDA devices, {present} present"))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a saved six-layer Llama with a byte-level tokenizer: everything a command needs of a model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.tiny_models import build_tiny_model

    directory = tmp_path_factory.mktemp("tiny-llama")
    model = build_tiny_model("llama", vocab_size=512)
    model.save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0} | {symbol: i + 1 for i, symbol in enumerate(alphabet)}
    assert len(vocabulary) <= model.config.vocab_size
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>").save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a text of about 20,000 characters without repetition."""
    path = tmp_path_factory.mktemp("text") / "squares.txt"
    path.write_text(" ".join(f"The square of {i} is {i * i}." for i in range(800)), encoding="utf-8")
    return path
