"""The tasks of ``lpsearch evaluate``: their options, their names checked before a model is loaded, and their table."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from lpsearch.commands.steps import format_seconds, show_steps
from lpsearch.errors import UsageError
from lpsearch.plan import Plan
from lpsearch.wording import format_value, name_count

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lpsearch.evaluation.harness import TaskSuite
    from lpsearch.evaluation.task_scores import TaskResult
    from lpsearch.models import LoadedModel

__all__ = [
    "BatchSizeOption",
    "ChatTemplateOption",
    "LimitOption",
    "NumFewshotOption",
    "TaskPathOption",
    "TaskRun",
    "TaskTable",
    "TasksOption",
    "list_variants",
    "prepare_tasks",
]

logger = logging.getLogger(__name__)

TasksOption = Annotated[
    str | None,
    typer.Option(
        help="also score these tasks of lm-evaluation-harness, with commas between; e.g. arc_easy,gsm8k",
        metavar="TASK,...",
    ),
]
TaskPathOption = Annotated[
    Path | None,
    typer.Option(help="directory of task files beside the harness's own; their Python functions are run"),
]
NumFewshotOption = Annotated[
    int | None, typer.Option(help="solved examples before each question; default: the task's own", min=0)
]
LimitOption = Annotated[int | None, typer.Option(help="documents of each task; default: all", min=1)]
BatchSizeOption = Annotated[int, typer.Option(help="sequences of a task that are run together", min=1)]
ChatTemplateOption = Annotated[
    bool,
    typer.Option("--apply-chat-template", help="ask in the model's chat template, as instruct models expect"),
]

_UNBOUNDED = 10_000
"""Columns in which any table fits; what it takes of them is its own width."""

_GENERATIVE_SUGGESTION = "gsm8k"

Variant = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class TaskRun:
    """Tasks whose names and data were checked, and how to run them.

    Attributes:
        suite: the tasks.
        num_fewshot: solved examples before each question, if they were chosen.
        limit: documents of each task; None is all.
        batch_size: sequences that are run together.
        apply_chat_template: whether questions are put in the model's chat template.
    """

    suite: TaskSuite
    num_fewshot: int | None
    limit: int | None
    batch_size: int
    apply_chat_template: bool

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a chat template that a model does not have, before its weights are read.

        Raises:
            UsageError: if it has none and one is to be applied.
        """
        from lpsearch.evaluation.tasks import check_chat_template

        if self.apply_chat_template:
            check_chat_template(tokenizer)

    def score(self, loaded: LoadedModel, variants: Mapping[str, Variant]) -> TaskTable:
        """Score variants of a model.

        Args:
            loaded: the unmodified model with its tokenizer.
            variants: by name, what to enter for each; the first is the unmodified model.
        """
        from lpsearch.evaluation.tasks import evaluate_tasks

        if not self.apply_chat_template and getattr(loaded.tokenizer, "chat_template", None):
            logger.info(
                "the tokenizer has a chat template, which questions are not put in; an instruct model expects it: "
                "--apply-chat-template"
            )
        began_at = time.monotonic()
        with show_steps(f"scoring {', '.join(variants)} on {', '.join(self.suite.loaded)}") as on_progress:
            results = evaluate_tasks(
                self.suite,
                model=loaded.model,
                tokenizer=loaded.tokenizer,
                variants=variants,
                limit=self.limit,
                batch_size=self.batch_size,
                apply_chat_template=self.apply_chat_template,
                on_progress=on_progress,
            )
        return TaskTable(results, tuple(variants), self, time.monotonic() - began_at)


def prepare_tasks(
    tasks: str | None,
    *,
    task_path: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
    apply_chat_template: bool,
) -> TaskRun | None:
    """Find the tasks of a command line and load their data; None if it names none.

    Raises:
        UsageError: if a task is not known, or options of tasks are given without any.
        ConfigError: if lm-evaluation-harness is not installed.
        DataError: if a task's definition or its local data is wrong.
        SourceError: if a task's data cannot be fetched.
    """
    if tasks is None:
        given = {
            "--task-path": task_path is not None,
            "--num-fewshot": num_fewshot is not None,
            "--limit": limit is not None,
            "--apply-chat-template": apply_chat_template,
        }
        if any(given.values()):
            names = ", ".join(name for name, is_given in given.items() if is_given)
            raise UsageError(f"{names} without --tasks; name the tasks to score, e.g. --tasks arc_easy,gsm8k")
        return None
    named = [name.strip() for name in tasks.split(",") if name.strip()]
    if not named:
        raise UsageError(f"--tasks {tasks!r} names no task; expected e.g. --tasks arc_easy,gsm8k")
    from lpsearch.evaluation.harness import load_tasks

    with show_steps(f"loading the tasks {', '.join(named)}"):
        suite = load_tasks(named, task_path=task_path, num_fewshot=num_fewshot)
    if not suite.is_generative:
        logger.warning(
            "none of the tasks has the model write text; pruned models keep multiple choice long after they lose that: "
            "add a task that does, such as %s",
            _GENERATIVE_SUGGESTION,
        )
    return TaskRun(suite, num_fewshot, limit, batch_size, apply_chat_template)


def list_variants(model: PreTrainedModel, plan: Plan, weights: Mapping[str, Tensor]) -> dict[str, Variant]:
    """Return what is scored: the model as it is, under the plan, and with weights that were repaired for it, if any.

    Args:
        model: the unmodified model.
        plan: for the model.
        weights: what :func:`lpsearch.recovery.read_recovery` read for it; empty where they were never repaired.
    """
    from lpsearch.transform import applied_plan

    variants: dict[str, Variant] = {
        "base": nullcontext,
        "plan": lambda: applied_plan(model, plan.without_recovery()),
    }
    if weights:
        variants["repaired"] = lambda: _repaired(model, plan, weights)
    return variants


