"""The study of a directory: opening it to run it or to look at it, beginning it, and following its record."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from sqlalchemy.engine import URL

from lpsearch.commands.loading import settle_dtype
from lpsearch.commands.outputs import prepare_directory
from lpsearch.commands.steps import show_steps
from lpsearch.config import OptimizeConfig, ResolvedConfig, Split, StoredSplit, check_device_map, check_latency
from lpsearch.errors import ResumeError, StudyError, UsageError
from lpsearch.front_file import FRONT_NAME, load_front_file
from lpsearch.kinds import parse_kinds
from lpsearch.latency.mix import format_mix, parse_mix
from lpsearch.models import ModelSource
from lpsearch.models.sources import normalise_id
from lpsearch.search import FIXED_SETTINGS, StoredWindows, StudyStore, compare_settings, complete_settings
from lpsearch.search.database import is_writable
from lpsearch.search.kinds import read_kinds, write_kinds
from lpsearch.search.locks import HeldElsewhereError, hold_file_lock
from lpsearch.search.storage_url import find_sqlite_path, parse_storage_url, refuse_memory

if TYPE_CHECKING:
    import torch

    from lpsearch.data import Windows
    from lpsearch.models import LoadedModel

__all__ = [
    "RECORDED_OPTIONS",
    "begin_study",
    "follow_record",
    "open_existing_study",
    "open_study_store",
    "refuse_orphaned_results",
    "resume_study",
]

logger = logging.getLogger(__name__)

_SPLITS: tuple[Split, ...] = get_args(Split)

_NEEDED_BYTES = 64 << 20
"""Room for a study of some hundred trials with its windows and plan files."""

_CALIBRATION_SEED = 1_000_003
"""Added to the study's seed where windows to refit on are sampled from the model."""

_STUDY_FILES = ("study.db-wal", "study.db-shm", "study.db", FRONT_NAME, "plans", "artifacts", "report.html")

RECORDED_OPTIONS = (
    "data",
    "heldout",
    "windows",
    "seq_len",
    "max_group",
    "allow",
    "metric",
    "worst_case",
    "recover",
    "objective",
    "sampler",
    "seed",
    "dtype",
    "freeze",
    "staged",
    "workload",
)
"""Options that a study records; a resumed study keeps those that the user does not name."""


@contextmanager
def open_study_store(
    out: Path, *, storage: str | None, study: str | None, slug: str, fresh: bool
) -> Iterator[StudyStore]:
    """Open the study of a directory, or of a database elsewhere, and be the process that runs it, or one of several.

    On a database server this process has its turn to begin the study; others wait until it ends that.

    Args:
        out: directory of the study; made if it is not there.
        storage: database URL; None takes ``study.db`` in the directory.
        study: its name; None takes the one that the directory's own database holds, or the slug.
        slug: name of the model among directories.
        fresh: move an existing study aside first.

    Raises:
        ConfigError: for a database in memory.
        LpsearchError: if the directory cannot be written.
        StudyError: if the directory or the database cannot be used, or another process runs the study.
        ResumeError: if the directory holds a study of another name than the one asked for.
    """
    url = _build_url(out) if storage is None else parse_storage_url(storage)
    refuse_memory(url)
    _prepare_directory(out)
    if fresh:
        _move_aside(out)
    with StudyStore(url, study_name=study or slug) as store, store.hold_lock():
        store.lock.wait_for_turn()
        if fresh:
            store.move_aside()
        if storage is None:
            _adopt_study(store, is_named=study is not None)
        yield store


