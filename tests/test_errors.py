"""What other libraries raise, in one paragraph."""

from __future__ import annotations

from lpsearch.errors import describe_error


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
