"""Text as people have it: every form, encoding and compression of a file, chats, and what cannot be read."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lpsearch.data import build_windows, check_text_source
from lpsearch.data.texts import replace_surrogates, resolve_text
from lpsearch.errors import DataError

CHAT = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]
CHAT_TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"


@pytest.fixture
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer without a chat template."""
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def read(spec: Path | str, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """Check the source as a command does, then read the whole text."""
    check_text_source(str(spec), split="proxy")
    return "".join(resolve_text(str(spec), split="proxy").read_pieces(tokenizer))


def write_jsonl(path: Path, rows: list[Any], encoding: str = "utf-8") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding=encoding)
    return path


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def read_slowly(path: Path) -> str:
    """Return the whole text in the slow, obvious way, which reads the whole file."""
    if path.suffix == ".txt":
        return path.read_text(encoding="utf-8")
    if path.suffix == ".parquet":
        rows = parquet.read_table(path).to_pylist()
    elif path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))
    else:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return "\n\n".join(row["text"] for row in rows if row["text"])


@pytest.mark.parametrize("form", ["txt", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("seed", range(3))
def test_windows_are_those_of_the_whole_text_bit_for_bit(tokenizer, tmp_path, form, seed):
    """Studies compare their losses with those of windows that were built before."""
    draw = random.Random(seed)
    words = [
        "plain",
        "naïve",
        "日本語",
        "😀",
        "a  b",
        "\t",
        '"quoted"',
        "C:\\x",
        "x" * 600,
        "\u2028",
        "\x85",
        "\r\n",
        "\n\n",
    ]
    texts = [" ".join(draw.choices(words, k=draw.randrange(0, 60))) for _ in range(200)]
    path = tmp_path / f"rows.{form}"
    rows = [{"id": index, "text": text} for index, text in enumerate(texts)]
    if form == "txt":
        path.write_bytes("\n".join(texts).encode())
    elif form == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
    elif form == "json":
        path.write_text(json.dumps(rows, indent=seed or None), encoding="utf-8")
    else:
        write_jsonl(path, rows)
    whole = read_slowly(path)
    assert read(path) == whole
    proxy = build_windows(str(path), tokenizer=tokenizer, num_windows=100, seq_len=257)
    heldout = build_windows(str(path), tokenizer=tokenizer, num_windows=9, seq_len=64, split="heldout", after=proxy)
    tokens = np.asarray(tokenizer(whole, add_special_tokens=False).input_ids)
    np.testing.assert_array_equal(proxy.input_ids.ravel(), tokens[: 100 * 257])
    np.testing.assert_array_equal(heldout.input_ids.ravel(), tokens[100 * 257 : 100 * 257 + 9 * 64])


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": None, "n": 1}, {"text": "words", "n": 1}],
        [{"n": 1}, {"text": "words", "n": 1}],
        [{"id": "a7", "n": 1}, {"id": "a8", "text": None}, {"id": "a9", "text": "words"}],
        [{"text": ""}, {"text": "words"}, {"text": None}],
        [{"text": None, "body": "other"}, {"text": "words", "body": "other"}],
        [{"body": None}, {"body": "words"}],
        [{"text": None}] * 300 + [{"text": "words"}],
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_missing_values_in_the_first_rows_hide_no_column(tmp_path, rows, form):
    path = write_jsonl(tmp_path / f"rows.{form}", rows)
    assert read(path) == "words"


def test_a_named_column_may_be_missing_in_the_first_rows(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"id": "a"}, {"id": "b", "body": "words", "title": "t"}])
    assert read(f"{path}:body") == "words"
    with pytest.raises(DataError, match=r"column 'boddy' is not text; columns: body, id, title"):
        read(f"{path}:boddy")


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        ({"title": "t", "text": "words", "content": "no"}, "words"),
        ({"title": "t", "content": "words"}, "words"),
        ({"label": 1, "review": "words"}, "words"),
        ({"text": 5, "review": "words"}, "words"),
    ],
)
def test_a_usual_name_goes_before_the_only_text(tmp_path, columns, chosen):
    assert read(write_jsonl(tmp_path / "rows.jsonl", [columns])) == chosen
    parquet.write_table(pa.Table.from_pylist([columns]), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == chosen


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["first", None, "", "second"]).dictionary_encode(),
        pa.array(["first", None, "", "second"], pa.large_string()),
        pa.array(["first", None, "", "second"], pa.large_string()).dictionary_encode(),
        pa.array(["first", None, "", "second"], pa.string_view()),
        pa.array([None, None, "first", "second"], pa.string()),
    ],
    ids=lambda column: str(column.type).partition("<")[0],
)
@pytest.mark.parametrize("named", [False, True])
def test_every_type_of_text_column_in_parquet(tmp_path, column, named):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"id": [1, 2, 3, 4], "body": column}), path)
    assert read(f"{path}:body" if named else path) == "first\n\nsecond"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("form", ["txt", "jsonl", "json", "csv", "tsv"])
