"""How plans, values and counts are written for people, on a terminal as in reports."""

from __future__ import annotations

from lpsearch.plan import Plan

__all__ = ["describe_layers", "format_value", "name_count"]


def describe_layers(plan: Plan) -> str:
    """Write the groups of several layers, e.g. ``3-4 7-9``; empty for the unmodified model."""
    return " ".join(f"{group[0]}-{group[-1]}" for group in plan.groups if len(group) > 1)


def name_count(count: int, noun: str) -> str:
    """Say how many of a thing there are, e.g. ``1 join``, ``1,200 joins``."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def format_value(value: float, standard_error: float | None, *, digits: int = 4, sign: str = " ± ") -> str:
    """Write a value with its standard error."""
    return f"{value:.{digits}f}" + (f"{sign}{standard_error:.{digits}f}" if standard_error else "")
