"""Local files of text, read piece by piece: plain text, JSON, csv and parquet, also compressed.

Parquet is read by pyarrow, as in `datasets`, csv and JSON by Python. ``datasets.load_dataset`` itself does not suit
local files: it takes ``*``, ``[`` and ``::`` in a path for patterns, reports each use to the hub, fails on half of a
surrogate pair and on rows that are strings, and reads ``007`` of a csv as a number and ``NA`` as missing.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any, cast

from lpsearch.data.columns import USUAL_COLUMNS, Kind, choose_column, select_values
from lpsearch.errors import DataError

__all__ = ["KNOWN_SUFFIXES", "is_plain_text", "read_values"]

_CODECS = {".bz2": "bz2", ".gz": "gzip", ".zst": "zstd"}
_TABLES = frozenset({".csv", ".json", ".jsonl", ".ndjson", ".parquet", ".tsv"})
KNOWN_SUFFIXES = _TABLES | {".txt"} | _CODECS.keys()
"""Suffixes by which a path to nothing is told from a dataset of the hub."""

_READ_CHARACTERS = 1 << 16
_ROWS_PER_BATCH = 256
_PARQUET_BUFFER_BYTES = 1 << 20
_ARROW_TEXTS = frozenset({"large_string", "string", "string_view"})
_CSV_FIELD_CHARACTERS = 1 << 26  # beyond this, a quote was not closed
_CSV_DELIMITERS = ",;\t|"
_JSON_SPACE = re.compile(r"\s*")
_JSON_COMMA = re.compile(r"[\s,]*")
_JSON_ARRAY = re.compile(r"\s*\[")


def is_plain_text(path: Path) -> bool:
    """Say whether a file is one text, not a table of documents."""
    return _form_of(path) not in _TABLES


def read_values(path: Path, column: str | None) -> Iterator[Any]:
    """Yield the pieces of a plain text, or the values of a table's text column, less what is missing or empty.

    Args:
        path: an existing file; its suffix says what it is, and what is no table is plain text.
        column: the column that holds the text; None finds it.

    Raises:
        DataError: for a file that is unreadable, damaged or not UTF-8, or whose text column is not clear.
    """
    form = _form_of(path)
    read = {".parquet": _read_parquet, ".csv": _read_csv, ".tsv": _read_csv}.get(form, _read_lines_or_json)
    import pyarrow as pa

    try:
        yield from read(path, column)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}"
        raise DataError(f"{path}: not UTF-8 text ({error.reason}, {byte}); convert it first, e.g. with iconv") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable {form.removeprefix('.')} file: {error}") from None


def _form_of(path: Path) -> str:
    """Return the suffix in small letters, less that of a compression."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _CODECS else suffix


def _open_bytes(path: Path) -> IO[bytes]:
    codec = _CODECS.get(path.suffix.lower())
    if codec is None:
        return path.open("rb")
    import pyarrow as pa

    return cast("IO[bytes]", pa.CompressedInputStream(str(path), codec))


def _open_text(path: Path) -> io.TextIOWrapper:
    """Open UTF-8 with or without a byte order mark and with any line ends; encoded surrogates are let through."""
    return io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig", errors="surrogatepass")


def _read_lines_or_json(path: Path, column: str | None) -> Iterator[Any]:
    with _open_text(path) as stream:
        if is_plain_text(path):
            if column is not None:
                raise DataError(f"{path}: plain text has no columns; leave :{column} out")
            yield from iter(lambda: stream.read(_READ_CHARACTERS), "")
        else:
            rows = _read_json(stream, path) if _form_of(path) == ".json" else _read_json_lines(stream, path)
            yield from select_values(rows, column, where=str(path))


def _read_json_lines(stream: IO[str], path: Path) -> Iterator[Any]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:  # a number can be too long, and a list too deep
                raise _not_json(f"{path}, line {number}", error) from None