@contextmanager
def _repaired(model: PreTrainedModel, plan: Plan, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Run a model under a plan with its repaired weights; afterwards it has its own again, bit for bit."""
    from lpsearch.recovery import swapped_weights
    from lpsearch.transform import applied_plan

    with swapped_weights(model, weights), applied_plan(model, plan):
        yield


@dataclass(frozen=True)
class TaskTable:
    """What the variants scored, for the JSON document and, laid out when it is printed, for a person.

    Attributes:
        results: one a metric.
        variants: their names; the first is the unmodified model.
        run: how they were scored.
        elapsed_s: seconds that it took.
    """

    results: Sequence[TaskResult]
    variants: tuple[str, ...]
    run: TaskRun
    elapsed_s: float

    def build_document(self) -> dict[str, Any]:
        """Build the part of the JSON document that tells of the tasks."""
        return {
            "tasks": [self._describe(result) for result in self.results],
            "task_settings": {
                "lm_eval": self.run.suite.harness_version,
                "num_fewshot": self.run.num_fewshot,
                "limit": self.run.limit,
                "batch_size": self.run.batch_size,
                "apply_chat_template": self.run.apply_chat_template,
                "elapsed_s": round(self.elapsed_s, 3),
            },
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay the scores out to the width of the console.

        The differences give way, then the metrics' names and the documents; where that is not enough, each variant has
        a line of its own.
        """
        left_out = [(), ("difference",), ("difference", "metric"), ("difference", "metric", "documents")]
        tables = [*map(self._build_table, left_out), self._build_narrow_table()]
        unbounded = options.update(width=_UNBOUNDED)
        fitting = (table for table in tables if Measurement.get(console, unbounded, table).maximum <= options.max_width)
        table = next(fitting, tables[-1])
        yield ""
        yield table
        yield ""
        yield Text(self._explain(), "dim", no_wrap=False, overflow="fold")

    def _describe(self, result: TaskResult) -> dict[str, Any]:
        from lpsearch.search.losses import finite_or_none

        scores: dict[str, dict[str, float | None]] = {}
        for name, score in result.scores.items():
            scores[name] = {"value": finite_or_none(score.value), "standard_error": score.standard_error}
            if name in result.deltas:
                scores[name] |= {
                    "delta": finite_or_none(result.deltas[name]),
                    "delta_standard_error": result.delta_ses[name],
                    "retained": result.retained[name],
                }
        retained_of = "score" if result.metric.chance is None else "score above chance"
        return {**dataclasses.asdict(result.metric), "retained_of": retained_of, "scores": scores}

    def _build_table(self, leave_out: Sequence[str]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        base, *others = self.variants
        columns = {"task": ["task"], "metric": ["metric"], "documents": ["documents"], base: [base]}
        for name in others:
            columns |= {name: [name], f"{name} difference": ["difference"], f"{name} retained": ["retained"]}
        shown = [column for column, (kind,) in columns.items() if kind not in leave_out]
        for column in shown:
            is_left = column in ("task", "metric")
            table.add_column(columns[column][0], justify="left" if is_left else "right", no_wrap=True)
        for result in self._list_rows():
            cells = self._build_cells(result)
            table.add_row(*(cells[column] for column in shown))
        return table

    def _build_narrow_table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for name in ("task", "", "score", "retained"):
            table.add_column(name, justify="left" if name in ("task", "") else "right", no_wrap=True)
        for result in self._list_rows():
            cells = self._build_cells(result)
            for name in self.variants:
                task = result.metric.task if name == self.variants[0] else ""
                table.add_row(task, name, cells[name], cells.get(f"{name} retained", ""))
        return table

    def _list_rows(self) -> list[TaskResult]:
        """Return the main metrics; the tasks of a group with a score of its own are in the JSON document alone."""
        names = {result.metric.task for result in self.results}
        return [result for result in self.results if result.metric.is_main and result.metric.group not in names]

    def _build_cells(self, result: TaskResult) -> dict[str, str]:
        metric = result.metric
        name = metric.metric if metric.filter == "none" else f"{metric.metric} ({metric.filter})"
        cells = {"task": metric.task, "metric": name, "documents": f"{metric.num_documents:,}"}
        for variant, score in result.scores.items():
            cells[variant] = format_value(score.value, score.standard_error, digits=3, sign=" ±")
            if variant in result.deltas:
                error = result.delta_ses[variant]
                difference = f"{result.deltas[variant]:+.3f}" + ("" if error is None else f" ±{error:.3f}")
                retained = result.retained[variant]
                cells[f"{variant} difference"] = difference
                cells[f"{variant} retained"] = "" if retained is None else _mark(metric.chance, f"{retained:.0%}")
        return cells

    def _explain(self) -> str:
        rows = self._list_rows()
        lines = [
            f"{name_count(len(rows), 'task')} in {format_seconds(self.elapsed_s)}; ± standard error, of a difference "
            "that of the same documents' differences.",
            "retained: the share of what the unmodified model scores above chance (with *: of its whole score, where "
            "chance is not known); empty where it is not clearly above that.",
        ]
        return "\n".join(lines)


def _mark(chance: float | None, share: str) -> str:
    return f"{share}*" if chance is None else share
