"""A Griffe extension that turns the reStructuredText roles of docstrings into cross-references of the site."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(~?)([\w.]+)`")
_LITERAL = re.compile(r"::$", re.MULTILINE)
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


class Roles(griffe.Extension):
    """Turns ``:func:`lpsearch.load_plan``` into a link if the site has a page for it, else into code."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Rewrite an object's docstring."""
        if obj.docstring is not None:
            text = _ROLE.sub(
                lambda match: _build_reference(obj, match[2], is_short=bool(match[1])), obj.docstring.value
            )
            obj.docstring.value = _EXAMPLE.sub("Examples:", _LITERAL.sub(":", text))


def _build_reference(obj: griffe.Object, name: str, *, is_short: bool) -> str:
    shown = name.lstrip(".")
    shown = shown.rpartition(".")[2] if is_short else shown
    target = name if name.startswith("lpsearch") else f"{_find_scope(obj, name)}.{name}"
    return f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>'


def _find_scope(obj: griffe.Object, name: str) -> str:
    """Return the path of the nearest class or module that encloses an object and has a member of that name."""
    scope: griffe.Object | None = obj
    while scope is not None:
        if name.partition(".")[0] in scope.members:
            return scope.path
        scope = scope.parent  # type: ignore[assignment]
    return obj.module.path
