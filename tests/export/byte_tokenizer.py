"""The smallest tokenizer that transformers loads from a model directory."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

__all__ = ["write_byte_tokenizer"]


def write_byte_tokenizer(directory: Path) -> None:
    """Write it into a directory."""
    tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0, "a": 1, "b": 2}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(directory)
