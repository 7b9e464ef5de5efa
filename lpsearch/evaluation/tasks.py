"""Downstream accuracy by lm-evaluation-harness: one model in memory, scored as it is, under a plan, and repaired.

Every variant is scored by requests built anew and answered by the model as it stands. The harness keeps requests and
answers by task and model name, and every variant here is the same model by that name, so neither cache is used.
"""

from __future__ import annotations

import contextlib
import copy
import math
import numbers
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lpsearch.errors import LpsearchError, UsageError
from lpsearch.evaluation.harness import FEWSHOT_SEED, TaskSuite, quiet_harness
from lpsearch.evaluation.task_scores import (
    Score,
    TaskMetric,
    TaskResult,
    compare_scores,
    compute_chance,
    weigh_parts,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["check_chat_template", "evaluate_tasks"]

_BOOTSTRAP_ITERATIONS = 1000
"""Of standard errors without a closed form, as of F1; the mean of documents has one."""

_ACCURACIES = frozenset({"acc", "acc_norm", "acc_bytes", "acc_mutual_info"})
"""Metrics of multiple choice that are the share of questions whose best choice is right."""

_PREFERRED_METRIC = "acc_norm"
"""The accuracy that papers report where a task has it: choices are compared per character."""

_PROGRESS_PARTS = 1000

Variant = Callable[[], AbstractContextManager[Any]]


def evaluate_tasks(
    suite: TaskSuite,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    variants: Mapping[str, Variant],
    limit: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[TaskResult]:
    """Score variants of one model on tasks.

    Args:
        suite: the tasks.
        model: the unmodified model; unmodified again afterwards.
        tokenizer: of the model.
        variants: by name, what to enter while the variant is scored, e.g. ``lambda: applied_plan(model, plan)``. The
            first is the unmodified model, with which the others are compared.
        limit: documents of each task; None takes all.
        batch_size: sequences that are run together.
        apply_chat_template: put each question in the tokenizer's chat template, as instruct models expect.
        on_progress: called with the parts done and the parts in all.

    Returns:
        One result a metric, in the order of the names; the tasks of a group come after it.

    Raises:
        UsageError: if a chat template is asked for and the tokenizer has none.
        LpsearchError: if the memory of the device is too small.
    """
    if apply_chat_template:
        check_chat_template(tokenizer)
    progress = _Progress(suite, num_variants=len(variants), limit=limit, on_progress=on_progress)
    with quiet_harness():
        lm = _wrap_model(model, tokenizer, batch_size=batch_size)
        progress.watch(lm)
        runs: dict[str, dict[str, _Run]] = {name: {} for name in suite.loaded}
        for variant, enter in variants.items():
            with enter():
                for name in suite.loaded:
                    progress.begin(name)
                    runs[name][variant] = _run_harness(
                        lm, suite, name, limit=limit, apply_chat_template=apply_chat_template
                    )
    return [result for name in suite.loaded for result in _compare_runs(runs[name])]


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without a chat template.

    Raises:
        UsageError: if it has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("the tokenizer has no chat template to apply; leave --apply-chat-template out")


@dataclass(frozen=True)
class _Run:
    """One variant on the tasks of one name: what is common to all variants, and the scores, both by metric."""

    metrics: Mapping[tuple[str, str, str], TaskMetric]
    scores: Mapping[tuple[str, str, str], Score]


def _compare_runs(runs: Mapping[str, _Run]) -> Iterator[TaskResult]:
    first = next(iter(runs.values()))
    for key, metric in first.metrics.items():
        yield compare_scores(metric, {variant: run.scores[key] for variant, run in runs.items()})


def _wrap_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> Any:
    """Give the harness a model that is loaded.

    Its wrapper ties the head to the embedding anew, which would overwrite a head that was loaded beside it, and sets
    a padding token on the tokenizer, so it gets no way to tie and a copy of the tokenizer.
    """
    import logging

    from lm_eval.models.huggingface import HFLM

    chatter = logging.getLogger("lm_eval.models.huggingface")
    level = chatter.level
    chatter.setLevel(logging.ERROR)  # it warns that the model is an object
    model.__dict__["tie_weights"] = lambda *args, **kwargs: None
    try:
        return HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, max_batch_size=None)
    finally:
        del model.__dict__["tie_weights"]
        chatter.setLevel(level)


def _run_harness(lm: Any, suite: TaskSuite, name: str, *, limit: int | None, apply_chat_template: bool) -> _Run:
    import torch
    from lm_eval import evaluate

    loaded = suite.loaded[name]
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)  # every variant sees the same examples
    try:
        with _seeded(FEWSHOT_SEED, lm.device):
            results = evaluate(
                lm,
                loaded,
                limit=limit,
                cache_requests=False,
                rewrite_requests_cache=False,
                bootstrap_iters=_BOOTSTRAP_ITERATIONS,
                log_samples=True,
                apply_chat_template=apply_chat_template,
                fewshot_as_multiturn=apply_chat_template,
            )
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise LpsearchError(
            f"out of memory on task {name}: {error}; lower --batch-size, or choose a smaller --dtype or a larger device"
        ) from error
    return _read_results(name, loaded, results)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators that tasks draw from, and leave them as they were."""
    import numpy as np
    import torch

    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _read_results(name: str, loaded: Any, results: Any) -> _Run:
    """Read what the harness returns for one name."""
    tasks, groups = loaded["tasks"], loaded.get("groups", {})
    values = {task: _read_values(results["samples"][task]) for task in tasks}
    chances = {task: _compute_task_chance(tasks[task], results["samples"][task]) for task in tasks}
    parents = {child: group for group in groups.values() for child in group.child_names}
    metrics: dict[tuple[str, str, str], TaskMetric] = {}
    scores: dict[tuple[str, str, str], Score] = {}
    ordered = [name for name in groups if name in results["results"]] + list(tasks)
    for task in ordered:
        reported = results["results"][task]
        leaves = [leaf.task_name for leaf in groups[task].get_all_tasks()] if task in groups else [task]
        keys = [key.partition(",") for key in reported if "," in key and "_stderr," not in key]
        main = _choose_main([metric for metric, _, _ in keys])
        for position, (metric, _, filter_name) in enumerate(keys):
            value = float(reported[f"{metric},{filter_name}"])
            error = reported.get(f"{metric}_stderr,{filter_name}")
            parts = weigh_parts(value, [values[leaf].get((metric, filter_name), ()) for leaf in leaves])
            scores[task, metric, filter_name] = Score(value, _read_number(error), parts)
            output_types = {tasks[leaf].OUTPUT_TYPE for leaf in leaves}
            chance_of_leaves = [chances[leaf] if metric in _ACCURACIES else None for leaf in leaves]
            metrics[task, metric, filter_name] = TaskMetric(
                task=task,
                group=parents[task].name if task in parents else name if task != name else None,
                output_type=output_types.pop() if len(output_types) == 1 else None,
                metric=metric,
                filter=filter_name,
                is_main=position == main,
                num_documents=sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
                num_fewshot=results["n-shot"].get(task),
                version=str(results["versions"].get(task)),
                higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
                chance=compute_chance(chance_of_leaves, parts),
            )
    return _Run(metrics, scores)


def _choose_main(metrics: Sequence[str]) -> int:
    """Return the position of the metric that tables show: the preferred one, or else the task's first."""
    return metrics.index(_PREFERRED_METRIC) if _PREFERRED_METRIC in metrics else 0


