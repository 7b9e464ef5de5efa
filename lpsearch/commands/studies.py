"""Opening the study in a directory: its files, its lock, and what its record says against what was asked for."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy.engine import URL

from lpsearch.config import OptimizeConfig, ResolvedConfig, slug_of_model
from lpsearch.errors import ResumeError, StudyError
from lpsearch.models import ModelSource
from lpsearch.models.aliases import find_alias
from lpsearch.models.sources import normalise_id
from lpsearch.search import FIXED_SETTINGS, PlanSpace, StudyStore, compare_settings
from lpsearch.search.locks import HeldElsewhereError, hold_file_lock

__all__ = ["RECORDED_OPTIONS", "check_new_study", "follow_record", "open_study_store"]

logger = logging.getLogger(__name__)

_NEEDED_BYTES = 64 << 20
"""Room for a study of some hundred trials with its windows and plan files."""

_STUDY_FILES = ("study.db-wal", "study.db-shm", "study.db", "front.json", "plans", "artifacts", "report.html")

RECORDED_OPTIONS = (
    "data",
    "heldout",
    "windows",
    "seq_len",
    "max_group",
    "metric",
    "objective",
    "sampler",
    "seed",
    "dtype",
    "freeze",
    "staged",
)
"""Options that a study records; where the user names none of these, a resumed study keeps its own."""


@contextmanager
def open_study_store(values: OptimizeConfig, out: Path, *, fresh: bool) -> Iterator[StudyStore]:
    """Open the study of a directory, or of ``--storage``, and be the only process that runs it.

    Args:
        values: the configuration.
        out: directory of the study; made if it is not there.
        fresh: move an existing study aside first.

    Raises:
        StudyError: if the directory or the database cannot be used, or another process runs the study.
        ResumeError: if the directory holds a study of another name than the one asked for.
    """
    _prepare_directory(out)
    if fresh:
        _check_data(values)  # before anything is moved
        _move_aside(out)
    # Built, not formatted: a directory's name may hold what means something else in a URL.
    own_url = URL.create("sqlite", database=str((out / "study.db").absolute())).render_as_string()
    name = values.study or slug_of_model(values.model)
    with StudyStore(values.storage or own_url, study_name=name) as store, store.hold_lock():
        if fresh:
            store.move_aside()
        if values.storage is None:
            _adopt_study(store, is_named=values.study is not None)
        yield store


def check_new_study(values: OptimizeConfig, store: StudyStore, out: Path) -> None:
    """Refuse what can be refused before a model is loaded.

    Raises:
        StudyError: if the directory holds the results of a study that the database does not hold.
        UsageError: for data that are not there, or layers that the geometry of an alias does not have.
        SourceError: for a dataset out of reach.
    """
    if (out / "front.json").exists():
        raise StudyError(
            f"{out}: holds the results of a study that {store.where} does not hold; put its study.db back, add "
            "--fresh to move the results aside, or name another directory with --out"
        )
    _check_data(values)


def follow_record(
    recorded: Mapping[str, Any], config: ResolvedConfig, source: ModelSource
) -> tuple[OptimizeConfig, ModelSource]:
    """Continue a study: what the user named must agree with its record, the rest is taken from it.

    Raises:
        ResumeError: for a setting that was named and differs.
    """
    from lpsearch.data import name_text

    values = config.values
    requested = {name: getattr(values, name) for name in FIXED_SETTINGS if name in config.explicit}
    if requested.get("dtype") == "auto":
        del requested["dtype"]
    if "sampler" in config.explicit:
        requested["sampler"] = values.sampler
    begun_with = {**recorded, "model": normalise_id(recorded["model"])}
    for name in ("data", "heldout"):
        for settings in (begun_with, requested):
            if settings.get(name):
                settings[name] = name_text(settings[name])
    compare_settings(begun_with, {**requested, "model": source.id})
    if "seed" in config.explicit and values.seed != recorded["seed"]:
        logger.warning("the study keeps the seed that it was begun with, %d", recorded["seed"])
    kept = {*RECORDED_OPTIONS} - config.explicit | {"dtype", "seed"}  # these were settled when the study was begun
    updates = {name: recorded[name] for name in kept if name in recorded}
    updates["freeze"] = tuple(updates.get("freeze", values.freeze))
    return values.model_copy(update=updates), ModelSource.from_dict(recorded["source"])


def _prepare_directory(out: Path) -> None:
    """Make the directory of a study, and see that it can be written and has room.

    Raises:
        StudyError: if not.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as probe:
            probe.write(b"\0" * 4096)
        free_bytes = shutil.disk_usage(out).free
    except OSError as error:
        raise StudyError(f"{out}: cannot be written ({error}); choose another directory with --out") from None
    if free_bytes < _NEEDED_BYTES:
        raise StudyError(
            f"{out}: {free_bytes >> 20} MiB free, a study needs {_NEEDED_BYTES >> 20} MiB; "
            "free some space or choose another directory with --out"
        )


def _move_aside(out: Path) -> None:
    """Move the files of an existing study into a directory of its own beside them; nothing is deleted."""
    try:
        with hold_file_lock(out / "study.db.lock"):
            present = [out / name for name in _STUDY_FILES if (out / name).exists()]
            if not present:
                return
            aside = Path(tempfile.mkdtemp(prefix=time.strftime("before-%Y-%m-%dT%H-%M-%S-"), dir=out))
            for path in present:
                path.rename(aside / path.name)
    except HeldElsewhereError as error:
        raise StudyError(f"{out}: the study is being run by process {error.holder}; wait for it or end it") from None
    logger.info("moved the old study to %s", aside)


def _adopt_study(store: StudyStore, *, is_named: bool) -> None:
    """Keep to one study a ``study.db``: take the name of the one it holds, unless the user gave another.

    Raises:
        ResumeError: if the user did.
    """
    held = store.list_studies()
    if not held or store.study_name in held:
        return
    if is_named:
        raise ResumeError(
            f"{store.where} holds the study {held[-1]!r}, not {store.study_name!r}; leave --study out, add --fresh to "
            "move the old study aside, or name another directory with --out"
        )
    store.study_name = held[-1]


def _check_data(values: OptimizeConfig) -> None:
    """Refuse what can be refused before a model is loaded.

    Raises:
        UsageError: for data that are not there, or layers that the geometry of an alias does not have.
        SourceError: for a dataset out of reach.
    """
    from lpsearch.data import check_text_source

    check_text_source(values.data, split="proxy")
    check_text_source(values.heldout or values.data, split="heldout")
    alias = find_alias(values.model)
    if alias is not None:
        PlanSpace(alias.num_layers, values.max_group, values.freeze)
