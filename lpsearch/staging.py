"""Directories and files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lpsearch.errors import UsageError

__all__ = ["check_target", "staged", "staged_file"]


def check_target(target: Path) -> None:
    """Refuse a target that is there and is anything but an empty directory.

    Raises:
        UsageError: if it is.
    """
    if target.is_dir():
        if any(target.iterdir()):
            raise UsageError(f"{target} is not empty; name a new directory, or empty this one")
    elif target.exists() or target.is_symlink():
        raise UsageError(f"{target} is a file; name a new directory")


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Fill a directory that then appears under its final name in one step, or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield staging
        staging.chmod(0o755)
        staging.rename(target)  # which replaces an empty directory
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Write a file that then appears under its final name in one step, or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(descriptor)
    staging = Path(name)
    try:
        yield staging
        staging.chmod(0o644)
        staging.rename(target)
    finally:
        staging.unlink(missing_ok=True)
