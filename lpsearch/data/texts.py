"""Where evaluation text comes from: a specification names a local file or a hub dataset.

A text is an iterator of pieces whose concatenation is the text, so that a large corpus is read only as far as needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lpsearch.config import Split
from lpsearch.data.columns import join_documents
from lpsearch.data.files import KNOWN_SUFFIXES, is_plain_text, read_values
from lpsearch.data.hub import WIKITEXT_ID, check_hub_reachable, read_hub_values
from lpsearch.errors import DataError
from lpsearch.kinds import TextKind, parse_kinds, write_kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "TextSource",
    "check_text_kinds",
    "check_text_source",
    "is_same_text",
    "name_text",
    "name_texts",
    "replace_surrogates",
    "resolve_text",
    "undo_wikitext_marks",
]

_WIKITEXT_CONFIG = "wikitext-2-raw-v1"
_WIKITEXT_SPLITS: dict[Split, str] = {"proxy": "validation", "heldout": "test"}
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class TextSource:
    """One text, named and not yet read.

    Attributes:
        spec: its name in full, with what the user left out, e.g. ``wikitext2:validation``.
        kind: ``file`` or ``hub``.
        location: path of the file, or id of the dataset.
        column: column or field that holds the text; None finds it.
        config: configuration of a hub dataset.
        hub_split: split of a hub dataset; None takes validation, test or train, the first that exists.
    """

    spec: str
    kind: Literal["file", "hub"]
    location: str
    column: str | None = None
    config: str | None = None
    hub_split: str | None = None

    def read_pieces(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[str]:
        """Yield the text piece by piece.

        Args:
            tokenizer: the model's tokenizer, whose chat template writes chats; texts need none.

        Raises:
            DataError: for a file or dataset that is missing, unreadable or has no text, or a chat without a template.
            SourceError: for a dataset that cannot be fetched now.
        """
        values = self._read_values()
        if self.kind == "file" and is_plain_text(Path(self.location)):
            return values
        return join_documents(values, tokenizer=tokenizer, where=self.spec)

    def check(self) -> None:
        """Check soon that a file has a text column and a text in it, or that the hub has the dataset.

        Raises:
            DataError: if not.
            SourceError: for a dataset that is gated or out of reach.
        """
        if self.kind == "file":
            if not any(not isinstance(value, str) or value.strip() for value in self._read_values()):
                raise DataError(f"{self.spec} holds no text; give a file or dataset that does")
            return
        check_hub_reachable(self.location)

    def _read_values(self) -> Iterator[Any]:
        if self.kind == "file":
            return read_values(Path(self.location), self.column)
        return read_hub_values(
            self.location, config=self.config, split=self.hub_split, column=self.column, spec=self.spec
        )


def resolve_text(spec: str, *, split: Split) -> TextSource:
    """Say which text a specification names; reads nothing and needs no network.

    Args:
        spec: ``wikitext2``, a path ``FILE`` or ``FILE:COLUMN``, or a hub dataset ``ID[:CONFIG[:SPLIT[:COLUMN]]]`` (an
            empty part is one left out). A file that exists is taken before a dataset, and a colon that is part of its
            name splits nothing.
        split: for ``wikitext2``, the proxy reads the validation split and the held-out check the test split.

    Raises:
        DataError: for a path to nothing, to a directory, or a specification with too many parts.
    """
    if spec in {"wikitext2", "wikitext2:validation", "wikitext2:test"}:
        name = spec.partition(":")[2] or _WIKITEXT_SPLITS[split]
        return TextSource(f"wikitext2:{name}", "hub", WIKITEXT_ID, "text", _WIKITEXT_CONFIG, name)
    try:
        file = _find_file(spec)
    except (OSError, RuntimeError) as error:  # e.g. a name that is too long, or ~ of an unknown user
        raise DataError(f"{spec}: no such file: {error}") from None
    if file is not None:
        return file
    identifier, *options = spec.split(":")
    if not identifier or len(options) > 3:
        raise DataError(f"{spec!r} is not a dataset; write ID, ID:CONFIG, ID:CONFIG:SPLIT or ID:CONFIG:SPLIT:COLUMN")
    config, hub_split, column = ([option or None for option in options] + [None] * 3)[:3]
    return TextSource(spec, "hub", identifier, column, config, hub_split)


def _find_file(spec: str) -> TextSource | None:
    """Return the file that a specification names, or None for a dataset.

    Raises:
        DataError: for a path to nothing, or to something else than a file.
    """
    parts = spec.split(":")
    # The longest path first: a colon may belong to the name.
    splits = [(":".join(parts[:count]), ":".join(parts[count:])) for count in range(len(parts), 0, -1)]
    for name, column in splits:
        path = Path(name).expanduser()
        if path.is_file():
            return TextSource(spec, "file", str(path), column or None)
    whole = Path(spec).expanduser()
    if whole.exists():
        kind = "a directory" if whole.is_dir() else "not a file that can be read twice"
        raise DataError(f"{whole} is {kind}; name one file of text, jsonl, json, csv, tsv or parquet")
    missing = [name for name, _ in splits if Path(name).suffix.lower() in KNOWN_SUFFIXES]
    if missing or spec.startswith(("/", ".", "~")):
        raise DataError(
            f"{missing[-1] if missing else spec}: no such file; --data takes wikitext2, self, a hub dataset id or an "
            "existing file"
        )
    return None


def name_text(spec: str) -> str:
    """Return one spelling of a specification: that of a file has its whole path, and any other is left as it is."""
    try:
        source = None if spec == "self" else resolve_text(spec, split="proxy")
    except DataError:  # it is not there any more
        return spec
    if source is None or source.kind == "hub":
        return spec
    path = str(Path(source.location).resolve())
    return path if source.column is None else f"{path}:{source.column}"


def name_texts(texts: str | Sequence[str], *, in_order: bool = True) -> str | list[str]:
    """Return one spelling of specifications with their weights; of a single one just that, as it needs no weight.

    Args:
        texts: each ``SPEC`` or ``SPEC@WEIGHT``; a string is a single specification without a weight, however it looks.
        in_order: keep order and weights as they are; False sorts them, and divides the weights by the least, so that
            equal mixtures are equal.
    """
    if isinstance(texts, str):
        return name_text(texts)
    kinds = [TextKind(name_text(kind.spec), kind.weight) for kind in parse_kinds(texts)]
    if len(kinds) == 1:
        return kinds[0].spec
    if not in_order:
        least = min(kind.weight for kind in kinds)
        kinds = sorted(
            (TextKind(kind.spec, float(f"{kind.weight / least:.9g}")) for kind in kinds), key=lambda kind: kind.spec
        )
    return [write_kind(kind) for kind in kinds]


def is_same_text(first: str, second: str, *, split: Split) -> bool:
    """Say whether two specifications may name one text; what only one of them says may be what the other finds."""
    if "self" in (first, second):
        return False
    sources = [resolve_text(name_text(spec), split=split) for spec in (first, second)]
    (where, *options), (other, *others) = [(s.location, s.config, s.hub_split, s.column) for s in sources]
    return where == other and all(a == b or None in (a, b) for a, b in zip(options, others, strict=True))


def check_text_source(spec: str, *, split: Split) -> None:
    """Check soon that a specification names a text that is there; see :meth:`TextSource.check`.

    Raises:
        DataError: as :func:`resolve_text`, for a file without text, or for a dataset that does not exist.
        SourceError: for a dataset that is gated or out of reach.
    """
    if spec != "self":
        resolve_text(spec, split=split).check()


def check_text_kinds(texts: Sequence[str], *, split: Split) -> None:
    """Check soon that specifications with or without a weight name different texts that are there.

    Raises:
        DataError: as :func:`check_text_source`, for a weight that is not positive, or a text that is named twice.
        SourceError: for a dataset that is gated or out of reach.
    """
    kinds = parse_kinds(texts)
    for kind in kinds:
        check_text_source(kind.spec, split=split)
    names = [name_text(kind.spec) for kind in kinds]
    for kind, name in zip(kinds, names, strict=True):
        if names.count(name) > 1:
            raise DataError(f"{kind.spec} is named {names.count(name)} times; name it once, with a weight: {name}@2")


def undo_wikitext_marks(text: str) -> str:
    """Turn word-level WikiText back into plain text.

    WikiText writes hyphens, thousands separators and decimal points as `` @-@ ``, `` @,@ `` and `` @.@ ``, and its
    word-level form has ``<unk>`` for rare words, which a subword tokenizer may take for a special token; it becomes the
    plain word ``unk``. Text without any of the first three marks is returned as it is.
    """
    if not any(mark in text for mark in (" @-@ ", " @,@ ", " @.@ ")):
        return text
    return text.replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", ".").replace("<unk>", "unk")


def replace_surrogates(text: str) -> tuple[str, int]:
    """Replace each lone surrogate by U+FFFD, and return how many there were.

    Half of a surrogate pair is no character; a text that was cut inside one, e.g. within an emoji, holds it, and
    tokenizers refuse it.
    """
    return _SURROGATE.subn("\ufffd", text)