def test_a_byte_order_mark_and_other_line_ends_change_nothing(tmp_path, form, end, encoding):
    content = {
        "txt": "one\ntwo\n",
        "jsonl": '{"text": "one"}\n\n{"text": "two"}\n',
        "json": '[\n{"text": "one"},\n{"text": "two"}\n]\n',
        "csv": 'text,id\none,1\n"two\nlines",2\n',
        "tsv": "id\ttext\n1\tone\n2\ttwo\n",
    }[form]
    expected = {"txt": "one\ntwo\n", "csv": "one\n\ntwo\nlines"}.get(form, "one\n\ntwo")
    path = tmp_path / f"rows.{form}"
    path.write_bytes(content.replace("\n", end).encode(encoding))
    assert read(path) == expected


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "zst": zstd}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("form", ["txt", "jsonl", "json", "csv"])
def test_compressed_files_read_as_what_is_inside(tmp_path, form, suffix):
    parts = {
        "txt": ("one\n\n", "two"),
        "jsonl": ('{"text": "one"}\n', '{"text": "two"}\n'),
        "json": ('[{"text": "one"},', '{"text": "two"}]'),
        "csv": ("id,text\n1,one\n", "2,two\n"),
    }[form]
    path = tmp_path / f"rows.{form.upper()}.{suffix}"
    # Two members, as parallel compressors and `cat` write them.
    path.write_bytes(b"".join(COMPRESSIONS[suffix](part.encode()) for part in parts))
    assert read(path) == "one\n\ntwo"
    assert read(f"{path}:text" if form != "txt" else path) == "one\n\ntwo"


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_damaged_compression_is_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"text.txt.{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](os.urandom(400_000).hex().encode())[:-1000])
    with pytest.raises(DataError, match=f"{path}: cannot be read: "):
        read(path)
    path.write_bytes(b"not compressed at all")
    with pytest.raises(DataError, match=f"{path}: cannot be read: "):
        read(path)


