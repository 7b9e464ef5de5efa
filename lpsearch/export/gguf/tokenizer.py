"""A Hugging Face tokenizer as the keys of a GGUF file.

llama.cpp has its own tokenizers: byte-level BPE (``gpt2``) with a pre-tokenizer that a file names, and the BPE of
SentencePiece (``llama``), which merges by the score of the result. Which one a tokenizer is, and which pre-tokenizer,
is read off its ``tokenizer.json``; one that llama.cpp would tokenise otherwise is refused, since its model would run
and be another one.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from lpsearch.errors import ModelError

__all__ = ["TokenizerKeys", "add_tokenizer_keys", "read_tokenizer"]

logger = logging.getLogger(__name__)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGITS = r"\p{N}"

_PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",  # likewise StarCoder's and Granite's
    ((_CONTRACTIONS + "|" + _WORD + r"\p{L}+|\p{N}" + _TAIL,), False): "qwen2",
    ((_CONTRACTIONS + "|" + _WORD + r"\p{L}+|\p{N}{1,3}" + _TAIL,), True): "llama-bpe",
    ((_CONTRACTIONS + "|" + _WORD + r"\p{L}+|\p{N}{1,3}" + _TAIL,), False): "dbrx",  # likewise Phi 4's
    (
        (f"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\\p{{N}}{_CASED_TAIL}",),
        True,
    ): "tekken",
    (
        (
            f"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\\p{{N}}{{1,3}}"
            f"{_CASED_TAIL}",
        ),
        False,
    ): "gpt-4o",
}
"""llama.cpp's names (``llama-vocab.cpp``) of the expressions that cut a text one after the other, and of whether a word
that is a token is taken without its merges."""

_PHI3 = re.compile("phi-?3", re.IGNORECASE)
_PHI3_TOKENS = ("<unk>", "<s>", "</s>", "<|endoftext|>")

_SPACE = "▁"
_NEVER = -1e9
"""Score of a token that no merge makes, below that of every other."""


@dataclass(frozen=True)
class TokenizerKeys:
    """What a GGUF file says of a tokenizer, under ``tokenizer.ggml``.

    Attributes:
        model: ``gpt2`` or ``llama``.
        pre: name of the pre-tokenizer.
        tokens: one for every row of the embedding.
        types: of the tokens.
        merges: pairs of tokens with a space between; none for ``llama``.
        scores: of the tokens; none for ``gpt2``.
        special_ids: by the name that ``gguf`` has for each: ``bos``, ``eos``, ``unk``, ``pad``.
        adds_bos: whether a text begins with the token ``bos``; likewise ``adds_eos`` at its end.
        adds_space: whether a space is put before a text; None for ``gpt2``.
        chat_template: Jinja, or several by name.
        strips_spaces: whether special tokens take the space after them, as Phi 3's do.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    special_ids: dict[str, int]
    adds_bos: bool
    adds_eos: bool
    adds_space: bool | None
    chat_template: str | list[Mapping[str, str]] | None
    strips_spaces: bool

    def fit_name(self, name: str) -> str:
        """Return the name of a model such that llama.cpp treats its special tokens right.

        llama.cpp lets special tokens take the space after them where the name has ``phi-3`` or ``phi3`` in it, and
        fails to load a model of such a name without the tokens of Phi 3.
        """
        is_named = _PHI3.search(name) is not None
        if not self.strips_spaces or not set(_PHI3_TOKENS) <= set(self.tokens):
            return _PHI3.sub("phi 3", name)
        return name if is_named else f"{name} (phi-3)"


