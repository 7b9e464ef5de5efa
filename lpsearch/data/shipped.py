"""Windows that were sampled from the packaged models and come with this package.

Sampling takes a token after the other, a minute or two on CPU cores, and machines that round differently draw other
tokens from some place on. With windows that come along, a search begins at once and sees the same text everywhere.
``studies/packaged_windows.py`` makes them; ``index.json`` beside them says of what.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable

from pydantic import BaseModel, ConfigDict, TypeAdapter

from lpsearch.config import Split

__all__ = ["ShippedWindows", "find_shipped", "list_shipped", "name_sampled"]

_DIRECTORY = "sampled_windows"


class ShippedWindows(BaseModel):
    """What one of the files holds.

    Attributes:
        file: its name.
        model: alias of the model.
        split: ``proxy`` or ``heldout``.
        seed: of the sampling.
        windows: number of windows.
        seq_len: tokens in a window, the first included.
        parts: fingerprints of the model's parts, see :func:`lpsearch.models.fingerprint_parts`.
        sha256: of the tokens, see :attr:`lpsearch.data.Windows.sha256`.
        dtype: of the weights that they were sampled with.
        versions: of the packages that sampled them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    model: str
    split: Split
    seed: int
    windows: int
    seq_len: int
    parts: dict[str, str]
    sha256: str
    dtype: str
    versions: dict[str, str]


def name_sampled(*, split: Split, seed: int, parts: Mapping[str, str], num_windows: int, seq_len: int) -> str:
    """Name the file of sampled windows by all that decides them.

    The dtype does not: a search samples before it settles one, and its plans are evaluated on the same windows later.
    """
    key = "-".join(map(str, (split, seed, *parts.values(), num_windows, seq_len)))
    return f"self-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"


def find_shipped(name: str) -> Traversable | None:
    """Return the file of that name if it comes with the package."""
    return _locate() / name if any(shipped.file == name for shipped in list_shipped()) else None


@cache
def list_shipped() -> tuple[ShippedWindows, ...]:
    """List the files that come with the package."""
    entries = json.loads((_locate() / "index.json").read_text(encoding="utf-8"))
    return TypeAdapter(tuple[ShippedWindows, ...]).validate_python(entries)


def _locate() -> Traversable:
    return resources.files(__package__) / _DIRECTORY
