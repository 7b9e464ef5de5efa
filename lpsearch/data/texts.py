"""Where evaluation text comes from: local files and hub datasets, read piece by piece.

A text is an iterator of pieces whose concatenation is the text, so that a large corpus is read only as far as needed.
Rows of a table are separate documents, put together with a blank line between them, which is also how perplexities
on WikiText-2 are usually published.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lpsearch.config import Split
from lpsearch.errors import DataError, SourceError

__all__ = ["TextSource", "check_text_source", "resolve_text", "undo_wikitext_marks"]

_TEXT_SUFFIXES = frozenset({".jsonl", ".json", ".parquet", ".txt"})
_READ_CHARACTERS = 1 << 16
_ROWS_PER_BATCH = 256
_HUB_PROBE_TIMEOUT_S = 5
_DOCUMENT_SEPARATOR = "\n\n"
_WIKITEXT_ID = "Salesforce/wikitext"
_WIKITEXT_CONFIG = "wikitext-2-raw-v1"
_WIKITEXT_SPLITS: dict[Split, str] = {"proxy": "validation", "heldout": "test"}


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

    def read_pieces(self) -> Iterator[str]:
        """Yield the text piece by piece.

        Raises:
            DataError: for a file or dataset that is missing, unreadable or has no text.
            SourceError: for a dataset that cannot be fetched now.
        """
        return _read_file(Path(self.location), self.column) if self.kind == "file" else _read_hub(self)


def resolve_text(spec: str, *, split: Split) -> TextSource:
    """Say which text a specification names; reads nothing and needs no network.

    Args:
        spec: ``wikitext2``, a path ``FILE`` or ``FILE:COLUMN``, or a hub dataset ``ID[:CONFIG[:SPLIT[:COLUMN]]]`` (an
            empty part is one left out).
        split: for ``wikitext2``, the proxy reads the validation split and the held-out check the test split.

    Raises:
        DataError: for a path to nothing, to a directory, or a specification with too many parts.
    """
    if spec in {"wikitext2", "wikitext2:validation", "wikitext2:test"}:
        name = spec.partition(":")[2] or _WIKITEXT_SPLITS[split]
        return TextSource(f"wikitext2:{name}", "hub", _WIKITEXT_ID, "text", _WIKITEXT_CONFIG, name)
    path, column = _split_file_spec(spec)
    if path.is_dir():
        raise DataError(f"{path} is a directory; name one .txt, .jsonl, .json or .parquet file")
    if path.is_file():
        return TextSource(spec, "file", str(path), column)
    if path.suffix in _TEXT_SUFFIXES or spec.startswith(("/", ".", "~")):
        raise DataError(f"{path}: no such file; --data takes wikitext2, self, a hub dataset id or an existing file")
    identifier, *options = spec.split(":")
    if not identifier or len(options) > 3:
        raise DataError(f"{spec!r} is not a dataset; write ID, ID:CONFIG, ID:CONFIG:SPLIT or ID:CONFIG:SPLIT:COLUMN")
    config, hub_split, column = ([option or None for option in options] + [None] * 3)[:3]
    return TextSource(spec, "hub", identifier, column, config, hub_split)


def check_text_source(spec: str, *, split: Split) -> None:
    """Check soon that a specification names something that is there: a file, or a dataset that the hub has.

    Raises:
        DataError: as :func:`resolve_text`, or for a dataset that does not exist.
        SourceError: for a dataset that is gated or out of reach.
    """
    if spec == "self":
        return
    source = resolve_text(spec, split=split)
    if source.kind == "hub":
        import datasets

        if not datasets.config.HF_HUB_OFFLINE:
            _check_hub_reachable(source.location)


def undo_wikitext_marks(text: str) -> str:
    """Turn word-level WikiText back into plain text.

    WikiText writes hyphens, thousands separators and decimal points as `` @-@ ``, `` @,@ `` and `` @.@ ``, and its
    word-level form has ``<unk>`` for rare words, which a subword tokenizer may take for a special token; it becomes the
    plain word ``unk``. Text without any of the first three marks is returned as it is.
    """
    if not any(mark in text for mark in (" @-@ ", " @,@ ", " @.@ ")):
        return text
    return text.replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", ".").replace("<unk>", "unk")


def _split_file_spec(spec: str) -> tuple[Path, str | None]:
    """Split ``FILE:COLUMN``; a colon that is part of an existing file's name, or of a hub id, splits nothing."""
    path = Path(spec).expanduser()
    head, colon, column = spec.rpartition(":")
    if colon and not path.exists() and Path(head).suffix in _TEXT_SUFFIXES:
        return Path(head).expanduser(), column
    return path, None


