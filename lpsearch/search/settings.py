"""What a study records about itself, and what may not change when it is resumed."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from lpsearch.errors import ResumeError

__all__ = ["FIXED_SETTINGS", "compare_settings"]

logger = logging.getLogger(__name__)

FIXED_SETTINGS = (
    "model",
    "fingerprint",
    "num_layers",
    "data",
    "heldout",
    "windows",
    "seq_len",
    "dtype",
    "metric",
    "objective",
    "max_group",
)
"""Settings that define what a trial's values mean: changing one would mix values that cannot be compared."""


def compare_settings(recorded: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    """Refuse to resume a study with settings that would make its trials incomparable.

    Only names that both sides have are compared, so an option that was not given can be left out of ``requested``. A
    different sampler is allowed and logged: the values stay comparable, but not the search.

    Args:
        recorded: settings that the study was begun with, JSON values.
        requested: settings of this run.

    Raises:
        ResumeError: with every difference, both values, and how to mend it.
    """
    differences = [
        f"--{name.replace('_', '-')} was {_show(recorded[name])}, now {_show(requested[name])}"
        for name in FIXED_SETTINGS
        if name in recorded and name in requested and _show(recorded[name]) != _show(requested[name])
    ]
    if differences:
        raise ResumeError(
            f"the study was begun with other settings: {'; '.join(differences)}. Repeat the command with the recorded "
            "values to resume it, add --fresh to move the old study aside, or name another directory with --out"
        )
    begun_with, now = recorded.get("sampler"), requested.get("sampler")
    if begun_with is not None and now is not None and begun_with != now:
        logger.warning("the study was begun with the sampler %s and goes on with %s", begun_with, now)


def _show(value: Any) -> str:
    """Write a value as compact JSON, which also makes tuples and lists equal."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
