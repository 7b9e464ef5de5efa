"""Versions of what produces results, as plans, profiles and studies record them."""

from __future__ import annotations

import platform
from importlib.metadata import version

__all__ = ["read_versions"]

__version__ = "0.1.0"

_PACKAGES = ("optuna", "torch", "transformers")


def read_versions() -> dict[str, str]:
    """Return the versions of Python, lpsearch and the packages that decide its numbers."""
    packages = {name: version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "lpsearch": __version__, **packages}
