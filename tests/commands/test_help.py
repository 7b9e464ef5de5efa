"""The help: every command has an example that parses, and nothing is named anywhere that does not exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main

from lpsearch import __version__
from lpsearch.commands.app import app, main
from lpsearch.commands.examples import EXAMPLES
from lpsearch.commands.options import PANELS
from lpsearch.config import OptimizeConfig
from tests.commands.advice import find_foreign_options, list_commands

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = sorted((ROOT / "lpsearch").rglob("*.py")) + sorted((ROOT / "dashboards").rglob("*.py"))


def find_command(words: tuple[str, ...]) -> Any:
    command: Any = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    return command


@pytest.mark.parametrize("words", [*list_commands()], ids=" ".join)
def test_every_command_shows_its_help_and_an_example(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = []
    for option in ("-h", "--help"):
        with pytest.raises(SystemExit) as caught:
            main([*words, option])
        assert not caught.value.code
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert all(len(line) <= 80 for line in shown[0].splitlines())
    assert "…" not in shown[0], "no option or example is cut"
    said = " ".join(shown[0].split())
    for line in EXAMPLES[" ".join(words)]:
        assert line in said


def test_examples_parse() -> None:
    assert {*EXAMPLES} == {" ".join(words) for words in list_commands()}
    for name, lines in EXAMPLES.items():
        for line in lines:
            words = shlex.split(line.partition(" > ")[0])
            assert words[0] == "lpsearch"
            assert " ".join(words[1:]).startswith(name)
            call = app(args=words[1:], standalone_mode=False)
            assert callable(call.run), "parsed, and not run"


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert not caught.value.code
    assert capsys.readouterr().out == f"lpsearch {__version__}\n"


def test_every_option_of_optimize_is_in_a_group_and_says_its_default() -> None:
    shared = {"quiet", "json", "help"}
    options = {parameter.name for parameter in find_command(("optimize",)).params} - shared
    grouped = [name for names in PANELS.values() for name in names]
    assert sorted(grouped) == sorted(options)
    for name, field in OptimizeConfig.model_fields.items():
        if field.is_required() or field.default is None or field.default is False or field.default == ():
            assert re.search(r"default: |must be given|default is", field.description), name
    shown = {p.rich_help_panel for p in find_command(("optimize",)).params if p.name in options}
    assert shown == {*PANELS}


def list_command_lines(path: Path) -> list[str]:
    """Return the command lines of this program in a page's code and between backticks, or in a source's strings."""
    text = path.read_text(encoding="utf-8")
    lines = re.findall(r"`(lpsearch [^`]+)`", re.sub(r"\s*\n\s*", " ", text))
    if path.suffix == ".md":
        for fence in re.split(r"^ *```.*$", text, flags=re.MULTILINE)[1::2]:
            joined = fence.replace("\\\n", " ")
            lines += [line.strip() for line in joined.splitlines() if line.strip().startswith("lpsearch ")]
    # In a source, a sentence may run over several literals.
    return [re.sub(r'"\s+f?"', "", line) for line in lines]


def test_no_command_or_option_is_named_that_does_not_exist() -> None:
    names = {words[0] for words in list_commands()}
    inner = {words for words in list_commands() if len(words) == 2}
    checked = 0
    for path in [*PAGES, *SOURCES]:
        for line in list_command_lines(path):
            words = line.split("#")[0].replace("\\", "").split()[1:]
            if not words or words[0].startswith(("{", "-")):
                continue
            checked += 1
            assert words[0].strip(",.") in names, f"{path}: {line}"
            if words[0] in ("plan", "cache") and len(words) > 1 and not words[1].startswith(("{", "-")):
                for name in words[1].split("|"):
                    assert (words[0], name.strip(",.")) in inner, f"{path}: {line}"
                words[1] = words[1].split("|")[0]
            assert not find_foreign_options([words[0]], f"`lpsearch {' '.join(words)}`"), f"{path}: {line}"
    assert checked > 100


def test_no_extra_is_named_that_does_not_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {*project["optional-dependencies"]}
    named = {}
    for path in [*PAGES, *SOURCES]:
        for found in re.findall(r"(?:lpsearch|['\" ]\.)\[([a-z, -]+)\]", path.read_text(encoding="utf-8")):
            named |= {name.strip(): path for name in found.split(",")}
    assert len(named) >= 3
    assert not {name: str(path) for name, path in named.items() if name not in extras}
