"""Checks of tokenizers and of the baseline's loss."""

from __future__ import annotations

import math

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lpsearch.models import check_baseline_nll, check_tokenizer, needs_bos

TEXT = ["the quick brown fox and the people of the world because other water is under the small home " * 20]


def build_tokenizer(
    *, bos: bool = False, drop_merges: bool = False, lowercase: bool = False
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, whole or with one fault."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False),
    )
    if drop_merges:
        tokenizer.model = models.BPE(vocab=tokenizer.get_vocab(), merges=[])
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def test_a_right_tokenizer_passes() -> None:
    assert check_tokenizer(build_tokenizer(), model_type="llama", vocab_size=1000) == ()
    assert check_tokenizer(build_tokenizer(bos=True), model_type="gemma3_text", vocab_size=1000) == ()


def test_wrong_merges_are_seen() -> None:
    (finding,) = check_tokenizer(build_tokenizer(drop_merges=True), model_type="llama", vocab_size=1000)
    assert "merges were read wrongly" in finding


def test_lost_text_is_seen() -> None:
    (finding,) = check_tokenizer(build_tokenizer(lowercase=True), model_type="llama", vocab_size=1000)
    assert "encoding and decoding" in finding


def test_tokens_beyond_the_embedding_are_seen() -> None:
    (finding,) = check_tokenizer(build_tokenizer(), model_type="llama", vocab_size=100)
    assert "the model's vocabulary has 100" in finding


def test_a_missing_bos_is_seen_where_the_family_needs_it() -> None:
    (finding,) = check_tokenizer(build_tokenizer(), model_type="gemma2", vocab_size=1000)
    assert "beginning-of-sequence" in finding


def test_needs_bos() -> None:
    assert needs_bos(build_tokenizer(bos=True))
    assert not needs_bos(build_tokenizer())


def test_an_implausible_baseline_has_all_its_likely_reasons_named() -> None:
    warning = str(check_baseline_nll(4.5, num_tokens=1000, num_bytes=4000))
    for reason in ("tokenizer", "config.json", "not used", "rope_parameters", "damaged", "quantised", "language"):
        assert reason in warning


@pytest.mark.parametrize(("nll", "num_bytes", "says"), [(2.76, 4000, None), (4.5, 4000, "tokenizer may be wrong")])
def test_baseline_in_bits_per_byte(nll: float, num_bytes: int, says: str | None) -> None:
    warning = check_baseline_nll(nll, num_tokens=1000, num_bytes=num_bytes)
    assert warning is None if says is None else warning is not None and says in warning


def test_baseline_that_is_no_number_or_no_text() -> None:
    assert "weights or the dtype" in str(check_baseline_nll(math.nan, num_tokens=10, num_bytes=40))
    assert "repeat themselves" in str(check_baseline_nll(0.01, num_tokens=1000, num_bytes=4000))
