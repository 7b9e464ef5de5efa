"""The commits of aliases whose commit this package does not know: what their repository held when they were first used.

A repository's ``main`` moves. The first time that such an alias is loaded, the commit is recorded in the user's cache,
and every later use takes the same; so on one machine the alias names one artefact. Studies and plans record the commit
too. Imports no torch and touches no network.
"""

from __future__ import annotations

import json
import logging
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lpsearch.models.aliases import list_aliases
from lpsearch.models.cache import cache_directory

__all__ = ["find_commit", "record_commit"]

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")


def find_commit(repo_id: str) -> str | None:
    """Return the commit that was recorded for a repository; None if there is none."""
    entry = _read().get(repo_id)
    commit = entry.get("commit") if isinstance(entry, dict) else None
    return commit if isinstance(commit, str) and _COMMIT.fullmatch(commit) else None


def record_commit(repo_id: str, commit: str) -> None:
    """Record the commit of a repository that an alias without one names; the first one stays.

    A cache that cannot be written costs only a warning: the alias is then resolved again next time.
    """
    is_unknown = any(alias.kind == "hub" and alias.id == repo_id and alias.revision is None for alias in list_aliases())
    if not is_unknown or not _COMMIT.fullmatch(commit) or find_commit(repo_id) is not None:
        return
    entry = {"commit": commit, "recorded_at": datetime.now(UTC).isoformat(timespec="seconds")}
    path = _locate()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**_read(), repo_id: entry}, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        logger.warning("the commit of %s was not recorded: %s", repo_id, error)
        return
    logger.info("%s is at commit %s, which is taken from now on (recorded in %s)", repo_id, commit, path)


def _read() -> dict[str, Any]:
    path = _locate()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s); the commits of aliases are resolved again", path, error)
        return {}
    return entries if isinstance(entries, dict) else {}


def _locate() -> Path:
    return cache_directory() / "commits.json"
