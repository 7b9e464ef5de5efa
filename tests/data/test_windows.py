"""Windows of texts: forms of files, BOS, no overlaps, and every way in which data can be wrong."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lpsearch.data import Windows, build_mixed_windows, build_windows, check_text_kinds, name_texts
from lpsearch.data.texts import resolve_text, undo_wikitext_marks
from lpsearch.errors import DataError, ModelError, StudyError
from lpsearch.kinds import TextKind, parse_kinds
from tests.tiny_models import build_tiny_model


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer: token = 1 + rank of the byte's symbol; it adds no BOS by itself."""
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def bos_tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def test_windows_are_contiguous_and_heldout_follows_the_proxy(tokenizer, text_file):
    proxy = build_windows(str(text_file), tokenizer=tokenizer, num_windows=3, seq_len=40)
    heldout = build_windows(
        str(text_file), tokenizer=tokenizer, num_windows=2, seq_len=50, split="heldout", after=proxy
    )
    tokens = tokenizer(text_file.read_text(), add_special_tokens=False).input_ids
    np.testing.assert_array_equal(proxy.input_ids.ravel(), tokens[:120])
    np.testing.assert_array_equal(heldout.input_ids.ravel(), tokens[120:220])
    assert proxy.input_ids.dtype == np.int32
    assert (proxy.provenance["first_token"], proxy.provenance["stop_token"]) == (0, 120)


def test_windows_follow_those_of_the_same_file_by_another_name(tokenizer, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(text_file.parent)
    (tmp_path / "link.txt").symlink_to(text_file)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text_file.read_text()}))
    spellings = [text_file.name, f"./{text_file.name}", str(text_file), str(tmp_path / "link.txt")]
    rows = [str(tmp_path / "rows.jsonl"), f"{tmp_path}/../{tmp_path.name}/rows.jsonl:text"]
    for first, second in [*itertools.pairwise(spellings), rows]:
        proxy = build_windows(first, tokenizer=tokenizer, num_windows=3, seq_len=40)
        heldout = build_windows(second, tokenizer=tokenizer, num_windows=1, seq_len=8, split="heldout", after=proxy)
        assert heldout.provenance["first_token"] == 120, (first, second)