def _read_json(stream: IO[str], path: Path) -> Iterator[Any]:
    """Yield the elements of one array, or the values that stand one after another, reading only as far as needed."""
    decoder = json.JSONDecoder()
    text, position, number = stream.read(_READ_CHARACTERS), 0, 1
    opened = _JSON_ARRAY.match(text)
    separator, closing = (_JSON_COMMA, "]") if opened else (_JSON_SPACE, "")
    position = opened.end() if opened else 0
    ended = False
    while True:
        position = cast("re.Match[str]", separator.match(text, position)).end()
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            rest = text[position:]
            if ended and rest.strip() == closing:
                return
            if ended:
                raise _not_json(f"{path}, row {number}", error) from None
            more = stream.read(max(_READ_CHARACTERS, len(rest)))  # at least doubled: a long value is not tried often
            text, position, ended = rest + more, 0, not more
        else:
            yield value
            number += 1


def _not_json(where: str, error: Exception) -> DataError:
    return DataError(f"{where}: not JSON: {getattr(error, 'msg', error)}")


def _read_parquet(path: Path, column: str | None) -> Iterator[Any]:
    from pyarrow import parquet

    # Otherwise a whole row group is read at once, and many files have only one.
    with parquet.ParquetFile(path, buffer_size=_PARQUET_BUFFER_BYTES, pre_buffer=False) as file:
        kinds = {field.name: _kind_of_type(field.type) for field in file.schema_arrow}
        name = choose_column(kinds, column, where=str(path))
        for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=[name]):
            yield from filter(None, batch.column(0).to_pylist())


def _kind_of_type(data_type: Any) -> Kind | None:
    """Return what a column of an Arrow type holds."""
    from pyarrow import types

    if types.is_dictionary(data_type):
        return _kind_of_type(data_type.value_type)
    if types.is_null(data_type):
        return None
    if str(data_type) in _ARROW_TEXTS:  # pyarrow cannot ask for string views in all versions
        return "text"
    if types.is_list(data_type) or types.is_large_list(data_type):
        message = data_type.value_type
        if types.is_struct(message) and {"role", "content"} <= {field.name for field in message}:
            return "chat"
    return "other"


def _read_csv(path: Path, column: str | None) -> Iterator[Any]:
    """Yield one column of a csv as it is written: ``007`` and ``NA`` are text, and only quotes are undone.

    The first line names the columns. Without a name, columns whose first values are numbers or dates are no text.
    """
    csv.field_size_limit(_CSV_FIELD_CHARACTERS)  # one for the process; its default is shorter than many documents
    with _open_text(path) as stream:
        head = []  # up to the header; blank lines may precede it
        for line in stream:
            head.append(line)
            if line.strip():
                break
        # Many spreadsheets separate by semicolons.
        delimiter = "\t" if _form_of(path) == ".tsv" else max(_CSV_DELIMITERS, key="".join(head).count)
        rows = _read_csv_rows(itertools.chain(head, stream), delimiter, path)
        names = next(rows, [])
        known = [name for name in names if name in {column, *USUAL_COLUMNS}]
        first = [] if known else list(itertools.islice(rows, _ROWS_PER_BATCH))
        kinds: dict[str, Kind | None] = {
            name: "text" if name in known or not all(_is_number_or_date(row[index]) for row in first) else "other"
            for index, name in enumerate(names)
        }
        if names and (known or first):
            index = names.index(choose_column(kinds, column, where=str(path)))
            yield from filter(None, (row[index] for row in itertools.chain(first, rows)))


def _read_csv_rows(lines: Iterable[str], delimiter: str, path: Path) -> Iterator[list[str]]:
    """Yield the rows, of which each must have as many values as the first."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    width = None
    try:
        for row in filter(None, reader):
            width = width or len(row)
            if len(row) != width:
                raise DataError(
                    f"{path}, line {reader.line_num}: a row of {len(row)} values ends here, the first has {width}"
                )
            yield row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not csv: {error}") from None


def _is_number_or_date(value: str) -> bool:
    for parse in (float, datetime.fromisoformat):
        with contextlib.suppress(ValueError):
            parse(value or "0")
            return True
    return False