def _read_values(samples: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], tuple[float, ...]]:
    """Return the documents' values by metric and filter, in the documents' order; of numbers alone."""
    import numpy as np

    found: dict[tuple[str, str], list[tuple[int, Any]]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            found.setdefault((metric, sample["filter"]), []).append((sample["doc_id"], sample[metric]))
    return {
        key: tuple(float(value) for _, value in sorted(items, key=lambda item: item[0]))
        for key, items in found.items()
        if all(isinstance(value, (numbers.Real, np.bool_)) for _, value in items)
    }


def _read_number(value: Any) -> float | None:
    """Return a finite number; the harness writes ``N/A`` where it knows none."""
    return float(value) if isinstance(value, numbers.Real) and math.isfinite(value) else None


def _compute_task_chance(task: Any, samples: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the share of questions that random choices answer rightly; None where choices are not all there is."""
    if task.OUTPUT_TYPE != "multiple_choice" or not hasattr(task, "multiple_target"):
        return None
    if task.get_config("process_results") is not None:  # what it calls accuracy may be something else
        return None
    by_document = {sample["doc_id"]: sample for sample in samples}
    chances = []
    for sample in by_document.values():
        num_choices = len(task.doc_to_choice(sample["doc"]))
        target = task.doc_to_target(sample["doc"])
        num_right = len(set(target)) if task.multiple_target and isinstance(target, list) else 1
        chances.append(num_right / num_choices)
    return math.fsum(chances) / len(chances) if chances else None


class _Progress:
    """Counts answers; every document weighs the same."""

    def __init__(
        self,
        suite: TaskSuite,
        *,
        num_variants: int,
        limit: int | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self._sizes = {
            name: sum(min(len(task.eval_docs), limit or math.inf) for task in loaded["tasks"].values())
            for name, loaded in suite.loaded.items()
        }
        self._total = num_variants * sum(self._sizes.values())
        self._on_progress = on_progress
        self._before = 0.0
        self._size = 0.0
        self._answered = 0
        self._requests = 1

    def watch(self, lm: Any) -> None:
        """Have the harness's model tell of every answer, through the hook that its answers' cache would use."""
        for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(lm, kind, self._count_requests(getattr(lm, kind)))
        lm.set_cache_hook(self)

    def begin(self, name: str) -> None:
        """Begin with the tasks of one name."""
        self._before += self._size
        self._size = self._sizes[name]

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """Take note of an answer; the name is the harness's."""
        self._answered += 1
        if self._on_progress is not None:
            share = (self._before + self._size * min(1.0, self._answered / self._requests)) / self._total
            self._on_progress(round(_PROGRESS_PARTS * share), _PROGRESS_PARTS)

    def _count_requests(self, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def count_and_run(requests: Any) -> Any:
            self._answered, self._requests = 0, max(1, len(requests))
            return run(requests)

        return count_and_run
