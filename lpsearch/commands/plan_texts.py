"""The texts that a plan file names."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from lpsearch.errors import DataError, PlanError, shorten
from lpsearch.kinds import TextKind

__all__ = ["check_texts_of_plan"]


def check_texts_of_plan(kinds: Iterable[TextKind]) -> None:
    """Refuse a text that a plan names by a path relative to wherever the command runs.

    Args:
        kinds: texts as a plan file names them; one that is not there is refused when it is read.

    Raises:
        PlanError: naming the first such path.
    """
    from lpsearch.data.texts import resolve_text

    for kind in kinds:
        with suppress(DataError):
            if kind.spec == "self" or resolve_text(kind.spec, split="proxy").kind == "hub":
                continue
            if not Path(kind.spec).is_absolute():  # a file that happens to be here
                raise PlanError(
                    f"the plan names a text {shorten(kind.spec, longest=200)!r}, which would be a file here; a plan "
                    "names a file by its whole path: name the text with --data"
                )
