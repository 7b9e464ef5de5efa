"""MkDocs hooks: pages made from the code and the repository's own files, so that no page repeats what can drift.

Pages link to files of the repository as GitHub resolves them, e.g. ``../lpsearch/models/families.py``. In the built
site such a link leads to the page of that file: an included one (CHANGELOG, CONTRIBUTING, results), or its source. A
link to nothing is a warning, and the build is strict.

Where a page says ``<!-- generated: NAME -->``, what the function of that name in ``GENERATED`` returns stands instead.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from plotly.offline import get_plotlyjs

ROOT = Path(__file__).parents[1]

INCLUDED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "studies/LOG.md": "log.md",
    "studies/RESULTS.md": "results.md",
}
"""Files of the repository that have a page; README's is the home page, which is written for the site."""

LANGUAGES = {".py": "python", ".toml": "toml", ".json": "json", ".cff": "yaml", ".yml": "yaml", ".txt": "text"}

logger = logging.getLogger("mkdocs.hooks.lpsearch")

_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_MARK = re.compile(r"^<!-- generated: ([a-z-]+) -->$", re.MULTILINE)
_FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of included files, and of every source that a page links to."""
    for path, uri in INCLUDED.items():
        if path != "README.md":
            files.append(File.generated(config, uri, content=(ROOT / path).read_text(encoding="utf-8")))
    linked = {
        path for file in files.documentation_pages() for path in _list_linked_files(file.content_string, file.src_uri)
    }
    for path in sorted(linked - {*INCLUDED}):
        files.append(File.generated(config, _source_uri(path), content=_build_source_page(path)))
    files.append(File.generated(config, "fronts/plotly.min.js", content=get_plotlyjs()))  # the pages there share it
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Resolve links to the repository's files, and put in what is generated."""
    markdown = _map_links(markdown, lambda link: _resolve(link, page.file.src_uri))
    return _MARK.sub(lambda match: GENERATED[match[1]](), markdown)


def _origin(uri: str) -> PurePosixPath:
    """Return the directory, in the repository, of the file that a page was made from."""
    for path, included_uri in INCLUDED.items():
        if included_uri == uri and uri != "index.md":
            return PurePosixPath(path).parent
    return PurePosixPath("docs", uri).parent


def _locate(link: str, uri: str) -> str | None:
    """Return the file of the repository that a relative link of a page means; None for a page or another host."""
    if "://" in link or link.startswith(("/", "mailto:")):
        return None
    path = os.path.normpath(_origin(uri) / link)
    return None if PurePosixPath(path).parts[:1] == ("docs",) and _origin(uri).parts[:1] == ("docs",) else path


def _list_linked_files(markdown: str, uri: str) -> Iterator[str]:
    links: list[str] = []
    _map_links(markdown, lambda link: links.append(link) or link)
    for link in links:
        path = _locate(link, uri)
        if path is not None and not path.startswith("docs/") and (ROOT / path).is_file():
            yield path


def _resolve(link: str, uri: str) -> str:
    """Return a link as MkDocs wants it: from page to page."""
    path = _locate(link, uri)
    if path is None:
        return link
    if not (ROOT / path).is_file():
        logger.warning("%s links to %s, which is no file of the repository", uri, link)
        return link
    target = INCLUDED.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else _source_uri(path))
    return os.path.relpath(target, PurePosixPath(uri).parent)


def _map_links(markdown: str, change: Callable[[str], str]) -> str:
    """Apply a function to the target of every link outside fenced code."""
    parts, end = [], 0
    for fence in [*_FENCED.finditer(markdown), None]:
        text = markdown[end : fence.start() if fence else None]
        parts.append(_LINK.sub(lambda match: match[1] + change(match[2]) + match[3], text))
        if fence is not None:
            parts.append(fence[0])
            end = fence.end()
    return "".join(parts)


def _source_uri(path: str) -> str:
    return f"source/{path}.md"


