"""Loading tasks of lm-evaluation-harness by name, with errors that say what to do.

The harness (Gao et al., "The Language Model Evaluation Harness", Zenodo 10.5281/zenodo.12608602) finds tasks in YAML
files: its own, or those of a directory that the user names, whose data may be local. It is the extra ``tasks``.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import importlib.util
import io
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpsearch.data.hub import check_hub_reachable
from lpsearch.errors import ConfigError, DataError, SourceError, UsageError, describe_error
from lpsearch.models.quiet import quiet_transformers

__all__ = ["FEWSHOT_SEED", "TaskSuite", "load_tasks", "quiet_harness"]

logger = logging.getLogger(__name__)

FEWSHOT_SEED = 1234
"""The harness's own seed of the examples before a question, so that its published numbers can be compared."""

_MEND = (
    "try again, set HF_DATASETS_OFFLINE=1 and HF_HUB_OFFLINE=1 if it was downloaded before, or write a task file over "
    "local data and name its directory with --task-path"
)
_NUM_NEAR_NAMES = 5
_NUM_SHOWN_WARNINGS = 5


@dataclass(frozen=True)
class TaskSuite:
    """Tasks that are ready to run.

    Attributes:
        loaded: by the name that was asked for, what the harness made of it: its tasks and groups.
        harness_version: version of lm-evaluation-harness.
    """

    loaded: Mapping[str, Any]
    harness_version: str

    @property
    def tasks(self) -> dict[str, Any]:
        """Every task by its name; those of groups and tags one by one."""
        return {name: task for loaded in self.loaded.values() for name, task in loaded["tasks"].items()}

    @property
    def is_generative(self) -> bool:
        """Whether any of the tasks has the model write text."""
        return any(task.OUTPUT_TYPE == "generate_until" for task in self.tasks.values())


def load_tasks(names: Sequence[str], *, task_path: Path | None = None, num_fewshot: int | None = None) -> TaskSuite:
    """Load tasks with their data, and build the first question of each, so that faults show before a model runs.

    Args:
        names: of tasks, groups or tags.
        task_path: a directory of task files beside the harness's own; a file may name Python functions, which run.
        num_fewshot: solved examples before each question; None takes each task's own number.

    Raises:
        ConfigError: if lm-evaluation-harness is not installed.
        UsageError: if a name is not known, or a task is not of a kind that runs here.
        DataError: if a task's definition or its local data is wrong, or the hub has no such data.
        SourceError: if a task's data cannot be fetched.
    """
    version = _check_installed()
    names = list(dict.fromkeys(names))
    with quiet_harness():
        index = _index_tasks(names, task_path)
        loaded = {name: _load_named(index, name) for name in names}
        _check_distinct(loaded)
        for tasks in loaded.values():
            for name, task in tasks["tasks"].items():
                _prepare_task(name, task, num_fewshot=num_fewshot)
    suite = TaskSuite(loaded, version)
    if num_fewshot:
        for name, task in suite.tasks.items():
            if task.get_config("num_fewshot") == 0:
                logger.warning("task %s is defined to show no examples; --num-fewshot leaves it so", name)
    return suite


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Hold back the bars, prints and chatter of the harness; the first of its warnings are logged afterwards."""
    collector = _Collector()
    library = logging.getLogger("lm_eval")
    level, propagate = library.level, library.propagate
    library.addHandler(collector)
    library.setLevel(logging.WARNING)
    library.propagate = False
    try:
        with quiet_transformers(), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        library.removeHandler(collector)
        library.setLevel(level)
        library.propagate = propagate
        collector.report()


class _Collector(logging.Handler):
    """Keeps the text of warnings, each once; there may be one a document."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._messages: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self._messages[" ".join(record.getMessage().split())] = None

    def report(self) -> None:
        for message in [*self._messages][:_NUM_SHOWN_WARNINGS]:
            logger.warning("lm-evaluation-harness: %s", message)
        num_more = len(self._messages) - _NUM_SHOWN_WARNINGS
        if num_more > 0:
            logger.warning("lm-evaluation-harness: and %d more warnings", num_more)


def _check_installed() -> str:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "tasks need lm-evaluation-harness, which is not installed; install lpsearch[tasks] (lm_eval[hf] >= 0.4.12)"
        )
    import lm_eval.tasks

    version = importlib.metadata.version("lm_eval")
    if not hasattr(lm_eval.tasks.TaskManager, "load"):
        raise ConfigError(f"lm_eval {version} is too old, expected 0.4.12 or later; install lpsearch[tasks] again")
    return version


