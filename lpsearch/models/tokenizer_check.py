"""Checks that a tokenizer, and the loss that comes of it, look right.

A tokenizer that was converted wrongly still encodes and decodes: transformers 5.17 reads the merges of a Gemma GGUF
wrongly, splits common words that are in the vocabulary (" brown" into three tokens), drops the beginning-of-sequence
token, and the model is silently 1.5 nats per token worse. The checks here see that.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_baseline_nll", "check_tokenizer", "needs_bos"]

_PROBE = "The quick brown fox jumps over 13 lazy dogs.\n\n  It's 3:45 pm; naïve café, 東京 \U0001f642\tx = f(a, b)\n"
_COMMON_WORDS = re.findall(
    r"\w+",
    "the of and to in for is on that by this with you it not or be are from at as your all have new more an was we "
    "will home can about other over quick brown jump under water people because world great three small large",
)
_SPACE_MARKS = ("▁", "Ġ")
_BOS_FAMILIES = ("gemma",)

# Gemma 3 270M and SmolLM2-135M need 0.9 to 1.1 bits per byte of English prose, and 1.8 of terse technical notes. With
# the tokenizer of the module's docstring Gemma needs 1.6 to 3.2 and 4.1.
_HIGHEST_BITS_PER_BYTE = 1.6
_LOWEST_BITS_PER_BYTE = 0.05


def needs_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether the tokenizer itself puts a beginning-of-sequence token first, so that windows must begin with it.

    Llama, Mistral and Gemma do; SmolLM2 and Qwen do not.
    """
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return tokenizer.bos_token_id is not None and len(ids) > 1 and ids[0] == tokenizer.bos_token_id


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, *, model_type: str, vocab_size: int) -> tuple[str, ...]:
    """Check a tokenizer against the model it came with.

    Args:
        tokenizer: a Hugging Face tokenizer.
        model_type: the model's ``config.model_type``.
        vocab_size: rows of the model's embedding.

    Returns:
        What looks wrong, one sentence a finding; empty if nothing does.
    """
    findings = []
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    decoded = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    if decoded.strip() != _PROBE.strip():
        findings.append(f"encoding and decoding {_PROBE!r} gives {decoded!r}")
    if ids and max(ids) >= vocab_size:
        findings.append(f"it makes token {max(ids)}, but the model's vocabulary has {vocab_size}")
    split = _find_split_words(tokenizer)
    if split:
        findings.append(
            f"it splits {len(split)} of {len(_COMMON_WORDS)} common words that its vocabulary holds whole, e.g. "
            f"{split[0]!r}: its merges were read wrongly"
        )
    if model_type.startswith(_BOS_FAMILIES) and not needs_bos(tokenizer):
        findings.append(f"{model_type} models need a beginning-of-sequence token, which it does not add")
    return tuple(findings)


def check_baseline_nll(nll_nats_per_token: float, *, num_tokens: int, num_bytes: int) -> str | None:
    """Check that the loss of an unmodified model is plausible for text.

    Losses per token depend on the tokenizer; per byte they are comparable: ``nll * tokens / (bytes * ln 2)`` bits.

    Args:
        nll_nats_per_token: mean negative log-likelihood of the unmodified model.
        num_tokens: tokens that it is the mean of.
        num_bytes: UTF-8 bytes of the text of these tokens.

    Returns:
        What looks wrong, or None.
    """
    if not math.isfinite(nll_nats_per_token):
        return (
            f"the unmodified model's loss is {nll_nats_per_token}: the weights or the dtype do not suit each other "
            "(--dtype float32 would show), or the weights themselves are not finite"
        )
    if num_bytes == 0:
        return "the windows hold special tokens only, no text; give other data"
    bits_per_byte = nll_nats_per_token * num_tokens / (num_bytes * math.log(2))
    if bits_per_byte > _HIGHEST_BITS_PER_BYTE:
        return (
            f"the unmodified model needs {bits_per_byte:.2f} bits per byte ({nll_nats_per_token:.2f} nats per token), "
            "which is much for text that it should know. The tokenizer may be wrong, or another model's (another "
            "transformers version, or the model's own directory instead of a GGUF file, would show). config.json may "
            "be another model's (weights that are not used are warned of; wrong rope_parameters or a wrong norm "
            "epsilon show only here). The weights may be damaged, untrained, or coarsely quantised. Or the data are in "
            "a form or language that the model was not trained on"
        )
    if bits_per_byte < _LOWEST_BITS_PER_BYTE:
        return (
            f"the unmodified model needs only {bits_per_byte:.3f} bits per byte: the data repeat themselves or are a "
            "part of what it has memorised, and say little about a plan"
        )
    return None


def _find_split_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the common words that the vocabulary holds whole, with the space before them, and that are split."""
    vocabulary = tokenizer.get_vocab()
    split = []
    for word in _COMMON_WORDS:
        whole = {vocabulary[mark + word] for mark in _SPACE_MARKS if mark + word in vocabulary}
        # A word before it, so that the space belongs to this one whatever the tokenizer does at the beginning.
        if whole and not whole.intersection(tokenizer(f"a {word}", add_special_tokens=False)["input_ids"]):
            split.append(word)
    return split