def test_windows_after_those_of_another_text_begin_at_its_start(tokenizer, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Another text altogether. " * 20)
    proxy = build_windows(str(other), tokenizer=tokenizer, num_windows=3, seq_len=40)
    heldout = build_windows(str(text_file), tokenizer=tokenizer, num_windows=1, seq_len=8, split="heldout", after=proxy)
    assert tokenizer.decode(heldout.input_ids[0]) == text_file.read_text()[:8]


def test_a_tokenizer_that_adds_bos_begins_every_window_with_it(bos_tokenizer, tokenizer, text_file):
    windows = build_windows(str(text_file), tokenizer=bos_tokenizer, num_windows=3, seq_len=11)
    assert (windows.input_ids[:, 0] == bos_tokenizer.bos_token_id).all()
    tokens = tokenizer(text_file.read_text(), add_special_tokens=False).input_ids
    np.testing.assert_array_equal(windows.input_ids[:, 1:].ravel(), tokens[:30])


def test_only_the_needed_start_of_a_text_is_read(tokenizer, tmp_path):
    path = tmp_path / "long.jsonl"
    rows = [json.dumps({"text": f"row {i} " + "x" * 5000}) for i in range(20)]
    path.write_text("\n".join([*rows, "this line is not JSON"]))
    windows = build_windows(str(path), tokenizer=tokenizer, num_windows=2, seq_len=16)
    assert tokenizer.decode(windows.input_ids[0]).startswith("row 0 xxx")


@pytest.mark.parametrize("form", ["jsonl", "json", "json-lines.json", "parquet"])
def test_rows_of_every_form_are_joined_by_a_blank_line(tokenizer, tmp_path, form):
    rows = [{"id": 1, "text": "first"}, {"id": 2, "text": ""}, {"id": 3, "text": "second"}]
    path = tmp_path / f"rows.{form}"
    if form == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif form == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    text = "".join(resolve_text(str(path), split="proxy").read_pieces())
    assert text == "first\n\nsecond"


def test_the_text_column_is_found_or_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": 1, "body": "words"}))
    assert "".join(resolve_text(str(path), split="proxy").read_pieces()) == "words"
    path.write_text(json.dumps({"title": "a", "body": "words", "id": 3}))
    assert "".join(resolve_text(f"{path}:body", split="proxy").read_pieces()) == "words"
    with pytest.raises(DataError, match=r"columns: body, id, title \(of text: body, title\); append :COLUMN"):
        "".join(resolve_text(str(path), split="proxy").read_pieces())
    with pytest.raises(DataError, match="column 'id' is not text"):
        "".join(resolve_text(f"{path}:id", split="proxy").read_pieces())


def test_wikitext_marks_are_undone_where_they_are_found(tokenizer, tmp_path):
    assert undo_wikitext_marks("a @-@ b 1 @,@ 000 0 @.@ 5 <unk>") == "a-b 1,000 0.5 unk"
    assert undo_wikitext_marks("html <unk> tag") == "html <unk> tag"
    path = tmp_path / "wiki.txt"
    path.write_text("well @-@ known <unk> " * 10)
    windows = build_windows(str(path), tokenizer=tokenizer, num_windows=1, seq_len=14)
    assert tokenizer.decode(windows.input_ids[0]) == "well-known unk"


@pytest.mark.parametrize(
    ("spec", "location", "config", "split", "column"),
    [
        ("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
        ("org/name", "org/name", None, None, None),
        ("org/name:en:train", "org/name", "en", "train", None),
        ("org/name::train:body", "org/name", None, "train", "body"),
    ],
)
def test_hub_specifications(spec, location, config, split, column):
    source = resolve_text(spec, split="heldout")
    assert (source.kind, source.location) == ("hub", location)
    assert (source.config, source.hub_split, source.column) == (config, split, column)


def test_wikitext2_searches_on_validation_and_names_it():
    assert resolve_text("wikitext2", split="proxy").spec == "wikitext2:validation"
    assert resolve_text("wikitext2", split="heldout").spec == "wikitext2:test"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text"),
        (b" \n\n ", "holds no text"),
        (b"short", r"2 windows of 10 tokens need 20 tokens, the text has 5; lower --windows or --seq-len"),
        (b"\xff\xfe binary", "not UTF-8 text"),
    ],
)
def test_unusable_texts_are_refused(tokenizer, tmp_path, content, message):
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        build_windows(str(path), tokenizer=tokenizer, num_windows=2, seq_len=10)


@pytest.mark.parametrize(("name", "content"), [("x.parquet", b"PAR1 but not really"), ("x.jsonl", b"{'a': 1}")])
def test_damaged_files_are_refused(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=str(path)):
        list(resolve_text(str(path), split="proxy").read_pieces())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spec": "nowhere/missing.txt"}, "no such file"),
        ({"spec": "/"}, "is a directory"),
        ({"spec": "a:b:c:d:e"}, "is not a dataset"),
        ({"num_windows": 0}, "--windows is 0"),
        ({"seq_len": 1}, "--seq-len is 1"),
        ({"seq_len": 129}, "the model reads at most 128 tokens"),
    ],
)
def test_wrong_usage_is_refused(tokenizer, text_file, changes, message):
    options = {"spec": str(text_file), "num_windows": 2, "seq_len": 8, "model": build_tiny_model("llama")} | changes
    with pytest.raises(DataError, match=message):
        build_windows(options.pop("spec"), tokenizer=tokenizer, **options)


def test_a_tokenizer_of_another_model_is_refused(tokenizer, text_file):
    with pytest.raises(ModelError, match="embeds only 50"):
        build_windows(
            str(text_file),
            tokenizer=tokenizer,
            num_windows=1,
            seq_len=64,
            model=build_tiny_model("llama", vocab_size=50),
        )


