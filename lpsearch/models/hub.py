"""Models of the Hugging Face hub: found within a time limit, downloaded, or taken from the local cache."""

from __future__ import annotations

import io
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, RepoFile, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging as hub_logging
from tqdm.auto import tqdm

from lpsearch.errors import LpsearchError, ModelError, SourceError, describe_error
from lpsearch.models.packaged import LICENCE_NAMES

__all__ = ["ANSWER_LIMIT_S", "call_within", "fetch_config", "fetch_snapshot"]

logger = logging.getLogger(__name__)

ANSWER_LIMIT_S = 6.0
"""Seconds within which the hub must have said whether it has a model; a download may then take as long as it takes.

With the imports, a command that asks in vain ends within 15 seconds.
"""

_CACHED_ANSWER_LIMIT_S = 5.0

_COMMIT = re.compile(r"[0-9a-f]{40}")
_WANTED_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")
_INDEX_NAME = "model.safetensors.index.json"
_WEIGHTS_NAME = "model.safetensors"
_CARD_NAME = "README.md"

_Result = TypeVar("_Result")


def fetch_snapshot(
    repo_id: str, *, revision: str, with_code: bool = False, on_bytes: Callable[[int, int], None] | None = None
) -> Path:
    """Return a local directory with the configuration, tokenizer and safetensors weights of a hub model.

    A complete snapshot in the local cache is used without any network if ``revision`` is a commit, and with a warning
    if the hub cannot be asked what ``revision`` is now. The directory's name is the commit.

    Args:
        repo_id: ``owner/name``.
        revision: commit, branch or tag.
        with_code: download the repository's own Python files too.
        on_bytes: called with the bytes that are there and the bytes in all while files are downloaded, by several
            threads; the hub client then draws no bars of its own.

    Raises:
        ModelError: if there is no such model or revision, or it has no safetensors weights.
        SourceError: if it is gated, or the hub cannot be reached and the cache has no complete copy.
    """
    cached = _find_cached_snapshot(repo_id, revision)
    usable = cached is not None and _is_complete(cached)
    if cached is not None and usable and _COMMIT.fullmatch(revision):
        return cached
    limit_s = _CACHED_ANSWER_LIMIT_S if usable else ANSWER_LIMIT_S
    try:
        commit, sizes = call_within(limit_s, lambda: _list_files(repo_id, revision))
        chosen = _select_files(repo_id, [*sizes], with_code=with_code)
        num_bytes = sum(sizes[name] for name in chosen)
        logger.info("fetching %s at %s: %.2f GB, as far as it is not here", repo_id, commit, num_bytes / 1e9)
        bars = None if on_bytes is None else _count_bytes(on_bytes, num_bytes)
        snapshot = Path(snapshot_download(repo_id, revision=commit, allow_patterns=chosen, tqdm_class=bars))
        if on_bytes is not None:
            on_bytes(num_bytes, num_bytes)  # files that were here before are not counted by the client
        return snapshot
    except Exception as error:
        failure = _describe_failure(repo_id, revision, error)
    if isinstance(failure, SourceError) and cached is not None and usable:
        logger.warning("%s: using the cached commit %s, since the hub cannot be asked", repo_id, cached.name)
        return cached
    raise failure


def fetch_config(repo_id: str, *, revision: str) -> Path:
    """Return a local directory that holds at least the ``config.json`` of a hub model, without its weights.

    Raises:
        ModelError: if there is no such model or revision, or it has no ``config.json``.
        SourceError: if it is gated, or the hub cannot be reached and the cache has no copy.
    """
    cached = _find_cached_snapshot(repo_id, revision)
    if cached is not None and _COMMIT.fullmatch(revision):
        return cached
    try:
        return call_within(ANSWER_LIMIT_S, lambda: _download_config(repo_id, revision)).parent
    except Exception as error:
        failure = _describe_failure(repo_id, revision, error)
    if isinstance(failure, SourceError) and cached is not None:
        return cached
    raise failure


def call_within(limit_s: float, function: Callable[[], _Result]) -> _Result:
    """Call a function that waits for the network, for at most so many seconds.

    Neither name resolution nor the retries of the hub client have a limit of their own, so the call is left behind in
    a daemon thread when the time is over.

    Args:
        limit_s: seconds to wait.
        function: what to call.

    Raises:
        TimeoutError: if the time is over.
        Exception: whatever the function raises.
    """
    results: list[_Result] = []
    failures: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=call, name="lpsearch-network", daemon=True)
    thread.start()
    thread.join(limit_s)
    if failures:
        raise failures[0]
    if not results:
        raise TimeoutError(f"no answer within {limit_s:g} seconds")
    return results[0]


def _download_config(repo_id: str, revision: str) -> Path:
    """Download ``config.json``, which also says whether the model is there and may be read."""
    with _quiet_client():
        return Path(hf_hub_download(repo_id, "config.json", revision=revision))


