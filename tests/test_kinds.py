"""Kinds of text: specifications with weights, and the names of columns."""

from __future__ import annotations

import pytest

from lpsearch.errors import DataError
from lpsearch.kinds import TextKind, describe_kinds, name_kinds, normalise_weights, parse_kinds, write_kind


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("wikitext2", TextKind("wikitext2")),
        ("wikitext2@2", TextKind("wikitext2", 2.0)),
        ("a/b:train@0.25", TextKind("a/b:train", 0.25)),
        ("x@1e-3", TextKind("x", 0.001)),
        ("x@.5", TextKind("x", 0.5)),
        ("id@main", TextKind("id@main")),
        ("id@main@3", TextKind("id@main", 3.0)),
        ("a@b/c.txt", TextKind("a@b/c.txt")),
        ("a@2/c.txt", TextKind("a@2/c.txt")),
        ("x@nan", TextKind("x@nan")),
        ("x@٣", TextKind("x@٣")),
        ("x@", TextKind("x@")),
        ("@2", TextKind("@2")),
        ("nul\0@2", TextKind("nul\0", 2.0)),
    ],
)
def test_only_a_trailing_number_is_a_weight(text: str, kind: TextKind) -> None:
    assert parse_kinds([text]) == (kind,)


@pytest.mark.parametrize("weight", ["0", "-1", "1e999", "0.0"])
def test_weights_are_positive(weight: str) -> None:
    with pytest.raises(DataError, match=f"the weight of x is {weight}"):
        parse_kinds(["a", f"x@{weight}"])


def test_an_existing_file_of_the_whole_name_wins(tmp_path) -> None:
    (tmp_path / "a.txt@2").write_text("text", encoding="utf-8")
    named, other = parse_kinds([str(tmp_path / "a.txt@2"), f"{tmp_path / 'a.txt@2'}@3"])
    assert (named.spec, named.weight) == (str(tmp_path / "a.txt@2"), 1.0)
    assert (other.spec, other.weight) == (str(tmp_path / "a.txt@2"), 3.0)


@pytest.mark.parametrize("kind", [TextKind("a"), TextKind("a", 2.0), TextKind("a", 1 / 3), TextKind("gone@2")])
def test_a_written_kind_is_read_again(kind: TextKind) -> None:
    assert parse_kinds([write_kind(kind)]) == (kind,)


def test_kinds_are_described_together() -> None:
    assert describe_kinds([TextKind("self", 3.0)]) == "self"
    assert describe_kinds([TextKind("self", 3.0), TextKind("b")]) == "self@3 + b"
    assert normalise_weights([TextKind("a", 3.0), TextKind("b")]) == (0.75, 0.25)


def test_names_are_as_short_as_they_can_be() -> None:
    specs = [
        "wikitext2:validation",
        "/data/code/a.txt",
        "/data/prose/a.txt",
        "/data/b.txt",
        "d/e.csv:text",
        "owner/set",
    ]
    names = ["wikitext2:validation", "code/a.txt", "prose/a.txt", "b.txt", "e.csv:text", "owner/set"]
    assert name_kinds(specs) == names