def _index_tasks(names: Iterable[str], task_path: Path | None) -> Any:
    """Return an index of task files that has all the names; the harness's own 14,000 are read only where needed.

    Raises:
        UsageError: for a name that nothing has, with those that are near.
    """
    from lm_eval.tasks import TaskManager

    if task_path is not None:
        if not task_path.is_dir():
            raise UsageError(f"{task_path}: no such directory; expected one with the YAML files of tasks")
        local = TaskManager(include_path=str(task_path), include_defaults=False)
        if not local.all_tasks:
            raise UsageError(f"{task_path} has no task; expected *.yaml files that lm-evaluation-harness reads")
        if set(names) <= set(local.all_tasks):
            return local
    index = TaskManager(include_path=None if task_path is None else str(task_path))
    known = set(index.all_tasks)
    for name in names:
        if name in known:
            continue
        near = difflib.get_close_matches(name, index.all_tasks, _NUM_NEAR_NAMES)
        own = [] if task_path is None else local.all_tasks[:_NUM_NEAR_NAMES]
        hints = [f"near it are {', '.join(near)}"] if near else []
        hints += [f"{task_path} has {', '.join(own)}"] if own else []
        hints = hints or ["`lm_eval ls tasks` lists them all; --task-path DIR adds your own"]
        raise UsageError(f"no task is named {name!r}; {'; '.join(hints)}")
    return index


def _load_named(index: Any, name: str) -> Any:
    """Load one name; the harness fetches the data meanwhile."""
    entries = _find_entries(index.task_index, name)
    datasets = {str(entry["dataset_path"]) for entry in entries if isinstance(entry.get("dataset_path"), str)}
    remote = sorted(path for path in datasets if not _is_local(path))
    for dataset_id in remote:
        check_hub_reachable(dataset_id, subject=f"task {name}: its dataset", mend=_MEND)
    try:
        return index.load([name])
    except Exception as error:  # the libraries below the harness have no common error
        if remote and isinstance(error, (OSError, ConnectionError)):
            raise SourceError(
                f"task {name}: its dataset {', '.join(remote)} cannot be fetched ({describe_error(error)}); {_MEND}"
            ) from error
        raise DataError(
            f"task {name} cannot be loaded: {describe_error(error)}; check its file and its data"
        ) from error


def _find_entries(index: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """Return the configurations of the tasks behind a name: of itself, or of all that a group or tag holds."""
    found: list[Mapping[str, Any]] = []
    seen: set[str] = set()
    waiting: list[Any] = [name]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Mapping):
            found.append(item)
            waiting += [item[key] for key in ("task", "group") if isinstance(item.get(key), str)]
            waiting += item["task"] if isinstance(item.get("task"), list) else []
        elif item in index and item not in seen:
            seen.add(item)
            entry = index[item]
            waiting += sorted(entry.tags) if entry.yaml_path is None else []
            waiting += [entry.cfg] if entry.cfg is not None else []
    return found


def _is_local(dataset_path: str) -> bool:
    """Say whether a task's data is read by a format's own reader, or from a path here, and not from the hub."""
    return ("/" not in dataset_path.strip("/") and dataset_path in _list_readers()) or Path(dataset_path).exists()


def _list_readers() -> frozenset[str]:
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return frozenset(_PACKAGED_DATASETS_MODULES)


def _check_distinct(loaded: Mapping[str, Any]) -> None:
    """Refuse a task that two names hold, since its results would be in the way of each other."""
    owner: dict[str, str] = {}
    for name, tasks in loaded.items():
        for task in tasks["tasks"]:
            if task in owner:
                raise UsageError(f"{owner[task]} and {name} both hold the task {task}; name it once")
            owner[task] = name


def _prepare_task(name: str, task: Any, *, num_fewshot: int | None) -> None:
    """Set how many examples a task shows, and build its first question."""
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"task {name} shows images or sounds; expected tasks of text alone")
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(f"task {name} runs code that the model writes, which lpsearch does not; leave it out")
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):  # zero is part of a task's definition, as in the harness
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    try:
        if len(task.eval_docs) == 0:
            raise ValueError("its data has no documents")
        task.build_all_requests(limit=1)
    except Exception as error:  # templates and Python functions of the task's file raise anything
        raise DataError(
            f"task {name}: no question can be built: {describe_error(error)}; check its file, its data and "
            "--num-fewshot"
        ) from error
