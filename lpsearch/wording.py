"""How plans, values, counts and foreign text are written for people, on a terminal as in reports."""

from __future__ import annotations

import html
import re
import shlex
from pathlib import Path

from lpsearch.plan import Plan

__all__ = [
    "describe_changes",
    "describe_delta",
    "describe_layers",
    "describe_origin",
    "describe_repair",
    "describe_speedup",
    "describe_unfinished",
    "escape_controls",
    "escape_html",
    "format_value",
    "name_count",
]

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_BRANCH_NAMES = {"attention": "attention", "mlp": "MLP"}
_ORIGIN_NAMES = {
    "programme": "dynamic program",
    "surrogate": "expected improvement",
}
"""What people call what proposed a plan, where the search notes another word."""

_LINE_END = re.compile("[\n\u2028\u2029]")


def escape_controls(text: str, *, in_one_line: bool = False) -> str:
    r"""Show the control characters of a text as such, e.g. ``\x1b`` for ESC, so that no terminal obeys them.

    Those are the sets C0 and C1, and what reorders a line (bidirectional embeddings, overrides and isolates; Boucher
    and Anderson, "Trojan Source", arXiv 2111.00169). A tab stays.

    Args:
        text: may come from a file, a model or another program.
        in_one_line: show line ends too; otherwise they stay.
    """
    escaped = _CONTROL.sub(_escape, text)
    return _LINE_END.sub(_escape, escaped) if in_one_line else escaped


def escape_html(text: str) -> str:
    """Return a text as HTML that shows it; a browser, too, obeys what reorders a line."""
    return html.escape(escape_controls(text))


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def describe_layers(plan: Plan) -> str:
    """Write the groups of several layers and the dropped branches; empty for the unmodified model.

    For example ``3-4 7-9``, ``without attention 5, 7`` or ``3-4 7-9; without attention 5, 7; without MLP 14``.
    """
    groups = " ".join(f"{group[0]}-{group[-1]}" for group in plan.groups if len(group) > 1)
    dropped = [
        f"without {_BRANCH_NAMES[branch]} {', '.join(map(str, layers))}"
        for branch, layers in plan.dropped.items()
        if layers
    ]
    return "; ".join([groups] * bool(groups) + dropped)


def describe_changes(plan: Plan) -> str:
    """Count the joins and the dropped branches, e.g. ``6 joins, 2 attentions and 1 MLP dropped``; else ``0 joins``."""
    dropped = [name_count(len(layers), _BRANCH_NAMES[branch]) for branch, layers in plan.dropped.items() if layers]
    joins = [name_count(plan.num_joins, "join")] if plan.num_joins or not dropped else []
    return ", ".join([*joins, *([f"{' and '.join(dropped)} dropped"] if dropped else [])])


def describe_repair(plan: Plan, path: Path) -> str | None:
    """Say that the losses in a plan file hold for repaired weights, which it does not hold; None where they do not.

    Args:
        plan: as it was loaded.
        path: its file, as commands are to name it.
    """
    metadata = plan.metadata
    if metadata is None or metadata.provenance.recovery is not None:  # the directory holds repaired weights
        return None
    measured = (metadata.metrics.proxy, metadata.metrics.heldout)
    if all(found is None or found.variant == "raw" for found in measured):
        return None
    command = shlex.join(["lpsearch", "recover", str(path), "--method", "refit", "--out"])
    return (
        f"{path}: its losses are those after a refit of the weights, which a plan file does not hold; "
        f"`{command} DIR` writes them"
    )


def describe_delta(delta_nll: float, *, digits: int = 3) -> str:
    """Say what a plan loses, in nats per token, e.g. ``loses 0.225``, or ``loses nothing (-0.038)``."""
    return f"loses {delta_nll:.{digits}f}" if delta_nll >= 0 else f"loses nothing ({delta_nll:.{digits}f})"


def describe_origin(origin: str) -> str:
    """Name what proposed a plan, e.g. ``dynamic program`` for what the search notes as ``programme``."""
    return _ORIGIN_NAMES.get(origin, origin)


def describe_speedup(speedup: float, margin: float | None) -> str:
    """Write an estimated speed-up, and by how much it may be off, e.g. ``1.179x ±0.5%``."""
    return f"{speedup:.3f}x" + (" estimated" if margin is None else f" ±{margin:.1%}")


def describe_unfinished(directory: Path) -> str:
    """Say that a front is of a search that has not ended."""
    return (
        f"{directory}: unfinished, since its search is under way or was interrupted; plans without a held-out loss "
        "were not checked yet"
    )


def name_count(count: int, noun: str) -> str:
    """Say how many of a thing there are, e.g. ``1 join``, ``1,200 joins``."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def format_value(value: float, standard_error: float | None, *, digits: int = 4, sign: str = " ± ") -> str:
    """Write a value with its standard error."""
    return f"{value:.{digits}f}" + (f"{sign}{standard_error:.{digits}f}" if standard_error else "")