def test_a_csv_is_read_as_it_is_written(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('id,body,stars\n1,"a ""quote"", and\na line",5\n2,,4\n3,NA,3\n4,007,1\n5,2020-01-01,1\n')
    expected = 'a "quote", and\na line\n\nNA\n\n007\n\n2020-01-01'
    assert read(path) == expected
    assert read(f"{path}:body") == expected
    assert read(f"{path}:stars") == "5\n\n4\n\n3\n\n1\n\n1"


def test_a_csv_is_not_prose_with_its_ids(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("id,title,body\na1,first,one\na2,second,two\n")
    with pytest.raises(DataError, match=r"columns: body, id, title \(of text: body, id, title\); append :COLUMN"):
        read(path)
    with pytest.raises(DataError, match="column 'bdy' is not text"):
        read(f"{path}:bdy")
    assert read(f"{path}:body") == "one\n\ntwo"
    path.write_text("id,score\n1,0.5\n2,0.7\n")
    with pytest.raises(DataError, match=r"columns: id, score \(of text: none\)"):
        read(path)


@pytest.mark.parametrize("delimiter", [";", "|", "\t"])
def test_other_delimiters_of_a_csv_are_seen(tmp_path, delimiter):
    path = tmp_path / "rows.csv"
    path.write_text(f"id{delimiter}text\n7{delimiter}one, two\n8{delimiter}three\n")
    assert read(path) == "one, two\n\nthree"


def test_usual_names_in_a_csv_are_text_whatever_the_first_values_look_like(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n,1\n2020,1\nwords,2\n")
    assert read(path) == "2020\n\nwords"


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_row_may_be_long(tmp_path, form):
    path = tmp_path / f"rows.{form}"
    long = "x" * (3 << 20)
    path.write_text(f"text,id\n{long},1\n" if form == "csv" else json.dumps({"text": long}))
    assert read(path) == long


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"id,text\n1,one\n2\n", "line 3: a row of 1 values ends here, the first has 2"),
        ("rows.csv", b"\n\nid,text\n1,one\n2\n", "line 5: a row of 1 values ends here"),
        ("rows.csv", b"id,text\n1,a list, unquoted\n", "line 2: a row of 3 values ends here, the first has 2"),
        ("rows.csv", b'id,text\n1,"open\n2,words\n3,words\n', "line 4: not csv: unexpected end of data"),
        ("rows.csv", b"id,text\n1,\xff\n", r"not UTF-8 text \(invalid start byte, byte 0xff\); convert it first"),
        ("rows.csv", "text\nwords\n".encode("utf-16"), "not UTF-8 text"),
        ("rows.jsonl", b'{"text": "one"}\n{"text": \n', "line 2: not JSON"),
        ("rows.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "line 1: not JSON"),
        ("rows.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("rows.jsonl", b"5\n", "a row is a int; each row must be a string or an object"),
        ("rows.jsonl", b'{"text": "one"}\n{"text": 5}\n', "the text column holds a int in one row"),
        ("rows.json", b'[{"text": "one"}, {"text": "two"}', "row 3: not JSON"),
        ("rows.json", b'[{"text": "one"}] and more', "row 2: not JSON"),
        ("rows.json", b'{"data": [{"text": "one"}]}', r"columns: data \(of text: none\)"),
        ("rows.parquet.gz", b"PAR1", "not a readable parquet file"),
    ],
)
def test_damaged_tables_are_refused_with_the_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as refusal:
        read(path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.txt", b""),
        ("mark.txt", b"\xef\xbb\xbf"),
        ("empty.jsonl", b""),
        ("nulls.jsonl", b'{"text": null}\n{"text": ""}\n'),
        ("array.json", b" [ ] "),
        ("empty.csv", b""),
        ("header.csv", b"id,text\n"),
        ("names.csv", b"id,body\n"),
        ("lines.csv", b"\n\n"),
        ("empty.txt.gz", gzip.compress(b"", mtime=0)),
    ],
)
def test_data_without_any_text_is_refused_before_a_model_is_loaded(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path} holds no text"):
        check_text_source(str(path), split="proxy")


@pytest.mark.parametrize("column", [pa.array([], pa.string()), pa.array([None, None], pa.null()), pa.array([None, ""])])
def test_parquet_without_any_text_is_refused(tmp_path, column):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"text": column}), path)
    with pytest.raises(DataError, match=f"{path} holds no text"):
        check_text_source(str(path), split="proxy")


@pytest.mark.parametrize(
    "name", ["a:b.jsonl", "a[1].jsonl", "a*.jsonl", "x::y.jsonl", "%41 #{}?.jsonl", "no suffix: at all"]
)
def test_a_path_is_taken_as_it_is(tmp_path, name):
    plain = not name.endswith(".jsonl")
    path = tmp_path / name
    path.write_text("words" if plain else json.dumps({"body": "words", "id": "7"}))
    write_jsonl(tmp_path / "abc.jsonl", [{"body": "a neighbour that a pattern would match", "id": "8"}])
    assert read(path if plain else f"{path}:body") == "words"
    with pytest.raises(DataError, match="plain text has no columns" if plain else "append :COLUMN"):
        read(f"{path}:body" if plain else path)


def test_the_longest_path_that_exists_is_the_file(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    (tmp_path / "a.txt:text").write_text("long")
    assert read(tmp_path / "a.txt:text") == "long"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("none.csv:text", r"none\.csv: no such file"),
        ("none.JSONL.zst", r"none\.JSONL\.zst: no such file"),
        ("./none", r"\./none: no such file"),
        ("/" + "x" * 5000, "no such file"),
        ("~nobody-of-this-name/x.txt", "no such file"),
        ("/dev/null", "is not a file that can be read twice"),
    ],
)
def test_paths_to_nothing_are_refused(spec, message):
    with pytest.raises(DataError, match=message):
        resolve_text(spec, split="proxy")