@contextmanager
def open_existing_study(
    directory: Path, *, storage: str | None, study: str | None, annotates: bool = False
) -> Iterator[StudyStore]:
    """Open the study of a directory to look at it, without making one or taking its lock.

    It is opened read-only, so that it may lie on a read-only medium.

    Args:
        directory: what ``optimize`` wrote.
        storage: database URL; None takes ``study.db`` in the directory.
        study: name of the study; None takes the one that the directory's ``front.json`` names, or the only one.
        annotates: let notes be written, if the database can be written.

    Yields:
        The open store.

    Raises:
        UsageError: for a directory or database without a study, or with several and none chosen.
        StudyVersionError: for a database of another version.
        StudyError: if the database fails.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such directory; give one that `lpsearch optimize` wrote")
    if storage is None and not (directory / "study.db").is_file():  # opening it would make one
        raise UsageError(
            f"{directory}: holds no study.db; give a directory that `lpsearch optimize` wrote, or --storage URL"
        )
    url = parse_storage_url(storage or _build_url(directory))
    refuse_memory(url)
    path = find_sqlite_path(url)
    read_only = not annotates or (path is not None and not is_writable(path))
    with StudyStore(url, study_name=study or "", read_only=read_only) as store:
        held = store.list_studies()
        if not held or (study is not None and study not in held):
            named = f"no study {study!r}" if study is not None and held else "no study yet"
            known = f"it holds {', '.join(map(repr, held))}" if held else "begin one with `lpsearch optimize`"
            raise UsageError(f"{store.where}: holds {named}; {known}")
        store.study_name = study if study is not None else _choose_study(store, held, directory)
        yield store


def refuse_orphaned_results(store: StudyStore, out: Path) -> None:
    """Refuse to begin a study where the results of another one would be overwritten.

    Raises:
        StudyError: if the directory holds the results of a study that the database does not hold.
    """
    if (out / FRONT_NAME).exists():
        raise StudyError(
            f"{out}: holds the results of a study that {store.where} does not hold; put its study.db back, add "
            "--fresh to move the results aside, or name another directory with --out"
        )


def follow_record(
    recorded: Mapping[str, Any], config: ResolvedConfig, source: ModelSource
) -> tuple[OptimizeConfig, ModelSource]:
    """Continue a study: what the user named must agree with its record, the rest is taken from it.

    Raises:
        ResumeError: for a setting that was named and differs.
        ConfigError: for settings that do not go together.
    """
    from lpsearch.data import name_texts

    values = config.values
    requested = {name: getattr(values, name) for name in FIXED_SETTINGS if name in config.explicit}
    if requested.get("dtype") == "auto":
        del requested["dtype"]
    if "sampler" in config.explicit:
        requested["sampler"] = values.sampler
    begun_with = {**complete_settings(recorded), "model": normalise_id(recorded["model"])}
    for name in ("data", "heldout"):
        for settings in (begun_with, requested):
            if settings.get(name):
                settings[name] = name_texts(settings[name], in_order=False)
    for settings in (begun_with, requested):
        if settings.get("workload"):
            settings["workload"] = format_mix(parse_mix(settings["workload"]))
    compare_settings(begun_with, {**requested, "model": source.id})
    if "seed" in config.explicit and values.seed != recorded["seed"]:
        logger.warning("the study keeps the seed that it was begun with, %d", recorded["seed"])
    kept = {*RECORDED_OPTIONS} - config.explicit | {"dtype", "seed"}  # these were settled when the study was begun
    updates = {name: recorded[name] for name in kept if name in recorded}
    updates["freeze"] = tuple(updates.get("freeze", values.freeze))
    updates["workload"] = tuple(updates.get("workload", values.workload))
    updates["allow"] = tuple(begun_with["allow"])  # studies from before drops do not say
    for name in ("data", "heldout"):
        if name in updates:  # studies of one kind of text record it as a string
            updates[name] = (updates[name],) if isinstance(updates[name], str) else tuple(updates[name] or ())
    followed = values.model_copy(update=updates)
    check_latency(followed)
    check_device_map(followed)
    return followed, ModelSource.from_dict(recorded["source"])


def begin_study(
    store: StudyStore, options: Mapping[str, Any], loaded: LoadedModel, *, device: torch.device
) -> tuple[dict[Split, Windows], Windows | None]:
    """Build a study's windows, settle its dtype, and record these with its options: all or nothing.

    Args:
        store: its database.
        options: what it is begun with, :data:`RECORDED_OPTIONS` as JSON values.
        loaded: the model, which is cast to the dtype.
        device: where the model is.

    Returns:
        What is evaluated on, by split; and what plans are refitted on, None without repair.
    """
    from lpsearch.data import build_mixed_windows, name_texts
    from lpsearch.models import fingerprint_parts

    windows: dict[Split, Windows] = {}
    for split in _SPLITS:
        with show_steps(f"preparing {split} windows") as on_progress:
            windows[split] = build_mixed_windows(
                parse_kinds((options["heldout"] if split == "heldout" else None) or options["data"]),
                tokenizer=loaded.tokenizer,
                num_windows=options["windows"],
                seq_len=options["seq_len"],
                split=split,
                seed=options["seed"],
                model=loaded.model,
                after=windows.get("proxy"),
                on_progress=on_progress,
            )
    calibration = None if options["recover"] == "off" else _build_calibration(options, loaded, windows)
    dtype = settle_dtype(loaded.model, dtype=options["dtype"], device=device, windows=windows["proxy"])
    model = {"model": loaded.source.id, "source": loaded.source.to_dict(), **_identify(loaded)}
    texts = {name: name_texts(options[name]) if options[name] else None for name in ("data", "heldout")}
    kinds = write_kinds({split: built.kinds for split, built in windows.items()})
    stored: dict[StoredSplit, StoredWindows] = {
        split: StoredWindows(built.input_ids, built.spec) for split, built in windows.items()
    }
    if calibration is not None:
        stored["calibration"] = StoredWindows(calibration.input_ids, calibration.spec)
    parts = fingerprint_parts(loaded.model, loaded.tokenizer)
    store.begin({**options, **texts, **kinds, **model, "parts": parts, "dtype": dtype}, stored)
    return windows, calibration


def _build_calibration(options: Mapping[str, Any], loaded: LoadedModel, windows: Mapping[Split, Windows]) -> Windows:
    """Build windows to refit plans on: of the kinds that are searched on, and none that is evaluated on."""
    from lpsearch.data import build_mixed_windows
    from lpsearch.recovery.evaluator import choose_num_calibration_windows

    kinds = parse_kinds(options["data"])
    num_windows = choose_num_calibration_windows(
        loaded.model,
        num_windows=options["windows"],
        num_kinds=len(kinds),
        seq_len=options["seq_len"],
        max_group=options["max_group"] if "joins" in options["allow"] else 1,
    )
    with show_steps("preparing windows to refit on") as on_progress:
        return build_mixed_windows(
            kinds,
            tokenizer=loaded.tokenizer,
            num_windows=num_windows,
            seq_len=options["seq_len"],
            split="proxy",
            seed=options["seed"] + _CALIBRATION_SEED,
            model=loaded.model,
            after=tuple(windows.values()),
            on_progress=on_progress,
        )


def resume_study(
    store: StudyStore, recorded: Mapping[str, Any], loaded: LoadedModel
) -> tuple[dict[Split, Windows], Windows | None]:
    """Return the windows of a study, whose model must still be the same; see :func:`begin_study`.

    Raises:
        ResumeError: if the model is not the one that the study was begun with.
        StudyError: if the study has lost its windows.
    """
    from lpsearch.data import Windows
    from lpsearch.models import check_parts, fingerprint_parts

    check_parts(recorded.get("parts", {}), fingerprint_parts(loaded.model, loaded.tokenizer), name=loaded.source.id)
    compare_settings(recorded, _identify(loaded))
    stored = {split: store.load_windows(split) for split in _SPLITS}
    windows = {
        split: Windows(kept.input_ids, kept.spec, kinds=read_kinds(recorded, split))
        for split, kept in stored.items()
        if kept is not None
    }
    refitted_on = store.load_windows("calibration")
    has_calibration = refitted_on is not None or recorded.get("recover", "off") == "off"
    if len(windows) < len(_SPLITS) or not has_calibration:
        raise StudyError(f"{store.where}: the study has lost its windows; restore a copy, or begin one with --fresh")
    if refitted_on is None:
        return windows, None
    return windows, Windows(refitted_on.input_ids, refitted_on.spec, kinds=read_kinds(recorded, "proxy"))


def _identify(loaded: LoadedModel) -> dict[str, Any]:
    """Return what of a model may not change while a study runs."""
    return {"fingerprint": loaded.identity.fingerprint, "num_layers": loaded.identity.num_layers}


def _choose_study(store: StudyStore, held: Sequence[str], directory: Path) -> str:
    """Choose a study where none was named: the one whose front the directory has, or the only one.

    Raises:
        UsageError: if there are several.
    """
    named = None
    with suppress(StudyError):  # said when the report is read
        file = load_front_file(directory)
        named = None if file is None else file.study
    if named is not None and named in held:
        return named
    if len(held) == 1:
        return held[0]
    found = f"names {named!r}, which is none of them" if named is not None else "does not say which is meant"
    raise UsageError(
        f"{store.where}: holds {len(held)} studies, and {directory / FRONT_NAME} {found}; "
        f"choose one with --study: {', '.join(map(repr, held))}"
    )


def _prepare_directory(out: Path) -> None:
    """Make the directory of a study, and check that it can be written and has room.

    Raises:
        LpsearchError: if it cannot be written.
        StudyError: if it has no room.
    """
    prepare_directory(out)
    free_bytes = shutil.disk_usage(out).free
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


def _build_url(directory: Path) -> URL:
    """Return the URL of a directory's own database; built, since its name may hold what means something in a URL."""
    return URL.create("sqlite", database=str((directory / "study.db").absolute()))
