"""Whether the options that a message names are options of the command that says it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import typer.main

from lpsearch.commands.app import app

_OPTION = re.compile(r"(?<![\w/-])--[a-z][a-z-]*")
_COMMAND_LINE = re.compile(r"`([^`]*)`")


def find_foreign_options(words: Sequence[str], message: str) -> list[str]:
    """List the options in a message that its command does not have, unless the user typed them.

    A command line between backticks, as in ```lpsearch optimize --fresh```, names the command that has its options.

    Args:
        words: the arguments of ``lpsearch``.
        message: what it said.
    """
    typed = {word.partition("=")[0] for word in words}
    found = [name for name in _OPTION.findall(_COMMAND_LINE.sub("", message)) if name not in typed]
    foreign = sorted(set(found) - list_options(words))
    for line in _COMMAND_LINE.findall(message):
        parts = line.split()
        if parts[:1] == ["lpsearch"]:
            foreign += sorted(set(_OPTION.findall(line)) - list_options(parts[1:]))
    return foreign


def list_options(words: Sequence[str]) -> set[str]:
    """Return the options of the command that a command line names."""
    command: Any = typer.main.get_command(app)
    for word in words:
        command = getattr(command, "commands", {}).get(word, command)
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {
        "--help"
    }


def list_commands() -> Iterator[tuple[str, ...]]:
    """Yield the words of every command."""

    def walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        inner = getattr(command, "commands", {})
        for name in inner:
            yield from walk(inner[name], (*words, name))
        if not inner:
            yield words

    return walk(typer.main.get_command(app), ())
