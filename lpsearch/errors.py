"""The one exception tree of lpsearch, with the exit code of each branch.

Every message says what was found, where, what was expected and how to mend it; commands print it without a
traceback.
"""

from __future__ import annotations

import re

__all__ = [
    "ConfigError",
    "DataError",
    "FamilyError",
    "LpsearchError",
    "ModelError",
    "PlanError",
    "ResumeError",
    "SourceError",
    "StudyError",
    "StudyVersionError",
    "UsageError",
    "describe_error",
]

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_LONGEST_MESSAGE = 600
_TERMINAL_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class LpsearchError(Exception):
    """Base of every error that lpsearch raises on purpose."""

    exit_code = EXIT_FAILED


class StudyError(LpsearchError):
    """A study that cannot be read or written: corrupt, unreachable, locked by another process, disk full."""


class StudyVersionError(StudyError):
    """A study that another version of lpsearch or of Optuna wrote, in a form that this one does not read."""

    exit_code = EXIT_USAGE


class SourceError(LpsearchError):
    """A model or dataset that exists by name but cannot be fetched now: gated, or its host is out of reach."""


class UsageError(LpsearchError, ValueError):
    """Wrong usage or input; mending the command or the file mends it."""

    exit_code = EXIT_USAGE


class ConfigError(UsageError):
    """An option, a configuration file or a preset with an unknown name or an impossible value."""


class DataError(UsageError):
    """Evaluation text that is missing, empty, too short or not in the expected form."""


class ModelError(UsageError):
    """A model that is unknown, missing or not usable: a bad alias, path, geometry or tokenizer."""


class FamilyError(ModelError):
    """A model family whose decoder layers lpsearch does not understand; refused rather than run wrongly."""


class PlanError(UsageError):
    """A plan that is malformed or was made for another model."""


class ResumeError(UsageError):
    """A study continued with settings that differ from those it was begun with."""


def describe_error(error: BaseException) -> str:
    """Return the whole message of another library's error as one paragraph, with its type where it says little.

    What is longer than 600 characters loses its middle: many libraries put the cause last.
    """
    text = " ".join(_TERMINAL_COLOUR.sub("", str(error)).split())
    if not text:
        return type(error).__name__
    if isinstance(error, KeyError):  # its message is the key alone
        text = f"{type(error).__name__}: {text}"
    if len(text) > _LONGEST_MESSAGE:
        text = f"{text[: _LONGEST_MESSAGE * 2 // 3]} ... {text[-_LONGEST_MESSAGE // 3 :]}"
    return text
