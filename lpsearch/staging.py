"""Directories and files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lpsearch.errors import LpsearchError, UsageError

__all__ = ["check_disk", "check_target", "staged", "staged_file"]


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


def check_disk(target: Path, needed_bytes: int, *, what: str, advice: str) -> None:
    """Refuse a disk without room for what is to be written.

    Args:
        target: file or directory to write.
        needed_bytes: what it takes.
        what: what is written, for the message, e.g. ``file``.
        advice: what else to do than to free some space.

    Raises:
        LpsearchError: saying what is needed and what is free.
    """
    parent = next(parent for parent in target.absolute().parents if parent.is_dir())
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < needed_bytes:
        raise LpsearchError(
            f"{target}: the {what} needs {needed_bytes / 1e9:.2f} GB and {free_bytes / 1e9:.2f} GB are free; free some "
            f"space, {advice}"
        )


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
