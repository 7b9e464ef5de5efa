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
    "mask_urls",
    "shorten",
]

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_LONGEST_MESSAGE = 600
_URL = re.compile(r"(?P<begin>(?P<scheme>[A-Za-z][\w+.-]*):/{1,2})(?P<rest>\S+?)(?=['\",;.)\]]*(?:\s|$))")
_PLACE = re.compile(r"(?P<user>[^:/?@]*)(?P<password>:[^?@]*)?@(?P<host>[^@]*)")
_HOST = re.compile(r"(\[[^\]@]*\]|[^:/?@\[]*)(:\d*)?([/?].*)?")
_PUBLIC_FIELDS = frozenset(
    {"application_name", "charset", "client_encoding", "connect_timeout", "host", "port", "sslmode", "timeout", "uri"}
)
"""Fields of a URL's query whose values are shown."""

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
    return shorten(text, longest=_LONGEST_MESSAGE)


def shorten(text: str, *, longest: int) -> str:
    """Return a text without its middle where it is longer than so many characters: the end often says what to do."""
    return text if len(text) <= longest else f"{text[: longest * 2 // 3]} ... {text[-longest // 3 :]}"


def mask_urls(text: str) -> str:
    """Return a text whose URLs tell no secret: no password, and of a query only what is known to be harmless.

    Of a URL that can be read in two ways, as where a password holds an ``@``, only the scheme is left. A URL that was
    taken for a path, and lost a slash by that, is masked too; a path on this machine is no secret. Everything that may
    hold a URL passes here before it is shown or kept.
    """
    return _URL.sub(_mask_url, text)


def _mask_url(match: re.Match[str]) -> str:
    begin, rest = match["begin"], match["rest"]
    if match["scheme"].lower().partition("+")[0] in ("sqlite", "file"):
        return match[0]
    place, hidden = rest, begin + "***"
    if "@" in rest:
        parts = _PLACE.fullmatch(rest)
        if parts is None:
            return hidden
        begin += parts["user"] + (":***" if parts["password"] else "") + "@"
        place = parts["host"]
    if _HOST.fullmatch(place) is None:
        return hidden  # also a password that is taken for a port
    where, mark, query = place.partition("?")
    return begin + where + mark + "&".join(map(_mask_field, query.split("&")))


def _mask_field(field: str) -> str:
    name, equals, _ = field.partition("=")
    if equals:
        return field if name in _PUBLIC_FIELDS else f"{name}=***"
    return "***" if field else ""
