"""What other libraries raise, in one paragraph, and URLs without their secrets."""

from __future__ import annotations

import pytest

from lpsearch.errors import describe_error, mask_urls


def test_the_whole_message_is_one_paragraph() -> None:
    error = ValueError("Class validation error for validator 'x':\n    ValueError: 6 must be equal to 5\n")
    assert describe_error(error) == "Class validation error for validator 'x': ValueError: 6 must be equal to 5"


def test_a_message_that_says_little_has_its_type() -> None:
    assert describe_error(KeyError("model_type")) == "KeyError: 'model_type'"
    assert describe_error(AssertionError()) == "AssertionError"


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    text = describe_error(RuntimeError("beginning " + "word " * 500 + "the cause"))
    assert text.startswith("beginning word")
    assert text.endswith("word the cause")
    assert 590 < len(text) < 610


def test_colours_are_left_out() -> None:
    assert describe_error(RuntimeError("\x1b[1mbold\x1b[0m")) == "bold"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:SECRET@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("postgres://me:SECRET@host/db", "postgres://me:***@host/db"),
        ("mysql+pymysql://:SECRET@[::1]:3306/db?charset=utf8", "mysql+pymysql://:***@[::1]:3306/db?charset=utf8"),
        (
            "postgresql://me@host/db?password=SECRET&sslmode=require",
            "postgresql://me@host/db?password=***&sslmode=require",
        ),
        ("postgresql://host?options=SECRET&SECRET", "postgresql://host?options=***&***"),
        ("postgresql://me:SEC@RET@host/db", "postgresql://***"),
        ("postgresql://me:SEC@RET/x@host/db", "postgresql://***"),
        ("postgresql://me:SEC/RE:T@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:SEC?RET@host/db", "postgresql://***"),
        ("postgresql://host/db?password=SEC@RET", "postgresql://***"),
        ("postgresql://me:SECRET", "postgresql://***"),
        ("postgresql://host:SECRET/db", "postgresql://***"),
        ("postgresql://localhost:1/db", "postgresql://localhost:1/db"),
        ("postgres:/me:SECRET@host/db", "postgres:/me:***@host/db"),
        ("sqlite:////home/me@home:x/study.db", "sqlite:////home/me@home:x/study.db"),
        ("https://huggingface.co/models", "https://huggingface.co/models"),
    ],
)
def test_urls_are_shown_without_their_secrets(url: str, shown: str) -> None:
    assert mask_urls(url) == shown
    sentence = mask_urls(f"extra argument ({url}), '{url}'; then {url}.")
    assert not any(part in sentence for part in ("SEC", "RET"))
    assert sentence.startswith("extra argument (")
    assert "; then " in sentence
