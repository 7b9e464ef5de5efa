"""The column of a table that holds the text: how it is chosen, and how its values become one text.

A column holds texts, or chats: lists of messages, each an object with a role and a content.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from lpsearch.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["USUAL_COLUMNS", "Kind", "choose_column", "join_documents", "select_values"]

Kind = Literal["text", "chat", "other"]
"""What a column holds; None where only missing values were seen."""

USUAL_COLUMNS = ("text", "content", "messages")
"""Names that need not be given, the first that is there."""

_ROWS_TO_LOOK_AT = 256
_DOCUMENT_SEPARATOR = "\n\n"
_CHAT_KEYS = {"role", "content"}


def choose_column(kinds: Mapping[str, Kind | None], column: str | None, *, where: str) -> str:
    """Return the named column; without a name, a usual one, else the only one that holds texts or chats.

    Args:
        kinds: what each column holds.
        column: name that the user gave.
        where: the file or dataset, for messages.

    Raises:
        DataError: if the named column holds no text, or several columns do and none was named.
    """
    wanted = USUAL_COLUMNS if column is None else (column,)
    usable = [name for name, kind in kinds.items() if kind in {"text", "chat"}]
    for name in wanted:
        if name in usable:
            return name
    if column is None and len(usable) == 1:
        return usable[0]
    for name in wanted:
        if name in kinds and kinds[name] is None and (column is not None or not usable):
            return name  # values may follow the missing ones; if none does, the text is empty
    problem = "which column holds the text is not clear" if column is None else f"column {column!r} is not text"
    raise DataError(
        f"{where}: {problem}; columns: {', '.join(sorted(kinds)) or 'none'} (of text: "
        f"{', '.join(sorted(usable)) or 'none'}); append :COLUMN to the specification"
    )


def select_values(rows: Iterable[Any], column: str | None, *, where: str) -> Iterator[Any]:
    """Yield the values of the text column of rows without a schema: objects, or strings that are the text themselves.

    The first rows show what the columns hold, only as many of them as needed, since values may be missing in some.

    Raises:
        DataError: as :func:`choose_column`, or for a row that is neither an object nor a string.
    """
    rows = _check_rows(rows, where=where)
    wanted = USUAL_COLUMNS if column is None else (column,)
    seen: list[Mapping[str, Any] | str] = []
    kinds: dict[str, Kind | None] = {}
    for row in itertools.islice(rows, _ROWS_TO_LOOK_AT):
        seen.append(row)
        for name, value in [("text", row)] if isinstance(row, str) else row.items():
            before, kind = kinds.get(name), _kind_of(value)
            kinds[name] = before if kind is None else kind if before in {None, kind} else "other"
        if next((kinds[name] for name in wanted if name in kinds), None) is not None:
            break
    if seen:
        name = choose_column(kinds, column, where=where)
        for row in itertools.chain(seen, rows):
            value = row if isinstance(row, str) else row.get(name)
            # An empty string that is a row itself is an empty document, as it has always been.
            if isinstance(row, str) or value not in (None, "", []):
                yield value


def join_documents(values: Iterable[Any], *, tokenizer: PreTrainedTokenizerBase | None, where: str) -> Iterator[str]:
    """Yield the pieces of the text that the values of a column make.

    Texts are separate documents with a blank line between them, which is also how perplexities on WikiText-2 are
    usually published. Chats follow each other as the tokenizer's chat template writes them.

    Raises:
        DataError: for a value that is neither text nor chat, or a chat that the tokenizer cannot write.
    """
    separator = ""
    for value in values:
        kind = _kind_of(value)
        if kind == "other":
            raise DataError(
                f"{where}: the text column holds a {type(value).__name__} in one row; it must hold text, or lists of "
                "messages with role and content"
            )
        if kind == "chat":
            yield separator + _render_chat(value, tokenizer, where=where)
            separator = ""
        else:
            yield separator + value
            separator = _DOCUMENT_SEPARATOR


def _check_rows(rows: Iterable[Any], *, where: str) -> Iterator[Mapping[str, Any] | str]:
    for row in rows:
        if isinstance(row, Mapping | str):
            yield row
        else:
            raise DataError(f"{where}: a row is a {type(row).__name__}; each row must be a string or an object")


def _kind_of(value: Any) -> Kind | None:
    if value is None or value == []:
        return None
    if isinstance(value, str):
        return "text"
    is_chat = isinstance(value, list) and all(isinstance(item, Mapping) and item.keys() >= _CHAT_KEYS for item in value)
    return "chat" if is_chat else "other"


def _render_chat(messages: list[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase | None, *, where: str) -> str:
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where} holds chats, and the tokenizer of this model has no chat template to write them with; name a "
            "column of text with :COLUMN, or use the model's instruction-tuned version"
        )
    # A table stores what one message lacks as null, e.g. its tool calls; templates ask only whether a key is there.
    present = [{key: item for key, item in message.items() if item is not None} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(present, tokenize=False))
    except Exception as error:  # a template is a program, which fails in its own ways
        raise DataError(f"{where}: the tokenizer's chat template refuses a chat: {error}") from None