def _read_file(path: Path, column: str | None) -> Iterator[str]:
    try:
        if path.suffix == ".parquet":
            yield from _join_rows(_read_parquet(path, column))
        elif path.suffix in {".json", ".jsonl"}:
            yield from _join_rows(_select_texts(_read_json_rows(path), column, where=str(path)))
        else:
            with path.open(encoding="utf-8") as stream:
                yield from iter(lambda: stream.read(_READ_CHARACTERS), "")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read_parquet(path: Path, column: str | None) -> Iterator[str]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        fields = {
            field.name: pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
            for field in file.schema_arrow
        }
        name = _choose_column(fields, column, where=str(path))
        for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=[name]):
            yield from filter(None, batch.column(0).to_pylist())
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from None


def _read_json_rows(path: Path) -> Iterator[Any]:
    """Yield the rows of JSON lines, or of one JSON array in a ``.json`` file."""
    with path.open(encoding="utf-8") as stream:
        if path.suffix == ".json":
            try:
                document = json.load(stream)
            except json.JSONDecodeError:
                stream.seek(0)  # some tools write JSON lines under this suffix
            else:
                yield from document if isinstance(document, list) else [document]
                return
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON: {error.msg}") from None


def _select_texts(rows: Iterable[Any], column: str | None, *, where: str) -> Iterator[str]:
    """Yield the text of each row: the row itself if it is a string, else one field of it."""
    name = None
    for row in rows:
        if isinstance(row, str):
            yield row
            continue
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: a row is a {type(row).__name__}; each row must be a string or an object")
        if name is None:
            name = _choose_column({key: isinstance(value, str) for key, value in row.items()}, column, where=where)
        text = row.get(name)
        if text is not None and not isinstance(text, str):
            raise DataError(f"{where}: column {name!r} holds a {type(text).__name__} in one row; it must hold text")
        if text:
            yield text


def _choose_column(is_text: Mapping[str, bool], column: str | None, *, where: str) -> str:
    """Return the named column, else ``text``, else the only column of strings."""
    wanted = column or "text"
    if is_text.get(wanted):
        return wanted
    texts = [name for name, holds_text in is_text.items() if holds_text]
    if column is None and len(texts) == 1:
        return texts[0]
    found = ", ".join(sorted(is_text)) or "none"
    problem = f"column {column!r} is not text" if column else "which column holds the text is not clear"
    raise DataError(
        f"{where}: {problem}; columns: {found} (of text: {', '.join(sorted(texts)) or 'none'}); append "
        ":COLUMN to the specification"
    )


def _join_rows(rows: Iterable[str]) -> Iterator[str]:
    for index, row in enumerate(rows):
        yield row if index == 0 else _DOCUMENT_SEPARATOR + row


def _read_hub(source: TextSource) -> Iterator[str]:
    """Yield the rows of a hub dataset, streamed, so that only what is needed of a large one is fetched."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    offline = datasets.config.HF_HUB_OFFLINE
    if not offline:
        _check_hub_reachable(source.location)
    # The small default is stored whole in the cache of `datasets`; without a network only that cache can answer.
    streaming = source.location != _WIKITEXT_ID and not offline
    try:
        name = source.hub_split or _choose_split(datasets.get_dataset_split_names(source.location, source.config))
        dataset = datasets.load_dataset(source.location, source.config, split=name, streaming=streaming)
        yield from _join_rows(_select_texts(dataset, source.column, where=source.spec))
    except DatasetNotFoundError as error:
        raise SourceError(f"dataset {source.location}: {error}") from None
    except ConnectionError as error:
        hint = "unset HF_HUB_OFFLINE or download it first" if offline else "try again, or give a local file"
        raise SourceError(f"dataset {source.location} cannot be fetched: {error}; {hint}") from None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        # `datasets` reports a missing or unknown configuration or split this way, and lists those that exist.
        raise DataError(f"dataset {source.spec}: {error}; write ID:CONFIG:SPLIT") from None


def _check_hub_reachable(dataset_id: str) -> None:
    """Ask the hub for the dataset once, since `datasets` itself retries for minutes.

    Raises:
        DataError: if there is no such dataset.
        SourceError: if it is gated or the hub does not answer within seconds.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    from lpsearch.models.hub import call_within

    api = HfApi()
    try:
        call_within(_HUB_PROBE_TIMEOUT_S, lambda: api.dataset_info(dataset_id, timeout=_HUB_PROBE_TIMEOUT_S))
    except GatedRepoError:
        raise SourceError(
            f"dataset {dataset_id} is gated; accept its terms at {api.endpoint}/datasets/{dataset_id} and log in with "
            "`hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise DataError(
            f"dataset {dataset_id} is neither a local file nor on the hub at {api.endpoint} (a private one needs "
            "`hf auth login`); check the spelling"
        ) from None
    except Exception as error:  # the HTTP client under the hub library differs between its versions
        raise SourceError(
            f"dataset {dataset_id} cannot be reached at {api.endpoint}: {error}; give a local file with --data FILE, "
            "use --data self, which needs no download, or set HF_HUB_OFFLINE=1 if it was downloaded before"
        ) from None


def _choose_split(names: Sequence[str]) -> str:
    for name in ("validation", "test", "train"):
        if name in names:
            return name
    raise DataError(f"no split was named and none of {', '.join(names)} is validation, test or train")