def read_tokenizer(tokenizer: PreTrainedTokenizerBase, *, vocab_size: int) -> TokenizerKeys:
    """Read what a GGUF file says of a tokenizer.

    Args:
        tokenizer: of the model.
        vocab_size: rows of the embedding; those without a token get one that is never used.

    Raises:
        ModelError: if llama.cpp has no tokenizer like it, or it has more tokens than there are rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{type(tokenizer).__name__}: not a tokenizer with a tokenizer.json, which is what is converted"
        )
    document: dict[str, Any] = json.loads(backend.to_str())
    model = document["model"]
    if model.get("type") != "BPE":
        raise _refuse(f"it is {model.get('type')}, and byte-level BPE and SentencePiece's BPE are converted")
    ids: dict[str, int] = {**model["vocab"], **{token["content"]: token["id"] for token in document["added_tokens"]}}
    if max(ids.values(), default=0) >= vocab_size:
        raise ModelError(
            f"the tokenizer has a token with the id {max(ids.values())}, and the embedding {vocab_size} rows; give the "
            "model its own tokenizer"
        )
    is_sentencepiece = bool(model.get("byte_fallback"))
    if is_sentencepiece:
        pre, adds_space = "default", _check_spaces(document)
    else:
        pre, adds_space = _find_pre_tokenizer(document), None
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    for token, token_id in ids.items():
        tokens[token_id] = token
        types[token_id] = int(TokenType.NORMAL)
        if is_sentencepiece and len(token) == 6 and token.startswith("<0x"):
            types[token_id] = int(TokenType.BYTE)
    for added in document["added_tokens"]:
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if is_sentencepiece and model.get("unk_token") in ids:
        types[ids[model["unk_token"]]] = int(TokenType.UNKNOWN)
    found = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    special_ids = {name: token_id for name, token_id in found.items() if token_id is not None}
    encoded: list[int] = tokenizer("a")["input_ids"]
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    return TokenizerKeys(
        model="llama" if is_sentencepiece else "gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[] if is_sentencepiece else [" ".join(pair) for pair in pairs],
        scores=_score_tokens(tokens, pairs) if is_sentencepiece else [],
        special_ids=special_ids,
        adds_bos="bos" in special_ids and encoded[:1] == [special_ids["bos"]],
        adds_eos="eos" in special_ids and len(encoded) > 1 and encoded[-1:] == [special_ids["eos"]],
        adds_space=adds_space,
        chat_template=template,
        strips_spaces=any(added["special"] and added["rstrip"] for added in document["added_tokens"]),
    )


def add_tokenizer_keys(writer: GGUFWriter, keys: TokenizerKeys) -> None:
    """Add the keys of a tokenizer to a file."""
    writer.add_tokenizer_model(keys.model)
    writer.add_tokenizer_pre(keys.pre)
    writer.add_token_list(keys.tokens)
    writer.add_token_types(keys.types)
    if keys.merges:
        writer.add_token_merges(keys.merges)
    if keys.scores:
        writer.add_token_scores(keys.scores)
    add_id = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for name, token_id in keys.special_ids.items():
        add_id[name](token_id)
    writer.add_add_bos_token(keys.adds_bos)
    writer.add_add_eos_token(keys.adds_eos)
    if keys.adds_space is not None:
        writer.add_add_space_prefix(keys.adds_space)
    if keys.chat_template is not None:
        writer.add_chat_template(keys.chat_template)


def _score_tokens(tokens: list[str], pairs: list[tuple[str, ...]]) -> list[float]:
    """Return scores by which SentencePiece merges what the merges say, in their order.

    A merge is tried before another if its result has the higher score, so a token's is minus the place of the first
    merge that makes it. Tokens that are not merged (bytes, single characters) have 0.
    """
    places: dict[str, int] = {}
    for place, pair in enumerate(pairs):
        places.setdefault("".join(pair), place)
    return [
        -float(places[token]) if token in places else 0.0 if len(token.removeprefix(_SPACE)) <= 1 else _NEVER
        for token in tokens
    ]


def _check_spaces(document: Mapping[str, Any]) -> bool:
    """Return whether SentencePiece's BPE puts a space before a text; refuse what is not that.

    Raises:
        ModelError: if it normalises or cuts a text in another way.
    """
    normalisers = _list_parts(document.get("normalizer"), "normalizers")
    cutters = _list_parts(document.get("pre_tokenizer"), "pretokenizers")
    adds_space = False
    for part in normalisers:
        if part["type"] == "Prepend" and part["prepend"] == _SPACE:
            adds_space = True
        elif part["type"] != "Replace" or part["pattern"] != {"String": " "} or part["content"] != _SPACE:
            raise _refuse(f"it has the normaliser {part['type']}")
    for part in cutters:
        if part["type"] != "Metaspace" or part.get("split", True):
            raise _refuse(f"it has the pre-tokenizer {part['type']} before SentencePiece's BPE")
        scheme = part.get("prepend_scheme", "always")
        adds_space = scheme != "never"
        if adds_space:
            logger.warning(
                "llama.cpp puts a space before every text and after every special token, as SentencePiece does; this "
                "tokenizer does not before a text that begins with one%s. It is the same with any GGUF file of the "
                "base model",
                ", nor after special tokens" if scheme == "first" else "",
            )
    return adds_space


def _find_pre_tokenizer(document: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of a byte-level pre-tokenizer.

    Raises:
        ModelError: if it has none like it.
    """
    normalisers = [part["type"] for part in _list_parts(document.get("normalizer"), "normalizers")]
    if set(normalisers) - {"NFC"}:  # which llama.cpp leaves out: text is in that form but for rare exceptions
        raise _refuse(f"it has the normaliser {normalisers[0]}")
    expressions: list[str] = []
    is_byte_level = False
    for part in _list_parts(document.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] == "Split" and part["behavior"] in ("Isolated", "Removed") and "Regex" in part["pattern"]:
            expressions.append(part["pattern"]["Regex"])
        elif part["type"] == "Digits" and part["individual_digits"]:
            expressions.append(_DIGITS)
        elif part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            is_byte_level = True
            expressions += [_GPT2] if part["use_regex"] else []
        else:
            raise _refuse(f"it has the pre-tokenizer {part['type']}")
    name = _PRE_TOKENIZERS.get((tuple(expressions), bool(document["model"].get("ignore_merges"))))
    if name is None or not is_byte_level:
        raise _refuse(f"it cuts a text by {' and then '.join(expressions) or 'no expression'}")
    return name


def _list_parts(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """Return the parts of a normaliser or pre-tokenizer, those of a sequence one by one."""
    if part is None:
        return []
    return list(part[name]) if part["type"] == "Sequence" else [part]


def _refuse(reason: str) -> ModelError:
    return ModelError(
        f"the tokenizer is none that is known to be one of llama.cpp's: {reason}; give --model the base model as a "
        ".gguf file, whose tokenizer is copied"
    )