def _build_source_page(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    language = LANGUAGES.get(PurePosixPath(path).suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n~~~~{language}\n{text}~~~~\n"


def build_commands() -> str:
    """Describe every command and its options, from the declarations of the command line."""
    from lpsearch.commands.app import app

    parts = list(_describe_commands(app, "lpsearch", level=2))
    for group in app.registered_groups:
        parts += [f"## lpsearch {group.name}\n\n{group.typer_instance.info.help}\n"]
        parts += _describe_commands(group.typer_instance, f"lpsearch {group.name}", level=3)
    return "\n".join(parts)


def _describe_commands(app: Any, prefix: str, *, level: int) -> Iterator[str]:
    for command in app.registered_commands:
        name = f"{prefix} {command.name or command.callback.__name__.replace('_', '-')}"
        hints = get_type_hints(command.callback, include_extras=True)
        parameters = [
            _Parameter(parameter, *get_args(hints[parameter.name]))
            for parameter in inspect.signature(command.callback).parameters.values()
        ]
        arguments = [parameter for parameter in parameters if parameter.is_argument]
        options = [parameter for parameter in parameters if not parameter.is_argument]
        usage = [name, *(argument.metavar for argument in arguments), *(["[OPTIONS]"] if options else [])]
        yield f"{'#' * level} {name}\n\n{inspect.getdoc(command.callback)}\n\n```\n{' '.join(usage)}\n```\n"
        if parameters:
            has_default = any(row.default for row in options)
            columns = ["name", "default", "meaning"] if has_default else ["name", "meaning"]
            yield f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
            for row in [*arguments, *options]:
                default = f" {row.default} |" if has_default else ""
                yield f"| {row.names} |{default} {_cell(row.info.help)} |"
            yield ""


@dataclass(frozen=True)
class _Parameter:
    """A parameter of a command: its name and default, its type, and typer's description of it."""

    parameter: inspect.Parameter
    hint: Any
    info: Any

    @property
    def is_argument(self) -> bool:
        return type(self.info).__name__ == "ArgumentInfo"

    @property
    def kind(self) -> Any:
        """The type of a value that is given: of one, where several may be."""
        [kind] = (
            [kind for kind in get_args(self.hint) if kind is not NoneType]
            if get_origin(self.hint) in (Union, UnionType)
            else [self.hint]
        )
        return get_args(kind)[0] if get_origin(kind) is list else kind

    @property
    def metavar(self) -> str:
        return str(self.info.metavar or self.parameter.name.upper())

    @property
    def names(self) -> str:
        if self.is_argument:
            return f"`{self.metavar}`"
        # The first name stands where typer takes a default outside of Annotated.
        given = [text for text in (self.info.default, *(self.info.param_decls or ())) if isinstance(text, str)]
        declared = given or [f"--{self.parameter.name.replace('_', '-')}"]
        names = " ".join(f"`{name}`" for text in declared for name in text.split("/"))
        if self.kind is bool:
            return names
        if get_origin(self.kind) is Literal:
            return f"{names} " + ", ".join(f"`{choice}`" for choice in get_args(self.kind))
        words = {int: "N", float: "X", Path: "FILE"}
        return f"{names} `{self.info.metavar or words.get(self.kind, 'TEXT')}`"

    @property
    def default(self) -> str:
        default = self.parameter.default
        if default is inspect.Parameter.empty:
            return "" if self.is_argument else "required"
        if isinstance(self.info.show_default, str):  # of an option that a file or a preset may set instead
            default = self.info.show_default
        return "" if default in (None, False) else f"`{default}`"


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


def build_plan_fields() -> str:
    """Describe every field of the plan file, from its JSON Schema."""
    from lpsearch.plan import build_plan_schema

    schema = build_plan_schema()
    parts = ["| field | type | required |\n|---|---|---|", *_list_fields(schema), ""]
    for name, definition in schema["$defs"].items():
        summary, _, attributes = definition["description"].partition("\n\nAttributes:\n")
        meanings = dict(re.findall(r"^    (\w+): (.*(?:\n      .*)*)", attributes, re.MULTILINE))
        parts += [f"### {name}\n\n{_plain(summary)}\n", "| field | type | required | |\n|---|---|---|---|"]
        parts += [f"{row} {_cell(_plain(meanings.get(field, '')))} |" for field, row in _zip_fields(definition)]
        parts.append("")
    return "\n".join(parts)


def _zip_fields(definition: dict[str, Any]) -> Iterator[tuple[str, str]]:
    return zip(definition["properties"], _list_fields(definition), strict=True)


def _list_fields(definition: dict[str, Any]) -> Iterator[str]:
    for name, field in definition["properties"].items():
        yield f"| `{name}` | {_cell(_name_type(field))} | {'yes' if name in definition.get('required', ()) else ''} |"


def _name_type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in field:
        return " or ".join(_name_type(option) for option in field["anyOf"])
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "enum" in field:
        return " or ".join(f"`{json.dumps(value)}`" for value in field["enum"])
    if field["type"] == "array":
        return f"list of {_name_type(field['items'])}"
    if field["type"] == "object":
        return "object of strings"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = ", ".join(f"{sign} {field[key]}" for key, sign in bounds.items() if key in field)
    return f"{field['type']} {limits}".strip()


def _plain(text: str) -> str:
    """Turn a docstring's marks into those of Markdown."""
    return " ".join(re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", text).replace("``", "`").split())


def build_plan_schema_block() -> str:
    """Return the JSON Schema of the plan file as a block of code."""
    from lpsearch.plan import build_plan_schema

    return f"```json\n{json.dumps(build_plan_schema(), indent=2)}\n```"


def build_families() -> str:
    """List what works for which family, from the entries that the code goes by and transformers' configurations."""
    from transformers import AutoConfig

    from lpsearch.models.traits import FAMILIES, read_traits

    rows = ["| model type | search and run | fuse and export | latency as wide layers |\n|---|---|---|---|"]
    for family, entry in FAMILIES.items():
        option = entry.block.parallel if isinstance(entry.block.parallel, str) else None
        for values in [{}] if option is None else [{option: True}, {option: False}]:
            traits = read_traits(AutoConfig.for_model(family, **values))
            obstacles = (traits.fusing_obstacle, traits.runtime_obstacle)
            columns = ["yes" if obstacle is None else "" for obstacle in obstacles]
            name = f"`{family}`" + "".join(f", `{option}: {json.dumps(value)}`" for option, value in values.items())
            rows.append(f"| {name} | yes | {' | '.join(columns)} |")
    return "\n".join(rows)


def build_aliases() -> str:
    """List the aliases that ``--model`` takes."""
    from lpsearch.models import list_aliases

    rows = ["| alias | layers | parameters | from | revision |\n|---|---|---|---|---|"]
    for alias in list_aliases():
        origin = f"hub: `{alias.id}`" if alias.kind == "hub" else f"package index: `{alias.id}`, {alias.title}"
        size = f"{alias.num_parameters / 1e9:.2f} B"
        revision = "that of the first use" if alias.revision is None else f"`{alias.revision[:10]}`"
        rows.append(f"| `{alias.name}` | {alias.num_layers} | {size} | {origin} | {revision} |")
    return "\n".join(rows)


GENERATED: dict[str, Callable[[], str]] = {
    "aliases": build_aliases,
    "commands": build_commands,
    "families": build_families,
    "plan-fields": build_plan_fields,
    "plan-schema": build_plan_schema_block,
}
