"""Where a command writes what it measures: checked before it measures."""

from __future__ import annotations

import os
from pathlib import Path

from lpsearch.errors import LpsearchError, UsageError

__all__ = ["check_output_file", "prepare_directory"]


def check_output_file(path: Path, *, option: str = "--out") -> None:
    """Refuse a file that is to be written later and cannot be.

    Args:
        path: the file; one that is there will be replaced.
        option: that names it.

    Raises:
        UsageError: if the path is something other than a file, or its directory does not exist.
        LpsearchError: if no file can be written there.
    """
    try:
        if path.is_dir():
            raise UsageError(f"{option} {path}: is a directory; name a file in it")
        if path.exists() and not path.is_file():
            raise UsageError(f"{option} {path}: is not a regular file, and would be replaced by one; name another")
        if not path.parent.is_dir():
            raise UsageError(f"{option} {path}: not a file in a directory that exists; make it, or name another place")
    except OSError as error:  # a name longer than any file has, or a directory that may not be read
        raise LpsearchError(f"{option} {path}: cannot be written ({error}); name another place") from None
    prepare_directory(path.parent, option=option, file_name=path.name)


def prepare_directory(directory: Path, *, option: str = "--out", file_name: str = "check") -> None:
    """Make a directory, and check that a file can be written in it.

    Args:
        directory: may be there.
        option: that names it.
        file_name: of a file that will be written, which may be too long for the file system.

    Raises:
        LpsearchError: if not.
    """
    # Files are written beside their place under a name of this form, then renamed.
    probe = directory / f".{file_name}.{os.getpid()}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"\0" * 4096)
        finally:
            probe.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise LpsearchError(f"{directory}: cannot be written ({error}); choose another place with {option}") from None