def test_bytes_round_trip_and_damage():
    windows = Windows(np.arange(12).reshape(3, 4), "self", {"seed": 3})
    again = Windows.from_bytes(windows.to_bytes())
    np.testing.assert_array_equal(again.input_ids, windows.input_ids)
    assert (again.spec, again.provenance, again.sha256) == ("self", {"seed": 3}, windows.sha256)
    assert Windows(np.arange(12).reshape(4, 3), "self").sha256 != windows.sha256
    with pytest.raises(StudyError, match="cannot be read"):
        Windows.from_bytes(windows.to_bytes()[:-20])
    with pytest.raises(ValueError, match="read-only"):
        again.input_ids[0, 0] = 1


def test_checking_data_loads_no_torch():
    code = "import sys, lpsearch.data; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_an_unreachable_hub_ends_soon_in_one_message(tmp_path):
    script = (
        "from lpsearch.data.texts import resolve_text\n"
        "from lpsearch.errors import SourceError\n"
        "try:\n"
        "    next(resolve_text('wikitext2', split='proxy').read_pieces())\n"
        "except SourceError as error:\n"
        "    print(error)\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = kept | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    assert "cannot be reached at http://127.0.0.1:9" in done.stdout
    assert "--data FILE" in done.stdout
    assert seconds < 15, "the promise to a user; without the probe `datasets` retries for 23 s"


def test_windows_of_several_kinds_are_interleaved_and_do_not_overlap_across_splits(tokenizer, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Nothing is as it was, they said. " * 99, encoding="utf-8")
    kinds = parse_kinds([f"{text_file}@3", str(other)])
    proxy = build_mixed_windows(kinds, tokenizer=tokenizer, num_windows=3, seq_len=10)
    alone = [build_windows(kind.spec, tokenizer=tokenizer, num_windows=3, seq_len=10) for kind in kinds]
    assert proxy.kinds == kinds
    assert proxy.spec == f"{text_file}@3 + {other}"
    for index, row in enumerate(proxy.input_ids):
        np.testing.assert_array_equal(row, alone[index % 2].input_ids[index // 2])
    for part, expected in zip(proxy.split_kinds(), alone, strict=True):
        assert (part.spec, part.sha256, part.provenance) == (expected.spec, expected.sha256, expected.provenance)
    again = Windows.from_bytes(proxy.to_bytes())
    assert (again.kinds, again.sha256, again.provenance) == (proxy.kinds, proxy.sha256, proxy.provenance)
    heldout = build_mixed_windows(
        kinds[::-1], tokenizer=tokenizer, num_windows=2, seq_len=10, split="heldout", after=proxy
    )
    assert [part.provenance["first_token"] for part in heldout.split_kinds()] == [30, 30]


def test_one_kind_is_what_it_always_was(tokenizer, text_file):
    mixed = build_mixed_windows(parse_kinds([str(text_file)]), tokenizer=tokenizer, num_windows=3, seq_len=10)
    alone = build_windows(str(text_file), tokenizer=tokenizer, num_windows=3, seq_len=10)
    assert (mixed.spec, mixed.provenance, mixed.kinds) == (alone.spec, alone.provenance, (TextKind(str(text_file)),))
    assert (mixed.sha256, len(mixed.to_bytes())) == (alone.sha256, len(alone.to_bytes()))
    assert mixed.split_kinds() == [mixed]


def test_there_are_as_many_windows_of_every_kind():
    with pytest.raises(ValueError, match="3 windows are not as many of each of 2 kinds"):
        Windows(np.arange(12).reshape(3, 4), "a + b", kinds=(TextKind("a"), TextKind("b")))


def test_a_text_is_one_kind(text_file, monkeypatch):
    monkeypatch.chdir(text_file.parent)
    with pytest.raises(DataError, match="named 2 times; name it once, with a weight"):
        check_text_kinds([text_file.name, str(text_file)], split="proxy")


def test_equal_mixtures_have_one_name(text_file, monkeypatch):
    monkeypatch.chdir(text_file.parent)
    assert name_texts([f"{text_file.name}@7"]) == name_texts(str(text_file)) == str(text_file)
    assert name_texts(["self", f"{text_file.name}@2"]) == ["self", f"{text_file}@2"]
    first, second = ["self@0.1", f"{text_file.name}@0.3"], [f"{text_file}@6", "self@2"]
    assert name_texts(first, in_order=False) == name_texts(second, in_order=False) == [f"{text_file}@3", "self"]
