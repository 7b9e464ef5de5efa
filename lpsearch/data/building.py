"""Building windows: from a text, or sampled from the model itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lpsearch.config import Split
from lpsearch.data.texts import is_same_text, replace_surrogates, resolve_text, undo_wikitext_marks
from lpsearch.data.windows import Windows
from lpsearch.errors import DataError, ModelError
from lpsearch.kinds import TextKind
from lpsearch.models import needs_bos
from lpsearch.wording import name_count

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["build_mixed_windows", "build_text_windows", "build_windows", "check_seq_len"]

logger = logging.getLogger(__name__)

_CHARACTERS_PER_TOKEN = 6  # of the first guess; English text has about 4, and too low a guess only tokenises again
_CUT_MARGIN_TOKENS = 32  # tokens at the end of a cut text are not those of the whole text


def build_windows(
    spec: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    num_windows: int,
    seq_len: int,
    split: Split = "proxy",
    seed: int = 0,
    model: PreTrainedModel | None = None,
    after: Windows | Sequence[Windows] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Windows:
    """Build the windows that a specification names.

    Windows of a text are contiguous and do not overlap. Where the tokenizer puts a BOS token before a text by itself
    (Gemma, Llama), every window is BOS and ``seq_len - 1`` tokens of text, since such models are lost without it;
    otherwise it is ``seq_len`` tokens of text. Marks of WikiText are undone wherever they are found.

    Args:
        spec: ``wikitext2``, ``self``, a local file or a hub dataset; see :func:`lpsearch.data.texts.resolve_text`.
        tokenizer: the model's tokenizer.
        num_windows: number of windows.
        seq_len: tokens in a window.
        split: ``proxy`` to search on, ``heldout`` to report on; of ``wikitext2`` they read the
            validation and the test split, of ``self`` they have different seeds.
        seed: seed of ``self``.
        model: the unmodified model; needed for ``self``, and otherwise used to check lengths and tokens.
        after: windows that must not be overlapped, or several: if they are of the same text, however it is named, the
            new ones follow them.
        on_progress: called with steps done and steps in all while ``self`` is sampled.

    Raises:
        DataError: for impossible sizes, a missing file, or a text that is empty or too short.
        ModelError: for ``self`` without a model, or a tokenizer that is not the model's.
        SourceError: for a dataset that cannot be fetched now.
    """
    _check_sizes(num_windows, seq_len, model)
    if spec == "self":
        if model is None:
            raise ModelError("--data self samples its windows from the model, and no model was given")
        from lpsearch.data.sampling import load_or_sample_windows  # which needs torch

        return load_or_sample_windows(
            model=model,
            tokenizer=tokenizer,
            num_windows=num_windows,
            seq_len=seq_len,
            split=split,
            seed=seed,
            on_progress=on_progress,
        )
    source = resolve_text(spec, split=split)
    used = [part for windows in _list_windows(after) for part in windows.split_kinds()]
    stops = [int(p.provenance["stop_token"]) for p in used if is_same_text(p.spec, source.spec, split=split)]
    first = max(stops, default=0)
    prefix = [tokenizer.bos_token_id] if needs_bos(tokenizer) else []
    stop = first + num_windows * (seq_len - len(prefix))
    tokens = _tokenize_start(source.read_pieces(tokenizer), tokenizer=tokenizer, num_tokens=stop, spec=source.spec)
    if len(tokens) < stop:
        skipped = f", {first} of them before these windows" if first else ""
        raise DataError(
            f"{source.spec} is too short: {num_windows} windows of {seq_len} tokens need {stop} tokens{skipped}, the "
            f"text has {len(tokens)}; lower --windows or --seq-len, or give more text"
        )
    body = np.asarray(tokens[first:stop], dtype=np.int32).reshape(num_windows, seq_len - len(prefix))
    heads = np.tile(np.asarray(prefix, dtype=np.int32), (num_windows, 1))
    windows = Windows(
        np.concatenate([heads, body], axis=1), source.spec, {"split": split, "first_token": first, "stop_token": stop}
    )
    _check_vocabulary(windows, model)
    return windows


def build_mixed_windows(
    kinds: Sequence[TextKind],
    *,
    tokenizer: PreTrainedTokenizerBase,
    num_windows: int,
    seq_len: int,
    split: Split = "proxy",
    seed: int = 0,
    model: PreTrainedModel | None = None,
    after: Windows | Sequence[Windows] | None = None,
    built: Mapping[str, Windows] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Windows:
    """Build windows of several kinds of text, interleaved; see :func:`build_windows`.

    Args:
        kinds: specifications and weights, at least one; one kind gives what :func:`build_windows` gives.
        num_windows: number of windows of each kind.
        tokenizer: the model's tokenizer.
        seq_len: tokens in a window.
        split: ``proxy`` to search on, ``heldout`` to report on.
        seed: seed of ``self``.
        model: the unmodified model.
        after: windows that must not be overlapped, or several.
        built: what :func:`build_text_windows` built of these kinds before the model was loaded.
        on_progress: called with steps done and steps in all while ``self`` is sampled.

    Raises:
        DataError: as :func:`build_windows`.
        ModelError: as :func:`build_windows`.
        SourceError: as :func:`build_windows`.
    """
    built = built or {}
    for windows in built.values():
        _check_vocabulary(windows, model)
    parts = [
        built[kind.spec]
        if kind.spec in built
        else build_windows(
            kind.spec,
            tokenizer=tokenizer,
            num_windows=num_windows,
            seq_len=seq_len,
            split=split,
            seed=seed,
            model=model,
            after=after,
            on_progress=on_progress,
        )
        for kind in kinds
    ]
    return Windows.interleave(parts, [kind.weight for kind in kinds])


def build_text_windows(
    kinds: Sequence[TextKind],
    *,
    tokenizer: PreTrainedTokenizerBase,
    num_windows: int,
    seq_len: int,
    split: Split = "proxy",
    after: Windows | Sequence[Windows] | None = None,
) -> dict[str, Windows]:
    """Build those windows of :func:`build_mixed_windows` that need no model, by specification: all but ``self``.

    The tokenizer is there long before the weights, and tells whether a text is long enough.

    Args:
        kinds: specifications and weights.
        num_windows: number of windows of each kind.
        tokenizer: the model's tokenizer.
        seq_len: tokens in a window.
        split: ``proxy`` to search on, ``heldout`` to report on.
        after: windows that must not be overlapped, or several.

    Raises:
        DataError: as :func:`build_windows`.
        SourceError: as :func:`build_windows`.
    """
    return {
        kind.spec: build_windows(
            kind.spec, tokenizer=tokenizer, num_windows=num_windows, seq_len=seq_len, split=split, after=after
        )
        for kind in kinds
        if kind.spec != "self"
    }


def _list_windows(windows: Windows | Sequence[Windows] | None) -> Sequence[Windows]:
    if windows is None:
        return ()
    return (windows,) if isinstance(windows, Windows) else windows


def _check_sizes(num_windows: int, seq_len: int, model: PreTrainedModel | None) -> None:
    if num_windows < 1:
        raise DataError(f"--windows is {num_windows}; at least 1 is needed")
    if seq_len < 2:
        raise DataError(f"--seq-len is {seq_len}; at least 2 is needed, since the first token is not predicted")
    if model is not None:
        check_seq_len(seq_len, model.config)


def check_seq_len(seq_len: int, config: PretrainedConfig) -> None:
    """Refuse windows that are longer than a model reads; its configuration says how much that is.

    Raises:
        DataError: if they are.
    """
    from lpsearch.models import find_max_positions  # which needs torch

    longest = find_max_positions(config)
    if longest is not None and seq_len > longest:
        raise DataError(f"--seq-len is {seq_len}, but the model reads at most {longest} tokens; lower --seq-len")


def _check_vocabulary(windows: Windows, model: PreTrainedModel | None) -> None:
    if model is None:
        return
    embeddings: Any = model.get_input_embeddings()
    size, largest = embeddings.weight.shape[0], int(windows.input_ids.max())
    if largest >= size:
        raise ModelError(
            f"the tokenizer gives token {largest}, but the model embeds only {size}; they do not belong together"
        )


def _tokenize_start(
    pieces: Iterator[str], *, tokenizer: PreTrainedTokenizerBase, num_tokens: int, spec: str
) -> list[int]:
    """Return the first tokens of a text, fewer if it ends before, reading only as much of it as needed.

    A growing start of the text is tokenised as one string, as the whole text would be; the tokens at its cut end are
    not used, so that the result does not depend on where it was cut.
    """
    text = ""
    num_characters = (num_tokens + _CUT_MARGIN_TOKENS) * _CHARACTERS_PER_TOKEN
    ended = False
    while True:
        while not ended and len(text) <= num_characters:
            piece = next(pieces, None)
            ended = piece is None
            text += piece or ""
        whole = ended and len(text) <= num_characters
        start, num_replaced = replace_surrogates(text[:num_characters])
        plain = undo_wikitext_marks(start)
        tokens: list[int] = tokenizer(plain, add_special_tokens=False, verbose=False).input_ids
        if whole or len(tokens) >= num_tokens + _CUT_MARGIN_TOKENS:
            break
        num_characters *= 2
    if not text.strip():
        raise DataError(f"{spec} holds no text; give a file or dataset that does")
    if num_replaced:
        replaced = name_count(num_replaced, "lone surrogate")
        logger.warning("%s: replaced %s (halves of characters) by U+FFFD", spec, replaced)
    if plain != start:
        logger.info("%s: undid the word-level marks of WikiText (@-@, @,@, @.@, <unk>)", spec)
    return tokens[:num_tokens]