def _list_files(repo_id: str, revision: str) -> tuple[str, dict[str, int]]:
    """Return the commit that a revision is now, and the size in bytes of each of its files."""
    commit = _download_config(repo_id, revision).parent.name
    with _quiet_client():
        tree = HfApi().list_repo_tree(repo_id, recursive=True, revision=commit)
        return commit, {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}


def _count_bytes(on_bytes: Callable[[int, int], None], total: int) -> type[tqdm]:
    """Make what the hub client takes for its bars: it draws nothing, and tells of the bytes that are there."""

    class Counter(tqdm):  # type: ignore[misc]
        """Counts; the client makes one that counts bytes, one that counts those on the wire, and one of files."""

        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            updated: bool | None = super().update(n)
            if self.unit == "B" and self.n:
                on_bytes(min(int(self.n), total), total)
            return updated

    return Counter


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Silence the hub client's account of its retries; what comes of them is reported once, as an error."""
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)


def _select_files(repo_id: str, names: Sequence[str], *, with_code: bool) -> list[str]:
    """Choose what to download: the top-level configuration, tokenizer and weights, each weight once.

    Raises:
        ModelError: if there are no safetensors weights.
    """
    suffixes = (*_WANTED_SUFFIXES, ".py") if with_code else _WANTED_SUFFIXES
    # "consolidated" files repeat all the weights in their publisher's own form; card and licence go with an export.
    top = [name for name in names if "/" not in name and not name.startswith("consolidated")]
    chosen = [n for n in top if n.endswith(suffixes) or n == _CARD_NAME or n.startswith(LICENCE_NAMES)]
    if not any(name.endswith(".safetensors") for name in chosen):
        pickles = sorted(name for name in names if name.endswith((".bin", ".pth", ".pt")))
        files = sorted(name for name in names if name.endswith(".gguf"))
        found, mend = "", "give a repository that has safetensors"
        if files:
            found = f", only {', '.join(files[:3])}"
            mend = f"download one (`hf download {repo_id} {files[0]} --local-dir DIRECTORY`) and give the .gguf file"
        elif pickles:
            found = f", only {', '.join(pickles[:3])}, and pickles, which can run any code, are not loaded"
            mend += ", a converted local directory, or a .gguf file"
        raise ModelError(f"{repo_id} has no safetensors weights{found}; {mend}")
    return chosen


def _find_cached_snapshot(repo_id: str, revision: str) -> Path | None:
    """Return the directory of a cached snapshot, or None; it may lack files."""
    try:
        found = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _is_complete(snapshot: Path) -> bool:
    """Say whether a snapshot has all of its weights and a tokenizer."""
    index = snapshot / _INDEX_NAME
    names = {_WEIGHTS_NAME}
    if index.exists():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError):
            return False
    has_tokenizer = any(snapshot.glob("tokenizer*")) or any(snapshot.glob("vocab*"))
    return has_tokenizer and all((snapshot / name).exists() for name in names)


def _describe_failure(repo_id: str, revision: str, error: Exception) -> LpsearchError:
    """Turn what the hub client raised into one error that says what to do."""
    local = "or give --model a local directory or .gguf file"
    if isinstance(error, LpsearchError):
        return error
    if isinstance(error, GatedRepoError):
        return SourceError(
            f"{repo_id} is gated: accept its licence at https://huggingface.co/{repo_id} and run `hf auth login`, "
            f"{local}"
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelError(f"{repo_id} has no revision {revision!r}; give a commit, branch or tag that it has")
    if isinstance(error, RepositoryNotFoundError):
        return ModelError(
            f"there is no model {repo_id} on the hub, or it is private; check the name (`lpsearch models` lists "
            "aliases), or run `hf auth login` with an account that may read it"
        )
    if isinstance(error, HFValidationError):
        return ModelError(f"{repo_id!r} is not a hub id: {error}")
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled | TimeoutError):
        return _describe_unreachable(repo_id, error, local)
    if isinstance(error, EntryNotFoundError):
        return ModelError(f"{repo_id} has no config.json at {revision!r}, so it is no Transformers model; {local[3:]}")
    if isinstance(error, HfHubHTTPError):
        return SourceError(f"{repo_id}: the hub refused: {describe_error(error)}; try again later, {local}")
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return LpsearchError(f"{error.filename}: the hub's cache cannot be written: {error.strerror}; see HF_HOME")
    return _describe_unreachable(repo_id, error, local)


def _describe_unreachable(repo_id: str, error: Exception, local: str) -> SourceError:
    """Make the error of a hub that gave no answer."""
    cause: BaseException = error.__cause__ or error
    if isinstance(error, OfflineModeIsEnabled) or isinstance(cause, OfflineModeIsEnabled):
        return SourceError(
            f"{repo_id} is not in the local cache, and HF_HUB_OFFLINE forbids asking the hub; unset it, {local}"
        )
    return SourceError(
        f"{repo_id} is not in the local cache, and the hub cannot be reached ({describe_error(cause)}); check the "
        f"network, {local}"
    )