def test_a_pipe_is_refused_instead_of_emptied(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is not a file that can be read twice"):
        resolve_text(str(tmp_path / "pipe"), split="proxy")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("column", ["messages", "conversation"])
def test_chats_are_written_by_the_chat_template(tokenizer, tmp_path, form, column):
    tokenizer.chat_template = CHAT_TEMPLATE
    chats = [CHAT, [], CHAT[:1], [{**CHAT[0], "tool_calls": None}]]
    rows = [{"id": index, column: chat} for index, chat in enumerate(chats)]
    path = tmp_path / f"rows.{form}"
    if form == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_jsonl(path, rows)
    expected = "<user>Two and two?\n<assistant>Four.\n<user>Two and two?\n<user>Two and two?\n"
    assert read(path, tokenizer) == expected
    windows = build_windows(f"{path}:{column}", tokenizer=tokenizer, num_windows=1, seq_len=20)
    assert tokenizer.decode(windows.input_ids[0]) == expected[:20]


def test_ids_beside_chats_are_not_taken_for_text(tokenizer, tmp_path):
    tokenizer.chat_template = CHAT_TEMPLATE
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt_id": "f00", "messages": CHAT}])
    assert read(path, tokenizer).startswith("<user>")
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt_id": "f00", "turns": CHAT}])
    with pytest.raises(DataError, match=r"of text: prompt_id, turns"):
        read(path, tokenizer)


def test_chats_that_cannot_be_written_are_refused(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": CHAT}])
    with pytest.raises(DataError, match=r"no chat template to write them with; name a column of text with :COLUMN"):
        build_windows(str(path), tokenizer=tokenizer, num_windows=1, seq_len=4)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="chat template refuses a chat: roles must alternate"):
        build_windows(str(path), tokenizer=tokenizer, num_windows=1, seq_len=4)
    write_jsonl(path, [{"messages": [{"from": "human", "value": "words"}]}])
    with pytest.raises(DataError, match=r"columns: messages \(of text: none\)"):
        build_windows(str(path), tokenizer=tokenizer, num_windows=1, seq_len=4)


@pytest.mark.parametrize("form", ["txt", "jsonl", "json", "csv"])
def test_lone_surrogates_are_replaced_and_counted_once(tokenizer, tmp_path, caplog, form):
    text = "broken \ud83d emoji, whole \U0001f600 and \udc00 another. " * 3
    path = tmp_path / f"rows.{form}"
    if form in {"jsonl", "json"}:
        path.write_text(json.dumps({"text": text}))
    else:
        path.write_bytes(("id,text\n1," * (form == "csv") + f'"{text}"').encode("utf-8", "surrogatepass"))
    expected = text.replace("\ud83d", "\ufffd").replace("\udc00", "\ufffd")
    with caplog.at_level(logging.WARNING, logger="lpsearch"):
        windows = build_windows(str(path), tokenizer=tokenizer, num_windows=2, seq_len=60)
    tokens = tokenizer(f'"{expected}"' if form == "txt" else expected, add_special_tokens=False).input_ids
    np.testing.assert_array_equal(windows.input_ids.ravel(), tokens[:120])
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: replaced 6 lone surrogates (halves of characters) by U+FFFD"
    ]
    assert replace_surrogates("whole \U0001f600") == ("whole \U0001f600", 0)


@pytest.mark.parametrize("form", ["txt", "jsonl", "json", "csv", "txt.gz", "parquet"])
def test_only_the_start_of_a_large_file_is_read(tokenizer, tmp_path, form):
    """What lies beyond the start is damaged, so that reading it would be refused."""
    path = tmp_path / f"large.{form}"
    row = "words and words " * 500
    count = 1000
    if form == "parquet":
        parquet.write_table(
            pa.table({"text": [row] * count}), path, row_group_size=50, compression="none", use_dictionary=False
        )
        with path.open("r+b") as stream:
            stream.seek(4_000_000)
            stream.write(bytes(500_000))
    else:
        head, line = {
            "jsonl": ("", json.dumps({"text": row}) + "\n"),
            "json": ("[", json.dumps({"text": row}) + ",\n"),
            "csv": ("text\n", row + "\n"),
        }.get(form, ("", row + "\n"))
        content = (head + line * count).encode()
        if form == "txt.gz":
            path.write_bytes(gzip.compress(content, compresslevel=1) + b"damaged")
        else:
            path.write_bytes(content + b"\xff damaged")
    windows = build_windows(str(path), tokenizer=tokenizer, num_windows=2, seq_len=32)
    assert tokenizer.decode(windows.input_ids.ravel()) == row[:64]
    check_text_source(str(path), split="proxy")
    with pytest.raises(DataError, match=str(path)):
        list(resolve_text(str(path), split="proxy").read_pieces())


def test_a_large_row_group_is_not_read_at_once(tmp_path):
    path = tmp_path / "large.parquet"
    rows = [f"row {index} " + "x" * 1000 for index in range(30_000)]
    parquet.write_table(
        pa.table({"text": rows}), path, row_group_size=len(rows), use_dictionary=False, compression="none"
    )
    before = pa.total_allocated_bytes()
    pieces = resolve_text(str(path), split="proxy").read_pieces()
    assert next(pieces) == rows[0]
    assert pa.total_allocated_bytes() - before < 4 << 20
    assert next(pieces) == "\n\n" + rows[1]
